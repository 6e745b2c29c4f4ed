"""diffusers' text-to-image pipelines as teachers, and students that diffusers loads by itself."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_pipelines
from stillroom.diffusion.process import EDM, VP, RectifiedFlow
from stillroom.diffusion.sampling import FewStepSampler, TCDSampler
from stillroom.errors import UserError
from stillroom.folders.pipeline_calls import network_of, pack, tokens_of, unpack
from stillroom.folders.pipeline_families import FAMILIES
from stillroom.folders.pipelines import INDEX, LORA, few_step_scheduler, is_pipeline, sized
from stillroom.surgery.lora import lora_role
from stillroom.tasks.pipelines.model import OwnScheduler, PipelineGenerator
from tiny_pipelines import IN_MEMORY, PIPELINES, SIDE, VARIANTS, WIDER, make_pipeline

PROMPTS = ["a red cat", "the boat of a dog"]
ONE = FewStepSampler((1.0,))


def size_of(name: str) -> tuple[int, int]:
    return (WIDER.get(name, SIDE),) * 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each family's tiny pipeline, written once."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            tiny_pipelines.save_pipeline(name, root / name)
        return root / name

    return folder


@pytest.fixture(scope="module")
def loaded(saved: Callable[[str], Path]) -> Callable[[str], PipelineGenerator]:
    known: dict[str, PipelineGenerator] = {}

    def generator(name: str) -> PipelineGenerator:
        if name == "kolors":
            pytest.importorskip("sentencepiece")
        if name not in known and name in IN_MEMORY:
            known[name] = PipelineGenerator(make_pipeline(name), size=size_of(name))
        elif name not in known:
            known[name] = PipelineGenerator.load(f"{saved(name)}@{size_of(name)[0]}")
        return known[name]

    return generator


LIKE_OTHERS = ("flux2-klein", "sdxl guidance input")
"""Made as others are, and not soon made: marked slow."""


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in [*PIPELINES, *VARIANTS]
    ]
)
def teacher(request: pytest.FixtureRequest, loaded: Callable[[str], PipelineGenerator]) -> PipelineGenerator:
    return loaded(request.param)


def noise_of(generator: PipelineGenerator, seeds: list[int]) -> Tensor:
    shape = generator.denoiser.shape
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def drawn_latents(generator: PipelineGenerator) -> tuple[Tensor, Tensor]:
    """``(by the pipeline, by our own sampler)`` from the same noise: two independent ways to the same latents."""
    pipeline, denoiser, family = generator.pipeline, generator.denoiser, generator.family
    arguments = dict(generator.arguments)
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    # a shorter prompt beside a longer one is padded with words that this network does not pass over
    prompts = ["a red cat", "the blue boat"] if family.title == "Qwen-Image 2.1" else PROMPTS
    made, scheduler = [], pipeline.scheduler
    real = scheduler.step

    def step(*given: Any, **more: Any) -> Any:
        answer = real(*given, **more)
        last = -1 if family.trigflow else 0  # of SCM the prediction
        made.append(answer[last] if isinstance(answer, tuple) else answer.prev_sample)
        return answer

    scheduler.step = step
    try:
        pipeline(
            prompt=list(prompts), height=generator.size[0], width=generator.size[1], output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **arguments,
        )  # fmt: skip
    finally:
        scheduler.step = real
    cond, denoiser.null = generator.conditions(prompts)
    ours = generator.sampler.sample(denoiser, noise_of(generator, [3, 4]), cond)
    theirs = made[-1] / scheduler.config.sigma_data if family.trigflow else made[-1]
    return theirs.detach(), as_drawn(generator, ours)


def as_drawn(generator: PipelineGenerator, latents: Tensor) -> Tensor:
    """In the shape in which the pipeline has them."""
    if generator.family.packed:
        return pack(latents)
    return tokens_of(latents) if generator.family.title in IN_TOKENS else latents


IN_TOKENS = ("Flux 2", "Flux 2 Klein", "Qwen-Image 2.1")


@torch.no_grad()
def test_a_guided_prediction_is_that_of_the_pipelines_own_loop(loaded: Callable[[str], PipelineGenerator]) -> None:
    """What Qwen-Image's loop hands to its scheduler: guided tokens as long as the conditional ones. Also asked through
    an adapter, and of a copy without one."""
    teacher = loaded("qwen-image")
    generator = PipelineGenerator(teacher.pipeline, OwnScheduler(3, 4.0), teacher.denoiser, teacher.size)
    scheduler, seen = generator.pipeline.scheduler, []
    real = scheduler.step

    def step(value: Tensor, t: Tensor, latents: Tensor, **more: Any) -> Any:
        seen.append((value, scheduler.sigmas[scheduler.step_index or 0], latents))
        return real(value, t, latents, **more)

    scheduler.step = step
    try:
        generator.sample(PROMPTS, seed=[3, 4])
    finally:
        scheduler.step = real
    assert len(seen) == 3
    cond, teacher.denoiser.null = teacher.conditions(PROMPTS)
    role = lora_role(copy.deepcopy(teacher.denoiser), "student", rank=2, targets=("to_q",))
    height, width = teacher.denoiser.shape[-2:]
    for theirs, sigma, latents in seen:
        t = teacher.denoiser.process.time_of(1 - sigma, sigma)
        for denoiser in (teacher.denoiser, role, role.merged()):  # type: ignore[attr-defined]
            ours = pack(denoiser(unpack(latents, height, width), t, cond, 4.0).value)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        plain = pack(teacher.denoiser(unpack(latents, height, width), t, cond).value)
        torch.testing.assert_close(ours.norm(dim=-1), plain.norm(dim=-1), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(ours, plain, rtol=1e-2)


@torch.no_grad()
def test_a_consistency_model_is_asked_as_in_its_own_loop(loaded: Callable[[str], PipelineGenerator]) -> None:
    """At its own four steps, with the pipeline's default guidance scale as an input."""
    teacher = loaded("lcm")
    scheduler, seen = teacher.pipeline.scheduler, []
    real = scheduler.step

    def step(value: Tensor, t: Tensor, latents: Tensor, *given: Any, **more: Any) -> Any:
        answer = real(value, t, latents, *given, **more)
        seen.append((value, t, latents, answer[1]))
        return answer

    scheduler.step = step
    try:
        teacher.sample(PROMPTS, seed=[3, 4])
        teacher.sample(PROMPTS, seed=[3, 4], num_inference_steps=1, guidance_scale=3.0)
    finally:
        scheduler.step = real
    assert [int(t) for _, t, *_ in seen] == [999, 759, 499, 259, 999]
    assert teacher.sampler.nfe == 4
    cond, _ = teacher.conditions(PROMPTS)
    for value, t, latents, denoised in seen[:4]:
        ours = teacher.denoiser(latents, float(t), cond)
        torch.testing.assert_close(ours.value, value, rtol=1e-4, atol=1e-4)
        scale = float(denoised.std())
        torch.testing.assert_close(ours.x0, denoised, rtol=1e-3, atol=1e-3 * scale)  # the boundary condition's share
    assert not torch.allclose(seen[4][0], seen[0][0], rtol=1e-2, atol=1e-3)


