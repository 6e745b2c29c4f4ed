"""Wan's two experts by noise, as teachers and as students: asked as the pipeline asks them, and loaded by it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_pairs import PROMPTS, Pictures
from stillroom.diffusion.process import RectifiedFlow
from stillroom.diffusion.routed import ByNoise, RoutedDenoiser
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.folders.pipelines import few_step_scheduler, shift_of
from stillroom.planning import plan
from stillroom.recipe import Recipe
from stillroom.tasks.pipelines.data import encode_prompts
from stillroom.tasks.pipelines.model import OwnScheduler, PipelineGenerator
from stillroom.tasks.pipelines.task import Pipelines
from stillroom.training import build_method
from tiny_pipelines import SIDE, make_pipeline, save_pipeline

CHANGES = [
    "engine.batch=2",
    "engine.steps=4",
    "engine.warmup=0",
    "engine.ema=[]",
    "engine.export=student",
    "evaluate.n=0",
]


def trained(family: str, method: str = "phased-dmd", *changes: str) -> tuple[Any, PipelineGenerator, PipelineGenerator]:
    """The method after four steps, its teacher and its student."""
    teacher = PipelineGenerator(make_pipeline(family), OwnScheduler(2), size=(SIDE, SIDE))
    data = encode_prompts(Pictures([], "three pictures"), teacher, report=lambda _: None)
    often = ["options.critic_turns=1"] if method == "phased-dmd" else []
    recipe, task = Recipe.load(method, [*CHANGES, *often, *changes], teacher=family, data="pictures"), Pipelines()
    task.load(recipe, {"teacher": teacher, "data": data})
    built = build_method(recipe, task.given, task.check)
    trainer = Trainer(built, task.data, recipe.engine, show=False)
    trainer.fit()
    return built, teacher, task.student(trainer.export_role(), built.sampler())


def seen_by(pipeline: Any) -> list[tuple[str, float]]:
    """Who was asked, and at which time, from now on."""
    asked: list[tuple[str, float]] = []
    for name in ("transformer", "transformer_2"):
        getattr(pipeline, name).register_forward_pre_hook(
            lambda _, given, kwargs, name=name: asked.append((name, float(kwargs["timestep"].flatten()[0]))),
            with_kwargs=True,
        )
    return asked


@torch.no_grad()
def test_a_teacher_of_two_experts_is_asked_as_its_pipeline_asks_it() -> None:
    teacher = PipelineGenerator(make_pipeline("wan experts"), size=(SIDE, SIDE))
    assert isinstance(teacher.denoiser, RoutedDenoiser)
    assert teacher.denoiser.route == ByNoise((0.6,))
    given, null = teacher.conditions(["a red cat"])
    teacher.denoiser.null = null
    x = torch.randn(1, *teacher.denoiser.shape, generator=torch.Generator().manual_seed(0))
    for t, name in ((0.9, "transformer"), (0.6, "transformer"), (0.3, "transformer_2")):
        network = getattr(teacher.pipeline, name)
        one, other = (
            network(x, torch.tensor([1000 * t]), value, return_dict=False)[0]
            for value in (given["encoder_hidden_states"], null["encoder_hidden_states"][None])
        )
        torch.testing.assert_close(teacher.denoiser(x, t, given).v, one)
        torch.testing.assert_close(teacher.denoiser(x, t, given, 3.0).v, other + 3 * (one - other))
    asked = seen_by(teacher.pipeline)
    teacher.student(teacher.denoiser, FewStepSampler((1.0, 0.5), "ddim")).sample(["a red cat"])
    assert asked == [("transformer", 1000.0), ("transformer_2", 500.0)]


@pytest.mark.parametrize("family", ["wan", "wan experts"])
def test_a_phased_student_is_a_folder_of_two_experts_that_wan_s_pipeline_loads(family: str, tmp_path: Path) -> None:
    import diffusers

    method, teacher, student = trained(family)
    begins = teacher.denoiser
    for share, name in ((1.0, "phase-1"), (0.5, "phase-2")):
        first = begins.expert_at(share) if isinstance(begins, RoutedDenoiser) else begins
        mine = method.student.experts[name]
        assert any(not torch.equal(p, q) for p, q in zip(mine.parameters(), first.parameters(), strict=True))
    student.save(tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert index["boundary_ratio"] == 0.625
    alone = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(alone) is diffusers.WanPipeline
    for name, part in (("transformer", "phase-1"), ("transformer_2", "phase-2")):
        theirs, ours = getattr(alone, name).state_dict(), method.student.experts[part].network.state_dict()
        assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    asked = seen_by(alone)
    alone.set_progress_bar_config(disable=True)
    alone(prompt="a red cat", height=SIDE, width=SIDE, output_type="latent", **student.arguments)
    assert asked == [("transformer", t) for t in (1000.0, 750.0)] + [("transformer_2", t) for t in (500.0, 250.0)]
    again = PipelineGenerator.load(tmp_path / "student")
    assert isinstance(again.denoiser, RoutedDenoiser)
    torch.testing.assert_close(again.sample(PROMPTS[:2], seed=1), student.sample(PROMPTS[:2], seed=1))
    own = PipelineGenerator(teacher.pipeline, folder=None, size=teacher.size)  # the teacher stays what it was
    assert isinstance(own.denoiser, RoutedDenoiser) is (family == "wan experts")


def test_its_folder_is_a_teacher_again(tmp_path: Path) -> None:
    folder = save_pipeline("wan experts", tmp_path / "teacher")
    teacher = PipelineGenerator.load(f"{folder}@{SIDE}")
    assert isinstance(teacher.denoiser, RoutedDenoiser)
    (folder / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="transformer_2"):
        PipelineGenerator.load(f"{folder}@{SIDE}")


@pytest.mark.parametrize("family", ["wan", "wan experts"])
def test_experts_that_are_adapters_are_merged_into_a_network_each(family: str) -> None:
    adapters = ["lora.student={rank: 2, targets: [to_q, to_v]}", "engine.activation_checkpointing=true"]
    method, _, student = trained(family, "phased-dmd", *adapters)
    first, second = student.pipeline.transformer, student.pipeline.transformer_2
    assert first is not second
    assert not any("lora" in name for name, _ in [*first.named_parameters(), *second.named_parameters()])
    x, cond = torch.randn(1, *student.denoiser.shape), student.conditions(["a boat"])[0]
    with torch.no_grad():
        for t in (0.9, 0.2):
            torch.testing.assert_close(student.denoiser(x, t, cond).v, method.student(x, t, cond).v)


@pytest.mark.parametrize("method", ["dmd2", "sim"])
def test_other_methods_take_such_a_teacher_too(method: str) -> None:
    more = ["options.gan_weight=0", "options.student_steps=2"] if method == "dmd2" else []
    built, _, student = trained("wan experts", method, "options.t_init=1.0", *more)
    assert isinstance(built.fake, RoutedDenoiser)
    assert bool(torch.isfinite(student.sample(["a house"])).all())


def test_what_cannot_take_experts_says_so() -> None:
    with pytest.raises(UserError, match="reads a block of one network, these are 2 experts"):
        trained("wan experts", "dmd2", "options.t_init=1.0")
    with pytest.raises(UserError, match="boot takes a teacher of one network"):
        trained("wan experts", "boot", "options.flipped=true")
    with pytest.raises(UserError, match=r"Stable Diffusion 3 run one network, this student has 2.*options.phases=1"):
        trained("sd3")
    with pytest.raises(UserError, match=r"Wan \(single frames\) run two experts by noise, this student has 4"):
        trained("wan", "phased-dmd", "options.phases=4")


def test_half_of_two_experts_is_refused() -> None:
    pipeline = make_pipeline("wan experts")
    pipeline.register_to_config(boundary_ratio=None)
    with pytest.raises(UserError, match="half of its experts"):
        PipelineGenerator(pipeline)
    for border in (1.5, 0, "high", float("nan")):
        pipeline.register_to_config(boundary_ratio=border)
        with pytest.raises(UserError, match=r"boundary_ratio in the pipeline's model_index\.json must be a number"):
            PipelineGenerator(pipeline)


def test_an_export_of_two_experts_names_no_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"2 experts is no single file; run its folder with diffusers' own pipeline"):
        PipelineGenerator(make_pipeline("wan experts")).parts()


def test_steps_that_crowd_towards_noise_have_wan_s_own_scheduler(tmp_path: Path) -> None:
    """Shift 7: asked at 1000, 954, 875, 700, the border after two; other families' pipelines have none for that."""
    _, _, student = trained("wan", "phased-dmd", "options.shift=7.0")
    asked = seen_by(student.pipeline)
    found: list[Tensor] = [student.sample(["a red cat"], seed=2)]
    assert [name for name, _ in asked] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert [t for _, t in asked] == pytest.approx([1000, 954.5, 875, 700], abs=1)
    student.save(tmp_path)
    found.append(PipelineGenerator.load(tmp_path).sample(["a red cat"], seed=2))
    torch.testing.assert_close(*found)
    sampler = FewStepSampler((1.0, 21 / 22, 7 / 8, 7 / 10), "ddim")
    assert shift_of(sampler) == pytest.approx(7.0)
    assert shift_of(FewStepSampler((1.0, 0.75, 0.5, 0.25), "ddim")) == 0
    with pytest.raises(UserError, match="evenly spaced"):
        few_step_scheduler(sampler, RectifiedFlow(), "v")


@torch.no_grad()
def test_wan_s_scheduler_steps_as_our_sampler() -> None:
    """Of a network that says one thing, the end is the same to what times of whole numbers leave open."""
    sampler = FewStepSampler((1.0, 21 / 22, 7 / 8, 7 / 10), "ddim")
    scheduler = few_step_scheduler(sampler, RectifiedFlow(), "v", experts=True)
    scheduler.set_timesteps(4)
    x = start = torch.randn(1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(x * 0.5 + 1.0, t, x, return_dict=False)[0]
    y = start
    for t, s in zip(sampler.times, (*sampler.times[1:], 0.0), strict=True):
        y = y + (s - t) * (y * 0.5 + 1.0)
    torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)


def test_it_is_planned(tmp_path: Path) -> None:
    folder = save_pipeline("wan experts", tmp_path / "teacher")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    found = plan(Recipe.load("phased-dmd", CHANGES, teacher=f"{folder}@{SIDE}", data=str(prompts)))
    assert found.total > 0
    assert len(found.turns) >= 2
