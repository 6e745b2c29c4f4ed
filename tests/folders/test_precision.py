"""Folders as hubs have them: halves, variants, shards, autoencoders of other kinds. All is read in float32, and what a
student's folder holds is read so by diffusers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.diffusion.sampling import FewStepSampler
from stillroom.errors import UserError
from stillroom.folders.pretrained import load_pretrained
from stillroom.folders.weights import copy_weights, weight_files
from stillroom.tasks.pipelines.model import PipelineGenerator
from tiny_pipelines import SIDE, make_pipeline

ONE = FewStepSampler((1.0,))
PROMPTS = ["a red cat", "the boat of a dog"]


def halved(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Path:
    make_pipeline(name).to(dtype).save_pretrained(folder, **how)
    return folder


def types_of(pipeline: Any) -> set[torch.dtype]:
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return {p.dtype for part in parts for p in part.parameters()}


def drawn_by_diffusers(folder: Path) -> tuple[Tensor, set[torch.dtype]]:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    side = json.loads((folder / "stillroom.json").read_text())
    images = pipeline(
        prompt=PROMPTS, height=side["size"][0], width=side["size"][1], output_type="pt", **side["arguments"],
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    )[0]  # fmt: skip
    return images, types_of(pipeline)


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "halves under plain names": lambda folder: halved("sd", folder),
    "a variant alone": lambda folder: halved("sd", folder, torch.float16, variant="fp16"),
    "a variant in shards": lambda folder: halved("sd", folder, variant="bf16", max_shard_size="10KB"),
    "halves in shards": lambda folder: halved("sd3", folder, max_shard_size="10KB"),
    "several text encoders": lambda folder: halved("flux", folder),
    "configs inside a config": lambda folder: halved("qwen-image", folder),
    "masks": lambda folder: halved("pixart", folder, torch.float16),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_part_is_read_in_float32_and_the_student_s_folder_draws(kind: str, tmp_path: Path) -> None:
    teacher = PipelineGenerator.load(f"{FOLDERS[kind](tmp_path / 'teacher')}@{SIDE}")
    assert types_of(teacher.pipeline) == {torch.float32}
    student = teacher.student(teacher.denoiser, ONE)
    student.save(tmp_path / "student")
    images, types = drawn_by_diffusers(tmp_path / "student")
    assert types == {torch.float32}
    ours = student.sample(PROMPTS, seed=[1, 2])
    torch.testing.assert_close(images.float() * 2 - 1, ours, rtol=0, atol=1e-5)
    again = PipelineGenerator.load(tmp_path / "student")
    assert torch.equal(again.sample(PROMPTS, seed=[1, 2]), ours)


def test_twins_in_half_precision_beside_whole_files_are_passed_over(tmp_path: Path) -> None:
    """As hubs have them: the second saving also says float16 in every config."""
    pipeline = make_pipeline("sd")
    pipeline.save_pretrained(tmp_path / "teacher")
    halved("sd", tmp_path / "teacher", torch.float16, variant="fp16")
    teacher = PipelineGenerator.load(tmp_path / "teacher")
    assert types_of(teacher.pipeline) == {torch.float32}
    for name, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(value, teacher.pipeline.text_encoder.state_dict()[name])
    teacher.student(teacher.denoiser, ONE).save(tmp_path / "student")
    assert not list((tmp_path / "student").rglob("*.fp16.*"))
    assert drawn_by_diffusers(tmp_path / "student")[1] == {torch.float32}


def test_a_pipeline_object_in_half_precision_is_trained_in_float32() -> None:
    teacher = PipelineGenerator(make_pipeline("sd").to(torch.bfloat16))
    assert types_of(teacher.pipeline) == {torch.float32}
    assert bool(torch.isfinite(teacher.sample(PROMPTS, num_inference_steps=2)).all())


def test_the_most_precise_variant_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def put(*names: str) -> Path:
        for name in names:
            save_file({"x": torch.ones(1)}, tmp_path / name)
        return tmp_path

    assert weight_files(tmp_path) is None
    assert weight_files(put("model.fp16.safetensors")).variant == "fp16"  # type: ignore[union-attr]
    assert weight_files(put("model.bf16.safetensors", "model.fp32.safetensors")).variant == "fp32"  # type: ignore[union-attr]
    found = weight_files(put("model.safetensors", "model-00001-of-00002.safetensors"))
    assert found is not None
    assert [path.name for path in found.files] == ["model.safetensors"]
    copy_weights(tmp_path, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["model.safetensors"]


def test_a_part_in_a_variant_alone_is_read_by_itself(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    make_pipeline("sd").vae.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    read = load_pretrained(AutoencoderKL, tmp_path)
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(AutoencoderKL, tmp_path)


def test_a_library_that_a_class_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def needs(*given: Any, **more: Any) -> Any:
        raise ImportError("KolorsPipeline requires the sentencepiece library")

    make_pipeline("sd").save_pretrained(tmp_path)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", needs)
    with pytest.raises(UserError, match=r"requires the sentencepiece library\); install it"):
        PipelineGenerator.load(tmp_path)


# --- autoencoders -----------------------------------------------------------------------------------------------------
def decoded(pipeline: Any, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What a pipeline hands to its autoencoder for these latents of the network."""
    seen: list[Tensor] = []

    def decode(z: Tensor, *args: Any, **more: Any) -> Any:
        seen.append(z)
        return (torch.zeros(len(z), 3, SIDE, SIDE),)

    monkeypatch.setattr(pipeline.vae, "decode", decode)
    monkeypatch.setattr(pipeline.scheduler, "step", lambda *a, **k: (latents, latents))
    pipeline(prompt=PROMPTS, num_inference_steps=1, height=SIDE, width=SIDE, guidance_scale=1.0, output_type="pt")
    return seen[0]


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_statistics_of_latents_are_those_that_the_pipeline_undoes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``(z - mean) * scaling_factor / std`` with SDXL; Stable Diffusion's pipeline does not look at them."""
    mean, std = [0.3, -0.2, 0.5, 0.1], [2.0, 1.5, 0.8, 1.2]
    pipeline = make_pipeline(name)
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = pipeline.vae.encode(images).latent_dist.mode()
    latents = PipelineGenerator(pipeline).latents(images)
    right = raw * 0.7
    if name == "sdxl":
        right = (raw - torch.tensor(mean).reshape(1, 4, 1, 1)) * 0.7 / torch.tensor(std).reshape(1, 4, 1, 1)
    torch.testing.assert_close(latents, right)
    torch.testing.assert_close(decoded(pipeline, latents, monkeypatch), raw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_a_tiny_autoencoder_gives_its_latents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderTiny

    pipeline = make_pipeline(name)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4, scaling_factor=1.5, shift_factor=0.0,
        )  # fmt: skip
    pipeline.register_modules(vae=tiny)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = tiny.encode(images).latents
    latents = PipelineGenerator(pipeline, size=(SIDE, SIDE)).latents(images)
    torch.testing.assert_close(latents, raw * 1.5)
    if name != "flux":
        torch.testing.assert_close(decoded(pipeline, latents, monkeypatch), raw)