GUIDED = {
    "sd": {"guidance_rescale": 0.0}, "sdxl": {"guidance_rescale": 0.0}, "sd3": {"skip_guidance_layers": None},
    "z-image": {"cfg_normalization": False, "cfg_truncation": 1.0},
    "lumina2": {"cfg_normalization": True, "cfg_trunc_ratio": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDED)
def test_what_docs_say_of_guidance_is_off_in_the_pipelines(name: str) -> None:
    """Changes of the guidance that our teachers do not make are none by default."""
    import diffusers

    cls = getattr(diffusers, PIPELINES[name][0])
    defaults = inspect.signature(cls.__call__).parameters
    assert {key: defaults[key].default for key in GUIDED[name]} == GUIDED[name]


def test_several_steps_ask_at_the_right_times(teacher: PipelineGenerator) -> None:
    sampler = FewStepSampler((1.0, 0.75, 0.5, 0.25), "ddim")
    if teacher.family.trigflow:
        with pytest.raises(UserError, match="fresh noise at each step"):
            teacher.student(teacher.denoiser, sampler)
        return
    if teacher.family.consistency:
        with pytest.raises(UserError, match="renoise=fresh"):
            teacher.student(teacher.denoiser, sampler)
        sampler = ONE  # with fresh noise the two ways draw other noise
    student = teacher.student(teacher.denoiser, sampler)
    theirs, ours = drawn_latents(student)
    # whole timesteps against fractions of them
    rounded = isinstance(student.denoiser.process, VP) or teacher.family.title == "CogView 4"
    tolerance = (5e-2 if teacher.denoiser.prediction == "x0" else 2e-2) if rounded else 1e-3
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.std()))


