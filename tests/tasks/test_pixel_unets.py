"""What diffusers' own training of pixel models leaves: one UNet and its scheduler, with classes and without, as a saved
pipeline and as bare folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stillroom as sr
from stillroom.data.source import ArrayData
from stillroom.diffusion.process import VP
from stillroom.errors import UserError
from stillroom.evaluation.cost import forward_flops
from stillroom.folders.denoisers import load_denoiser
from stillroom.recipe import Recipe
from stillroom.task import find_model_class
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.class_images.task import ClassImages
from stillroom.tasks.pipelines.task import Pipelines
from stillroom.training import build_method

CLASSES = ["bar", "cross", "dot"]
KINDS: dict[str, dict[str, Any]] = {"conditional": {"num_class_embeds": 4}, "unconditional": {}}


def saved(folder: Path, kind: str, index: bool = True, **more: Any) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            **KINDS[kind] | more,
        )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    if not index:
        (folder / "model_index.json").unlink()
    return folder


def pictures() -> ArrayData:
    labels = torch.arange(12) % 3
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArrayData(images, {"label": labels}, CLASSES)


def built(folder: Path, *changes: str) -> tuple[ClassImages, Any]:
    recipe = Recipe.load("dmd2", ["engine.batch=4", *changes], teacher=str(folder), data="pictures")
    task = ClassImages()
    task.load(recipe, {"data": pictures()})
    return task, build_method(recipe, task.given, task.check)


PLAIN = ("options.gan_weight=0", "options.guidance=1.0")


@pytest.mark.parametrize("index", [True, False], ids=["pipeline", "bare"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixel_unets_are_teachers(kind: str, index: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", kind, index)
    assert not Pipelines.takes(str(folder))
    assert find_model_class(folder) is ImageGenerator
    task, method = built(folder, *PLAIN)
    assert task.teacher.denoiser.process == VP("linear", 1000, 1e-4, 0.02)
    batch = {**task.data.batch(0, 0, 4)}
    student = task.student(method.student, method.sampler())
    rows = task.rows(student, 0)
    if kind == "conditional":
        assert student.choices == CLASSES
        assert rows.names == CLASSES
        assert batch["cond"]["label"].shape == (4,)
    else:
        assert student.choices == []
        assert not batch["cond"]
    assert bool(torch.isfinite(rows.images).all())
    assert bool(torch.isfinite(task.rows(task.teacher, 0, 4).images).all())
    student.save(tmp_path / "student")
    again = ImageGenerator.load(tmp_path / "student")
    assert torch.equal(again.rows(n=1).images, student.rows(n=1).images)


@pytest.mark.parametrize("kind", KINDS)
def test_their_predictions_are_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    folder = saved(tmp_path, kind)
    denoiser, theirs = load_denoiser(folder), DDPMPipeline.from_pretrained(folder)
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), torch.tensor([2, 3])
    given: dict[str, Tensor] = {"class_labels": label} if kind == "conditional" else {}
    with torch.no_grad():
        eps = theirs.unet(x, t, **given).sample
        answer = denoiser(x, t.float(), {"label": label})
    torch.testing.assert_close(answer.eps, eps)
    x0 = [theirs.scheduler.step(e, int(s), one).pred_original_sample for e, s, one in zip(eps, t, x, strict=True)]
    torch.testing.assert_close(answer.x0.clamp(-1, 1), torch.stack(x0), rtol=1e-4, atol=1e-4)


def test_the_class_that_means_none_is_asked_for_in_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path, "conditional")
    _, method = built(folder)
    x, t, cond = torch.zeros(2, 3, 8, 8), torch.full((2,), 5.0), {"label": torch.tensor([0, 3])}
    assert method.discriminator.logits(method.fake, x, t, cond).shape[0] == 2  # which needs no such class
    assert forward_flops(method.teacher) > 10 * sum(p.numel() for p in method.teacher.parameters())
    wanted = ["engine.batch=4", "options.guidance=1.0"]
    assert sr.plan("dmd2", teacher=str(folder), data=pictures(), overrides=wanted).phases[-1].name == "draw"
    with pytest.raises(UserError, match=r"unconditional value for: label.*stillroom\.json.*guidance=1\.0"):
        method.teacher(x, t, cond, 2.0)
    (folder / "stillroom.json").write_text(json.dumps({"null": {"label": 3}}))
    task, _ = built(folder)
    assert task.teacher.denoiser.null == {"label": 3}


def test_labels_of_some_classes_mean_the_network_s_by_number(tmp_path: Path) -> None:
    folder = saved(tmp_path, "conditional", num_class_embeds=7)
    images = pictures()
    data = ArrayData(images.array, images.cond, ["0", "2", "5"])
    task, recipe = ClassImages(), Recipe.load("dmd2", [*PLAIN], teacher=str(folder), data="pictures")
    task.load(recipe, {"data": data})
    assert task.data.labels.tolist() == [0, 2, 5] * 4
    assert task.data.classes == task.teacher.choices == ["0", "1", "2", "3", "4", "5"]
    (folder / "stillroom.json").write_text(json.dumps({"null": {"label": 6}}))
    with pytest.raises(UserError, match=r"knows 6 classes.*has 3"):
        ClassImages().load(recipe, {"data": data})


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class_embed_type 'identity'"):
        load_denoiser(saved(tmp_path / "identity", "unconditional", class_embed_type="identity"))
    folder = saved(tmp_path / "few", "unconditional", num_class_embeds=2)
    with pytest.raises(UserError, match=r"knows 2 classes.*has 3"):
        built(folder, *PLAIN)
    task = ClassImages()
    recipe = Recipe.load("dmd2", [*PLAIN], teacher=str(folder), data="pictures")
    with pytest.raises(UserError, match="conditioned on 'label'"):
        task.load(recipe, {"data": ArrayData(pictures().array)})


def test_names_that_cannot_be_told_from_labels_are_refused_until_they_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, "conditional", num_class_embeds=5)
    task, recipe = ClassImages(), Recipe.load("dmd2", [*PLAIN], teacher=str(folder), data="pictures")
    with pytest.raises(UserError, match=r'5 labels by number alone.*write \{"classes"'):
        task.load(recipe, {"data": pictures()})
    labels = ["0", "dot", "2", "cross", "bar"]
    (folder / "stillroom.json").write_text(json.dumps({"classes": labels}))
    task.load(recipe, {"data": pictures()})
    assert task.data.labels.tolist() == [4, 3, 1] * 4
    assert task.data.classes == labels
