"""SANA-Sprint: its tangent, its two times, its judge, one student for all numbers of steps, Sana's own classes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussians import draws, moved, play
from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Cond, Denoiser, Reparametrised
from stillroom.diffusion.process import RectifiedFlow, TrigFlow
from stillroom.diffusion.sampling import ScaleFewStepSampler
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.folders.denoisers import load_denoiser
from stillroom.folders.sana_sprint import sprint_denoiser
from stillroom.method import Stage
from stillroom.methods.trajectory.sana_sprint import SanaSprint, beside, differing
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.pipelines.model import PipelineGenerator
from stillroom.tasks.pipelines.task import facts
from tiny_denoisers import dit_teacher, point_teacher
from tiny_pipelines import save_pipeline

TRIG = TrigFlow()
MADE = {"point": point_teacher, "dit": dit_teacher}
SMALL: dict[str, Any] = {"guidance": (1.5, 2.0), "scale": 1.5, "gan_width": 8}
LABELS = torch.tensor([0, 1, 2, 3])


def built(teacher: Denoiser, **options: Any) -> SanaSprint:
    torch.manual_seed(0)
    method = SanaSprint(SanaSprint.Options(**{**SMALL, **options}))
    method.build(teacher.eval())
    method.progress = 1.0
    return method


def batch(shape: tuple[int, ...] = (2,), n: int = 8) -> dict[str, Any]:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    return {"x": x, "cond": {"label": torch.arange(n) % 4}}


def data(shape: tuple[int, ...]) -> ArrayData:
    return ArrayData(torch.randn(32, *shape), {"label": torch.arange(32) % 4})


def trained(folder: Path, name: str = "point", steps: int = 3, **options: Any) -> SanaSprint:
    torch.manual_seed(0)
    method = SanaSprint(SanaSprint.Options(**{**SMALL, **options}))
    method.build(MADE[name]().eval())
    optim = {"generator": {"lr": 0.01}}
    config = EngineConfig(steps=steps, batch=8, checkpoint_every=2, check_freezing=True, optim=optim)
    Trainer(method, data(method.teacher.shape), config, folder).fit()
    return method


# --- the tangent ------------------------------------------------------------------------------------------------------
MEAN, STD = torch.tensor([[0.3, -0.2]]), 0.6


class Consistent(Denoiser):
    """The exact consistency function of one Gaussian, as a velocity of TrigFlow."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), TRIG, "v", shape=(2,))

    def native(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        cos, sin = t.cos()[:, None], t.sin()[:, None]
        end = MEAN + STD * (x_t - cos * MEAN) / (cos**2 * STD**2 + sin**2).sqrt()
        return (cos * x_t - end) / sin + 0 * self.network.weight.sum()


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_a_consistent_student_of_an_exact_gaussian_teacher_has_nothing_to_learn(derivative: Any) -> None:
    method = built(point_teacher(), guidance=(), gan_weight=0.0, derivative=derivative)
    method.teacher, method.student = MixtureDenoiser(GaussianMixture(MEAN, STD), RectifiedFlow()), Consistent()
    play(method, "generator", {"x": MEAN + STD * torch.randn(64, 2), "cond": {}})
    assert method.notes["tangent"] < 2e-3
    method.student = method.teacher  # whose velocity is the path's, but whose jumps end elsewhere
    with torch.no_grad():
        method.draw = draws(64)
        method.consistency({"x": MEAN + STD * torch.randn(64, 2), "cond": {}}, {})
    assert method.notes["tangent"] > 0.05


@pytest.mark.parametrize("name", MADE)
def test_the_loss_s_gradient_is_that_of_the_change_along_the_guided_path_by_finite_differences(name: str) -> None:
    """Each piece by another way: guidance by two calls, the change of f by a small step of the path, no jvp."""
    method = built(MADE[name](), gan_weight=0.0, tangent_c=0.1, data_std=0.5)
    for parameter in method.student.attachment.out.parameters():  # type: ignore[union-attr]
        nn.init.normal_(parameter, std=0.3)
    given = batch(method.teacher.shape, 4)
    play(method, "generator", given)
    method.draw = draws(4)
    x0, cond = given["x"], given["cond"]
    told = method.with_scale(cond, x0)
    w = told["guidance_scale"]
    t = method.angles(method.options.times, x0)
    u = TRIG.add_noise(x0, method.draw.normal_like(x0), t)
    teacher, student = (Reparametrised(d, TRIG) for d in (method.teacher, method.student))
    shape = (-1, *(1,) * (x0.ndim - 1))
    cos = t.cos().reshape(shape)
    with torch.no_grad():
        plain, null = teacher(u, t, cond).v, teacher(u, t, {"label": torch.full((4,), 4)}).v
        path = null + w.reshape(shape) * (plain - null)
        h = 1e-4
        (ahead, own, behind) = (
            (t + d).cos().reshape(shape) * (u + d * path)
            - (t + d).sin().reshape(shape) * student(u + d * path, t + d, told).v
            for d in (h, 0.0, -h)
        )
        g = cos * (ahead - behind) / (2 * h)
        length = g.flatten(1).square().mean(1).sqrt().reshape(shape)
        g = g / (length + 0.1 / 0.5)
    assert float(own.std()) > 0
    asked = student(u, t, told).v
    weight = 1 / (0.5 * t.tan()) / t.numel() / x0[0].numel()
    wanted = torch.autograd.grad(
        asked, list(method.student.parameters()), -2 * weight.reshape(shape) * g, allow_unused=True
    )
    for mine, theirs in zip(method.student.parameters(), wanted, strict=True):
        if theirs is not None and theirs.abs().max() > 1e-4:
            assert mine.grad is not None
            assert float((mine.grad - theirs).norm() / theirs.norm()) < 0.05


def test_without_guidance_a_copy_of_the_teacher_starts_without_a_tangent_and_warms_up() -> None:
    method = built(point_teacher(), guidance=(), gan_weight=0.0, tangent_warmup=0.5)
    method.progress = 0.0
    play(method, "generator", batch())
    assert method.notes["tangent"] < 1e-5
    for progress, warm in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        method.progress = progress
        assert method.warm == pytest.approx(warm)
    method.options.retime_share, method.progress = 0.5, 0.75  # halfway through what follows
    assert method.warm == pytest.approx(1.0)


def test_times_are_the_paper_s_law() -> None:
    method = built(point_teacher(), guidance=(), gan_weight=0.0)
    method.draw = draws(4000)
    n = (0.5 * method.angles(method.options.times, torch.zeros(1)).tan()).log()
    assert abs(float(n.mean())) < 0.1
    assert abs(float(n.std()) - 1.6) < 0.1
    assert method.end == pytest.approx(math.pi / 2)


# --- the judge --------------------------------------------------------------------------------------------------------
def test_the_share_at_maximal_time_is_drawn_from_noise_alone_as_one_step_draws() -> None:
    method = built(point_teacher(), guidance=(), at_max=1.0)
    given, method.draw = batch(), draws(8)
    x0 = method.jump(given, given["cond"])
    method.draw = draws(8)
    method.angles(method.options.times, given["x"])
    z = method.draw.normal_like(given["x"])
    torch.testing.assert_close(x0, method.sampler().sample(method.student, z, given["cond"]), rtol=1e-4, atol=1e-5)
    method.options.at_max, method.draw = 0.0, draws(8)
    assert not torch.allclose(method.jump(given, given["cond"]), x0, atol=1e-3)


def test_rows_whose_neighbour_has_their_own_condition_do_not_count_as_misaligned() -> None:
    cpu = torch.device("cpu")
    assert beside(5, cpu).tolist() == [1, 0, 3, 2, 4]
    assert torch.equal(beside(4, cpu), torch.cat([beside(2, cpu), beside(2, cpu) + 2]))  # as two micro-batches
    assert differing({"label": torch.tensor([0, 0, 1, 2])}).tolist() == [0, 0, 1, 1]
    text = torch.tensor([[[1.0]], [[2.0]], [[2.0]]])
    assert differing({"label": torch.tensor([0, 0, 0]), "text": text}).tolist() == [1, 1, 0]


@pytest.mark.parametrize("name", MADE)
def test_each_turn_moves_its_own_networks(name: str) -> None:
    method = built(MADE[name]())
    given = batch(method.teacher.shape)
    terms = play(method, "generator", given)
    assert set(terms) == {"consistency", "gan"}
    assert moved(method) == {"student", "variance"}
    play(method, "critic", given)
    assert moved(method) == {"discriminator"}
    alone = built(MADE[name](), scm_weight=0.0)
    assert set(play(alone, "generator", given)) == {"gan"}
    assert alone.variance is None


def test_two_micro_batches_learn_what_one_batch_does(tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        method = SanaSprint(SanaSprint.Options(**SMALL))
        method.build(point_teacher().eval())
        optim = {"all": {"name": "sgd", "lr": 0.01}}
        config = EngineConfig(steps=2, batch=8, accumulate=accumulate, optim=optim)
        Trainer(method, data((2,)), config, tmp_path / str(accumulate)).fit()
        found.append({name: p.detach().clone() for name, p in method.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("misaligned", [True, False])
def test_the_judge_s_loss_is_eq_10_by_hand(misaligned: bool) -> None:
    """From what it is shown, one part at a time: real, generated, and real under its neighbour's condition."""
    method = built(point_teacher(), misaligned=misaligned)
    given = batch()
    labels = torch.tensor([0, 1, 2, 2, 3, 0, 1, 1])  # of neighbours two have the same
    given["cond"] = {"label": labels}
    play(method, "generator", given)
    fake, judged, seen = method.shared["x0"], method.judged, []
    method.judged = lambda x, s, cond: seen.append((x, s, cond)) or judged(x, s, cond)  # type: ignore[method-assign,func-returns-value]
    method.draw = draws(8)
    loss = float(method.critic(given)["gan"].detach())
    (x, s, cond) = seen[0]
    of = [given["x"], fake] + [given["x"][[1, 0, 3, 2, 5, 4, 7, 6]]] * misaligned
    assert torch.equal(s, s[:8].repeat(len(of)))
    assert torch.equal(cond["label"], labels.repeat(len(of)))
    noises = [
        (part - s[:8, None].cos() * clean) / s[:8, None].sin() for part, clean in zip(x.split(8), of, strict=True)
    ]
    assert all(float(noise.std()) < 2 for noise in noises)
    assert not any(torch.allclose(noises[0], noise, atol=0.1) for noise in noises[1:])
    with torch.no_grad():
        of_real, *of_fakes = (judged(part, s[:8], {"label": labels}) for part in x.split(8))
    rows = [(1 - of_real[i]).clamp_min(0).mean() for i in range(8)]
    worse = [(1 + of_fakes[0][i]).clamp_min(0).mean() for i in range(8)]
    if misaligned:
        worse += [(1 + of_fakes[1][i]).clamp_min(0).mean() if i not in (2, 3, 6, 7) else 0 for i in range(8)]
    assert loss == pytest.approx(float(sum(rows) / 8 + sum(worse) / len(worse)) / 2, rel=1e-5)


# --- its inputs -------------------------------------------------------------------------------------------------------
def test_a_new_student_is_the_teacher_whatever_the_scale_and_learns_all_that_are_named() -> None:
    method = built(point_teacher())
    x, t = torch.randn(4, 2), torch.tensor([0.1, 0.4, 0.7, 1.0])
    cond = {"label": LABELS, "guidance_scale": torch.tensor([1.0, 2.0, 4.0, 6.0])}
    with torch.no_grad():
        assert torch.equal(method.student(x, t, cond).value, method.teacher(x, t, {"label": LABELS}).value)
    method.draw = draws(400)
    drawn = method.with_scale({}, torch.zeros(400, 2))["guidance_scale"]
    assert sorted(set(drawn.tolist())) == [1.5, 2.0]


def test_retimed_networks_are_fed_other_times_and_become_the_teacher_of_what_follows(tmp_path: Path) -> None:
    method = trained(tmp_path, "dit", 4, retime_share=0.5, time_scale=2.0)
    assert [stage.name for stage in method.stages()] == ["retime", "distil"]
    assert method.base is method.retimed
    assert method.retimed is not None
    assert method.student.process == RectifiedFlow(time_scale=2.0)
    moved_by = [
        not torch.equal(a, b)
        for a, b in zip(method.retimed.network.parameters(), method.teacher.network.parameters(), strict=True)
    ]
    assert any(moved_by)
    seen: list[Tensor] = []
    handle = method.student.network.register_forward_hook(
        lambda network, args, given, output: seen.append(given["timestep"]), with_kwargs=True
    )
    method.student(torch.zeros(1, 1, 8, 8), torch.tensor([0.5]), {"label": torch.tensor([0])})
    handle.remove()
    assert seen[0].tolist() == [1.0]
    ImageGenerator(method.student, method.sampler()).save(tmp_path / "student")
    assert load_denoiser(tmp_path / "student").process == RectifiedFlow(time_scale=2.0)


def test_retiming_copies_the_student_once_as_it_stands_then() -> None:
    method = built(point_teacher(), retime_share=0.5)
    assert method.retimed is not None
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.1)
    method.enter(Stage("distil"), None, resumed=True)
    assert not torch.equal(next(method.retimed.parameters()), next(method.student.parameters()))
    method.enter(Stage("distil"), None, resumed=False)
    for mine, theirs in zip(method.retimed.parameters(), method.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    teacher_like = built(point_teacher(), retime_share=0.5, time_scale=1000.0)  # times as they were: no error
    play(teacher_like, "retime", batch())
    assert teacher_like.notes["retime_error"] < 1e-12


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    from workers.toy import Stop, stop_after

    straight = trained(tmp_path / "a", steps=6, retime_share=0.4)
    config = EngineConfig(steps=6, batch=8, checkpoint_every=2, optim={"generator": {"lr": 0.01}})
    for resume in (False, True):
        torch.manual_seed(0)
        method = SanaSprint(SanaSprint.Options(**SMALL, retime_share=0.4))
        method.build(point_teacher().eval())
        trainer = Trainer(method, data((2,)), config, tmp_path / "b", resume)
        if resume:
            trainer.fit()
        else:
            trainer.callbacks.append(stop_after(5))
            with pytest.raises(Stop):
                trainer.fit()
    for part in ("student", "retimed", "discriminator"):
        for (name, p), q in zip(
            getattr(straight, part).named_parameters(), getattr(method, part).parameters(), strict=True
        ):
            assert torch.equal(p, q), (part, name)


# --- one student for several steps ------------------------------------------------------------------------------------
def test_times_of_one_two_and_four_steps_are_table_7_s() -> None:
    method = built(point_teacher())
    for steps, angles in ((1, [math.pi / 2]), (2, [math.pi / 2, 1.3]), (4, [math.pi / 2, 1.3, 1.1, 0.6])):
        method.options.steps = steps  # type: ignore[assignment]
        sampler = method.sampler()
        assert isinstance(sampler, ScaleFewStepSampler)
        assert sampler.times[0] == 1.0
        for t, angle in zip(sampler.times[1:], angles[1:], strict=True):
            assert math.atan2(t, 1 - t) == pytest.approx(angle)
        assert sampler.nfe == steps


def test_a_run_s_report_shows_one_two_and_four_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stillroom.recipe import Recipe
    from stillroom.run import run
    from tiny import FAST, make_data, make_teacher

    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    make_data(tmp_path / "data")
    changes = [*FAST, "engine.steps=4", "evaluate.n=0", "evaluate.samples=4", "options.gan_width=8", "options.steps=2"]
    run(Recipe.load("sana-sprint", changes, teacher="teacher", data="data"), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["also"] == {"student, 1 step": 1, "student, 4 steps": 4}
    page = (tmp_path / "run" / "report.html").read_text()
    for who, calls in (("Student", 2), ("Student, 1 step", 1), ("Student, 4 steps", 4)):
        assert f"{who}<span>{calls} network evaluation" in page


def test_a_folder_keeps_scale_and_steps_and_both_may_be_changed_at_the_call(tmp_path: Path) -> None:
    student = trained(tmp_path / "run", "dit").student
    for parameter in student.attachment.out.parameters():  # type: ignore[union-attr]
        nn.init.normal_(parameter, std=0.3)
    model = ImageGenerator(student, ScaleFewStepSampler((1.0,), scale=1.5))
    model.save(tmp_path / "student")
    again = ImageGenerator.load(tmp_path / "student")
    assert again.sampler == model.sampler
    first = again.sample([0, 1], seed=1)
    assert torch.equal(first, model.sample([0, 1], seed=1))
    for changes in ({"scale": 2.0}, {"times": (1.0, 0.78)}, {"scale": 0.0}):
        other = ImageGenerator(again.denoiser, again.changed(**changes)).sample([0, 1], seed=1)
        assert not torch.allclose(other, first, atol=1e-4)


# --- Sana -------------------------------------------------------------------------------------------------------------
PROMPTS = ["a red cat", "the boat of a dog"]


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> PipelineGenerator:
    folder = tmp_path_factory.mktemp("sana")
    save_pipeline("sana", folder / "teacher")
    return PipelineGenerator.load(f"{folder / 'teacher'}@32")


def test_a_sana_network_gets_an_input_for_the_scale_and_stays_the_same_function(sana: PipelineGenerator) -> None:
    cond, _ = sana.conditions(PROMPTS)
    made = sprint_denoiser(sana.denoiser, qk_norm=False)
    dense = copy.deepcopy(sana.denoiser)
    dense.process = RectifiedFlow(time_scale=1.0)
    x, t = torch.randn(2, *sana.denoiser.shape), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        told = {**cond, "guidance_scale": torch.tensor([4.5, 2.0])}
        torch.testing.assert_close(made(x, t, told).value, dense(x, t, cond).value, rtol=1e-4, atol=1e-5)
        nn.init.normal_(made.network.time_embed.guidance_embedder.linear_2.weight)  # type: ignore[union-attr,arg-type]
        assert not torch.allclose(made(x, t, told).value, dense(x, t, cond).value, atol=1e-3)
        own = {**cond, "guidance": torch.tensor([0.45, 0.2])}
        torch.testing.assert_close(made(x, t, told).value, made(x, t, own).value)
    assert sprint_denoiser(sana.denoiser).network.config["qk_norm"] == "rms_norm_across_heads"  # type: ignore[index]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_student_of_sana_is_loaded_and_drawn_by_diffusers_and_is_ours(
    steps: Any, sana: PipelineGenerator, tmp_path: Path
) -> None:
    import diffusers

    torch.manual_seed(0)
    cond, sana.denoiser.null = sana.conditions(PROMPTS)
    method = SanaSprint(SanaSprint.Options(gan_width=8, retime_share=0.5, steps=steps, scale=4.0))
    method.build(sana.denoiser)
    method.progress = 1.0
    given = {"x": torch.randn(2, *sana.denoiser.shape), "cond": cond}
    play(method, "retime", given)
    method.enter(Stage("distil"), None, resumed=False)
    play(method, "generator", given)
    play(method, "critic", given)
    with torch.no_grad():  # every weight moved
        for parameter in method.student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    student = sana.student(method.student, method.sampler())
    student.save(tmp_path)
    side = json.loads((tmp_path / "stillroom.json").read_text())
    assert side["arguments"]["guidance_scale"] == 4.0
    assert facts(sana, student)["timesteps"] == pytest.approx([math.pi / 2, 1.3][:steps], abs=1e-3)
    pipeline = diffusers.SanaSprintPipeline.from_pretrained(str(tmp_path), local_files_only=True)
    assert pipeline.transformer.config.guidance_embeds
    pipeline.set_progress_bar_config(disable=True)
    asked = {"prompt": PROMPTS, "height": 32, "width": 32, **side["arguments"]}

    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    theirs = pipeline(**asked, generator=seeds(), output_type="pt")[0]
    mine = student.pipeline(**asked, generator=seeds(), output_type="pt")[0]
    assert torch.equal(theirs, mine)
    torch.testing.assert_close(PipelineGenerator.load(tmp_path).sample(PROMPTS, seed=[3, 4]), theirs * 2 - 1)
    latents = pipeline(**asked, generator=seeds(), output_type="latent")[0]
    generators = seeds()
    noise = [torch.randn(1, *sana.denoiser.shape, generator=g) for g in generators]

    if steps == 1:
        ours = method.sampler().sample(method.student, torch.cat(noise), cond)
        torch.testing.assert_close(ours, latents, rtol=1e-3, atol=1e-4)
        return
    sampler, told = method.sampler(), {**cond, "guidance_scale": torch.full((2,), 4.0)}
    with torch.no_grad():
        x0 = method.student(torch.cat(noise), torch.ones(2), told).x0
        fresh = torch.cat([torch.randn(1, *sana.denoiser.shape, generator=g) for g in generators])
        t = torch.full((2,), sampler.times[1])
        ours = method.student(method.student.process.add_noise(x0, fresh, t), t, told).x0
    torch.testing.assert_close(ours, latents, rtol=2e-3, atol=2e-3)


# --- bad input --------------------------------------------------------------------------------------------------------
def test_what_cannot_be_learnt_is_refused_with_a_cure(sana: PipelineGenerator) -> None:
    plain = point_teacher()
    plain.null = {}
    with pytest.raises(UserError, match="no unconditional value"):
        built(plain)
    with pytest.raises(UserError, match=r"retime_share=0\.2"):
        built(sana.denoiser, guidance=())
    trig = point_teacher()
    trig.process = TrigFlow()
    with pytest.raises(UserError, match="not for the trigflow process"):
        built(trig, retime_share=0.5)
    method = SanaSprint(SanaSprint.Options(**SMALL), lora={"student": {"rank": 2, "targets": ("to_q", "to_v")}})
    with pytest.raises(UserError, match="no input for the guidance scale"):
        method.build(point_teacher())


def test_distillation_is_warmed_up_after_retiming() -> None:
    stages = SanaSprint(SanaSprint.Options(retime_share=0.25)).stages()
    assert [stage.kind for stage in stages] == ["retime", "distil"]
    assert all(stage.own_schedule for stage in stages)