def test_prompts_and_guidance_reach_the_picture(teacher: PipelineGenerator) -> None:
    cond, null = teacher.conditions(PROMPTS)
    teacher.denoiser.null = null
    x, t = noise_of(teacher, [1]).expand(2, *teacher.denoiser.shape), 0.5 * teacher.denoiser.process.t_max
    with torch.no_grad():
        plain = teacher.denoiser(x, t, cond).value
        uncond = teacher.denoiser(x, t, cond, 0.0).value
    assert not torch.allclose(plain[0], plain[1], atol=1e-5)
    assert not torch.allclose(plain, uncond, atol=1e-5)
    torch.testing.assert_close(uncond[0], uncond[1])


def test_latents_come_back_as_pictures(teacher: PipelineGenerator) -> None:
    """The latents that we encode are in the units that the pipeline decodes from."""
    images = torch.rand(2, 3, *teacher.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = teacher.latents(images)
    assert latents.shape[1:] == teacher.denoiser.shape
    vae, captured = teacher.pipeline.vae, {}

    class Seen(Exception):
        pass

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured["z"] = z
        raise Seen

    # a scheduler step that ends at our latents, so that the pipeline decodes exactly these
    student = teacher.student(teacher.denoiser, ONE)
    scheduler = student.pipeline.scheduler
    target = as_drawn(teacher, latents) * (0.5 if teacher.family.trigflow else 1.0)

    def step(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("return_dict", True):
            return type("Output", (), {"pred_original_sample": target, "prev_sample": target})()
        return (target, target)

    real, scheduler.step, vae.decode = vae.decode, step, decode
    try:
        with pytest.raises(Seen):
            student.sample(PROMPTS)
    finally:
        vae.decode = real
    if vae.config.get("in_channels") == 4:  # opaque
        images = torch.cat([images, torch.ones(2, 1, *teacher.size)], 1)
    with torch.no_grad():
        encoded = vae.encode(images if captured["z"].ndim == 4 else images.unsqueeze(2))
    raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    assert captured["z"].ndim == raw.ndim
    torch.testing.assert_close(captured["z"], raw, rtol=1e-4, atol=1e-4)


# --- out --------------------------------------------------------------------------------------------------------------
def changed(teacher: PipelineGenerator, sampler: FewStepSampler) -> PipelineGenerator:
    """A student: the teacher's network, every weight moved."""
    denoiser = copy.deepcopy(teacher.denoiser)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return teacher.student(denoiser, sampler)


def by_diffusers(folder: Path, seeds: list[int]) -> Tensor:
    """Pictures of a folder, drawn by diffusers with the arguments that its card names."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return call(pipeline, json.loads((folder / "stillroom.json").read_text()), seeds)


def call(pipeline: Any, side: dict[str, Any], seeds: list[int]) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        images = pipeline(
            prompt=list(PROMPTS), height=side["size"][0], width=side["size"][1], output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], **side["arguments"],
        )[0]  # fmt: skip
    return images[:, 0] if images.ndim == 5 else images


ONE_STEP = ("sd", "lcm", "sdxl", "sd3", "qwen-image", "flux", "z-image", "wan", "sd zero-snr v")
"""Families whose students of one step are tried by default; the others are marked slow."""


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *(
            (name, 1) if name in ONE_STEP else pytest.param(name, 1, marks=pytest.mark.slow)
            for name in [*PIPELINES, *VARIANTS]
            if name not in IN_MEMORY
        ),
        ("sd zero-snr v", 2),
        ("sd", 2),
        ("lcm", 4),
        ("sdxl", 4),
        ("pixart", 3),
        ("sd3", 2),
        ("flux", 3),
        ("sana-sprint", 2),
        ("cogview4", 2),
    ],
)
def test_a_student_s_folder_is_a_pipeline_bit_for_bit(
    name: str, steps: int, loaded: Callable[[str], PipelineGenerator], tmp_path: Path
) -> None:
    teacher = loaded(name)
    student = changed(teacher, FewStepSampler(tuple(1 - k / steps for k in range(steps))))
    student.save(tmp_path)
    side = json.loads((tmp_path / "stillroom.json").read_text())
    before = call(student.pipeline, side, [1, 2])
    assert torch.equal(by_diffusers(tmp_path, [1, 2]), before)
    assert before.std() > 0
    again = PipelineGenerator.load(tmp_path)
    assert torch.equal(again.sample(PROMPTS, seed=3), student.sample(PROMPTS, seed=3))
    assert again.denoiser.process == student.denoiser.process
    assert again.sampler == student.sampler
    assert not torch.equal(again.sample(PROMPTS, seed=3), teacher.sample(PROMPTS, seed=3, num_inference_steps=2))


def test_a_pipeline_that_was_never_a_folder_becomes_one(tmp_path: Path) -> None:
    student = changed(PipelineGenerator(make_pipeline("sdxl")), ONE)
    student.save(tmp_path)
    side = json.loads((tmp_path / "stillroom.json").read_text())
    # Modules made in memory and those mapped from a file were seen to differ in the last bit of a picture.
    torch.testing.assert_close(by_diffusers(tmp_path, [1, 2]), call(student.pipeline, side, [1, 2]), rtol=0, atol=1e-5)
    assert torch.equal(by_diffusers(tmp_path, [1, 2]), by_diffusers(tmp_path, [1, 2]))
    half = tmp_path / "half"
    student.save(half, dtype=torch.float16)
    assert (half / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 0.6 * (
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    ).stat().st_size


def test_pickles_and_code_are_not_copied(loaded: Callable[[str], PipelineGenerator], tmp_path: Path) -> None:
    teacher = loaded("sd")
    assert teacher.folder is not None
    for name in ("pytorch_model.bin", "code.py"):
        (teacher.folder / "text_encoder" / name).write_bytes(b"x")
    try:
        teacher.student(teacher.denoiser, ONE).save(tmp_path)
    finally:
        for name in ("pytorch_model.bin", "code.py"):
            (teacher.folder / "text_encoder" / name).unlink()
    names = {path.name for path in tmp_path.rglob("*")}
    assert not names & {"pytorch_model.bin", "code.py"}
    assert "model.safetensors" in names


@pytest.mark.slow
def test_diffusers_alone_reads_it(loaded: Callable[[str], PipelineGenerator], tmp_path: Path) -> None:
    """In a process that cannot import stillroom."""
    student = changed(loaded("sd3"), FewStepSampler((1.0, 0.5)))
    student.save(tmp_path)
    side = json.loads((tmp_path / "stillroom.json").read_text())
    script = f"""
import importlib.util, torch, diffusers
try:
    import stillroom
    raise SystemExit("stillroom can be imported here")
except ImportError:
    pass
pipeline = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path)!r}, local_files_only=True)
torch.manual_seed(7)
images = pipeline({PROMPTS!r}, height={side["size"][0]}, width={side["size"][1]}, output_type="pt",
                  generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **{side["arguments"]!r})[0]
torch.save(images.detach(), {str(tmp_path / "images.pt")!r})
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    blocked = ["-c", f"import sys; sys.modules['stillroom'] = None\n{script}"]
    subprocess.run([sys.executable, *blocked], check=True, env=environment, capture_output=True, timeout=280)
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), call(student.pipeline, side, [1, 2]))


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("sd", "sd3", "pixart") else pytest.param(name, marks=pytest.mark.slow)
        for name in PIPELINES
        if name not in IN_MEMORY
    ],
)
def test_a_lora_student_is_written_as_an_adapter_too(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    import diffusers
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    teacher = PipelineGenerator.load(f"{saved(name)}@{size_of(name)[0]}")
    role = lora_role(teacher.denoiser, "student", rank=2, alpha=3.0, targets=("to_q", "to_v"))
    for module in role.network.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["student"].weight, std=0.2)  # type: ignore[arg-type]
    student = teacher.student(role, ONE)
    with role.adapter_scope():
        side = {"size": student.size, "arguments": student.arguments}
        unmerged = call(student.pipeline, side, [1, 2])
    untouched = call(student.pipeline, side, [1, 2])
    assert not torch.equal(unmerged, untouched)
    student.save(tmp_path)
    torch.testing.assert_close(by_diffusers(tmp_path, [1, 2]), unmerged, rtol=1e-3, atol=1e-3)
    assert not any("lora" in key.lower() for key in _keys(tmp_path))
    plain = diffusers.DiffusionPipeline.from_pretrained(str(saved(name)), local_files_only=True)
    plain.register_modules(**(teacher.family.parts(1.0) if teacher.family.parts else {}))
    plain.set_progress_bar_config(disable=True)
    plain.register_modules(scheduler=student.pipeline.scheduler)
    if hasattr(plain, "load_lora_weights"):  # diffusers has none for PixArt
        plain.load_lora_weights(str(tmp_path / LORA))
        torch.testing.assert_close(call(plain, side, [1, 2]), unmerged, rtol=0, atol=1e-5)
        plain.unload_lora_weights()
    network = PeftModel.from_pretrained(network_of(plain), str(tmp_path / LORA))
    torch.testing.assert_close(call(plain, side, [1, 2]), unmerged, rtol=1e-4, atol=1e-4)
    assert network.peft_config["default"].r == 2


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_unified_lora_draws_our_picture_by_diffusers_tcd_scheduler(
    eta: float, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """The adapter of Hyper-SD's student on the teacher's own pipeline, with the adapter of feedback and without; and
    the adapter that is kept for other numbers of steps."""
    import diffusers
    from peft.tuners.lora import LoraLayer

    from stillroom.methods.trajectory.hyper_sd import HyperSD

    teacher = PipelineGenerator.load(f"{saved('sd')}@{size_of('sd')[0]}")
    options = HyperSD.Options(segments=(2, 1), mse=(1.0, 1.0), adversarial=(0.0, 0.0), grids=(8, 4))
    options.feedback_share = 1.0
    options.feedback_rank, options.student_steps, options.eta = 2, 2, eta
    method = HyperSD(options, {"student": {"rank": 2, "targets": ["to_q", "to_k", "to_v"]}})
    teacher.denoiser.null = {}
    method.build(teacher.denoiser)
    for module in method.student.network.modules():
        for one in module.lora_B.values() if isinstance(module, LoraLayer) else ():
            torch.nn.init.normal_(one.weight, std=0.2)  # type: ignore[arg-type]
    student = teacher.student(method.student, method.sampler())
    assert type(student.pipeline.scheduler).__name__ == "TCDScheduler"
    student.save(tmp_path)
    side = json.loads((tmp_path / "stillroom.json").read_text())
    assert side["arguments"]["eta"] == eta
    drawn = by_diffusers(tmp_path, [1, 2])
    assert PipelineGenerator.load(tmp_path).sampler == method.sampler()
    plain = diffusers.DiffusionPipeline.from_pretrained(str(saved("sd")), local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = diffusers.TCDScheduler.from_config(plain.scheduler.config, original_inference_steps=1000)
    plain.load_lora_weights(str(tmp_path / LORA), adapter_name="few")
    alone = call(plain, side, [1, 2])
    plain.load_lora_weights(str(tmp_path / "lora-feedback"), adapter_name="feedback")
    plain.set_adapters(["few", "feedback"], [1.0, 1.0])
    torch.testing.assert_close(call(plain, side, [1, 2]), drawn, rtol=1e-3, atol=1e-3)
    assert (alone - drawn).abs().max() > 1e-3
    plain.set_adapters(["few"], [1.0])  # without the feedback's adapter the picture is as before
    assert torch.equal(call(plain, side, [1, 2]), alone)
    plain.unload_lora_weights()
    plain.load_lora_weights(str(tmp_path / "lora-steps2"))
    assert (call(plain, side, [1, 2]) - alone).abs().max() > 1e-3


def _keys(folder: Path) -> list[str]:
    from safetensors import safe_open

    found = []
    for file in [*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors")]:
        with safe_open(file, "pt") as opened:
            found += list(opened.keys())
    assert found
    return found


# --- schedulers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("process", "sampler", "expected"),
    [
        (VP(), FewStepSampler((1.0,)), [999.0]),
        (VP(), FewStepSampler((0.625,)), [624.375]),
        (VP(), FewStepSampler((1.0, 0.75, 0.5, 0.25)), [999, 749, 499, 249]),
        (VP(), FewStepSampler((0.6, 0.3), "ddim"), [599, 299]),
        (VP("squaredcos_cap_v2"), FewStepSampler((0.6, 0.3), "ddim"), [599, 299]),
        (VP(zero_snr=True), FewStepSampler((1.0,)), [999.0]),
        (VP(zero_snr=True), FewStepSampler((0.625,)), [624.375]),
        (VP(zero_snr=True), FewStepSampler((1.0, 0.75, 0.5, 0.25)), [999, 749, 499, 249]),
        (VP(zero_snr=True), FewStepSampler((1.0, 0.5), "ddim"), [999, 499]),
        (VP(zero_snr=True), FewStepSampler((0.6, 0.3), "ddim"), [599, 299]),
        (VP("trained", 4, betas=(0.1, 0.2, 0.3, 0.4)), FewStepSampler((1.0,)), [3.0]),
        (VP(), TCDSampler((1.0, 0.75, 0.5, 0.25)), [999, 749, 499, 249]),
        (VP(zero_snr=True), TCDSampler((1.0, 0.5), eta=0.0), [999, 499]),
        (RectifiedFlow(), TCDSampler((1.0, 0.5), eta=1.0), [1000.0, 500.0]),
        (RectifiedFlow(3.0), FewStepSampler((1.0,)), [1000.0]),
        (RectifiedFlow(3.0), FewStepSampler((1.0, 0.5)), [1000.0, 500.0]),
    ],
)
def test_a_scheduler_asks_when_the_student_learnt_to_answer(
    process: Any, sampler: FewStepSampler, expected: list[float]
) -> None:
    scheduler = few_step_scheduler(sampler, process, "eps" if isinstance(process, VP) and not process.zero_snr else "v")
    scheduler.set_timesteps(len(sampler.times))
    torch.testing.assert_close(
        torch.as_tensor(scheduler.timesteps).double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.02
    )
    if isinstance(process, VP):
        noise = process.sigma(torch.tensor(sampler.times[0] * process.t_max))
        start = scheduler.scale_model_input(scheduler.init_noise_sigma * torch.ones(1), scheduler.timesteps[0])
        torch.testing.assert_close(start, noise.reshape(1), rtol=6e-3, atol=0)


def test_fresh_noise_is_fresh() -> None:
    """The second step of a few-step student starts from its first answer, noised anew."""
    for process, kind in ((VP(), "eps"), (VP(zero_snr=True), "v"), (RectifiedFlow(), "v")):
        scheduler = few_step_scheduler(FewStepSampler((1.0, 0.5)), process, kind)
        scheduler.set_timesteps(2)
        x0 = torch.full((1, 4, 64, 64), 2.0)
        eps = torch.randn(x0.shape)
        t = torch.tensor(process.t_max)
        x = process.add_noise(x0, eps, t)
        p, q = process.velocity_weights(t)
        value = eps if kind == "eps" else p * x0 + q * eps
        torch.manual_seed(11)
        after = scheduler.step(value, scheduler.timesteps[0], x, return_dict=False)[0]
        s = torch.tensor(499.0 if isinstance(process, VP) else 0.5)
        left = (after - process.alpha(s) * x0) / process.sigma(s)
        assert abs(float(left.mean())) < 0.05
        assert abs(float(left.std()) - 1) < 0.05
        assert abs(float((left * eps).mean())) < 0.05


@pytest.mark.parametrize(
    ("process", "sampler", "named"),
    [
        (RectifiedFlow(), FewStepSampler((0.8,)), "t_init=1.0"),
        (VP(), FewStepSampler((0.6, 0.3)), "renoise=ddim"),
        (VP(), FewStepSampler((1.0, 0.9)), "evenly spaced"),
        (VP(), FewStepSampler((1.0, 0.5), "fixed"), "renoise=fresh"),
        (EDM(), FewStepSampler((1.0,)), "edm"),
        (RectifiedFlow(), TCDSampler((1.0, 0.5), eta=0.3), "options.eta=0, or 1"),
    ],
)
def test_samplers_that_no_scheduler_reproduces_are_refused(process: Any, sampler: FewStepSampler, named: str) -> None:
    with pytest.raises(UserError, match=named):
        few_step_scheduler(sampler, process, "eps")


def test_a_consistency_model_s_scheduler() -> None:
    for times, expected in (((1.0,), [999]), ((1.0, 0.5), [999, 499])):
        scheduler = few_step_scheduler(FewStepSampler(times), VP(), "eps", consistency=True)
        assert type(scheduler).__name__ == "LCMScheduler"
        scheduler.set_timesteps(len(times), original_inference_steps=None)
        assert scheduler.timesteps.tolist() == expected
    with pytest.raises(UserError, match="pure noise") as found:
        few_step_scheduler(FewStepSampler((0.625,)), VP(), "eps", consistency=True)
    assert found.value.cure == "options.t_init=1.0"
    with pytest.raises(UserError, match="fresh noise"):
        few_step_scheduler(FewStepSampler((1.0, 0.5), "ddim"), VP(), "eps", consistency=True)


# --- in ---------------------------------------------------------------------------------------------------------------
def test_packing_is_undone() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(unpack(pack(x), 4, 6), x)
    import diffusers

    theirs = diffusers.FluxPipeline._pack_latents(x, 2, 3, 4, 6)
    assert torch.equal(pack(x), theirs)


def test_a_size_is_part_of_the_name(saved: Callable[[str], Path]) -> None:
    folder = saved("flux")
    assert sized(f"{folder}@64") == (folder, (64, 64))
    assert sized(f"{folder}@64x32") == (folder, (64, 32))
    assert sized(str(folder)) == (folder, None)
    assert is_pipeline(f"{folder}@64")
    wide = PipelineGenerator.load(f"{folder}@16x32")
    assert wide.denoiser.shape == (4, 8, 16)
    assert wide.sample(["a cat"], num_inference_steps=1).shape == (1, 3, 16, 32)
    with pytest.raises(UserError, match="multiples of 4"):
        PipelineGenerator.load(f"{folder}@18")


def test_own_sizes() -> None:
    assert PipelineGenerator(make_pipeline("sd")).size == (SIDE, SIDE)
    assert FAMILIES["flux"].own_size(make_pipeline("flux")) == (1024, 1024)


def test_a_flow_s_shift_is_that_of_its_resolution(loaded: Callable[[str], PipelineGenerator]) -> None:
    """Flux moves its times with the number of tokens; the process carries the shift that its scheduler would apply."""
    import numpy as np

    teacher = loaded("flux")
    scheduler = copy.deepcopy(teacher.pipeline.scheduler)
    mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.array([1.0, 0.5]), mu=mu)
    process = teacher.denoiser.process
    assert isinstance(process, RectifiedFlow)
    torch.testing.assert_close(process.warp(torch.tensor([1.0, 0.5])), scheduler.sigmas[:2])


def test_an_unknown_family_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(saved("sd"), folder)
    index = json.loads((folder / INDEX).read_text())
    for change, named in (
        ({"_class_name": "KandinskyPipeline"}, r"KandinskyPipeline.*StableDiffusionXLPipeline.*WanPipeline"),
        ({"_class_name": ["my_code", "MyPipeline"]}, "code of its own"),
        ({"unet": ["my_module", "MyUNet"]}, "MyUNet of 'my_module'"),
        ({"text_encoder_9": ["transformers", "CLIPTextModel"]}, "no text_encoder_9/"),
    ):
        (folder / INDEX).write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=named):
            PipelineGenerator.load(folder)


def test_what_is_missing_or_damaged_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(saved("sd"), folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    state = load_file(weights)
    lost = state.pop("conv_in.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"conv_in\.weight|cannot be read"):
        PipelineGenerator.load(folder)
    torch.save(state | {"conv_in.weight": lost}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        PipelineGenerator.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("hunyuan-image", {"use_meanflow": True}, "use_meanflow"),
        ("sana", {"guidance_embeds": True}, "guidance_embeds"),
        ("qwen-image", {"guidance_embeds": True}, "guidance_embeds"),
        ("wan", {"image_dim": 4}, "image_dim"),
        ("lcm", {"time_cond_proj_dim": None}, "time_cond_proj_dim"),
        ("sd", {"in_channels": 9}, "9 channels.*4"),
        ("sd", {"class_embed_type": "timestep"}, "more than text"),
    ],
)
def test_what_a_family_does_not_support_is_named(name: str, change: dict[str, Any], named: str) -> None:
    pipeline = make_pipeline(name)
    network_of(pipeline).register_to_config(**change)
    with pytest.raises(UserError, match=named):
        PipelineGenerator(pipeline)


def test_schedulers_that_would_be_read_wrongly_are_refused() -> None:
    import diffusers

    pipeline = make_pipeline("sd")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="zero SNR"):
        PipelineGenerator(pipeline)
    pipeline = make_pipeline("flux")
    pipeline.scheduler.register_to_config(time_shift_type="cubic")
    with pytest.raises(UserError, match="time_shift_type 'cubic'"):
        PipelineGenerator(pipeline, size=(SIDE, SIDE))


def test_pictures_do_not_depend_on_the_batch(loaded: Callable[[str], PipelineGenerator]) -> None:
    student = loaded("sd").student(loaded("sd").denoiser, FewStepSampler((1.0, 0.5)))
    texts = ["a cat", "a dog", "the boat"]
    together, apart = student.sample(texts, seed=1), student.sample(texts, seed=1, batch=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(student.sample(texts, seed=1), together)
    assert not torch.equal(student.sample(texts, seed=2), together)
    with pytest.raises(UserError, match="2 seeds for 3"):
        student.sample(texts, seed=[1, 2])
    with pytest.raises(UserError, match="at least one caption"):
        student.sample([])


def test_a_pipeline_s_own_scheduler_counts_its_calls() -> None:
    assert OwnScheduler(20, 5.0).nfe == 40
    assert OwnScheduler(20).nfe == 20
    with pytest.raises(UserError, match="inside the pipeline"):
        OwnScheduler().sample(None, torch.zeros(1))  # type: ignore[arg-type]


def test_a_part_whose_name_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "../secret": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "pipe").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"a part called '\.\./secret'"):
        PipelineGenerator.load(tmp_path / "pipe")


def test_no_name_is_not_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert is_pipeline(".")
    assert not is_pipeline("")
    assert not list(sized("")[0].glob("*"))
