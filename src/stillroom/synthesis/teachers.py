"""What can be a teacher: a text-to-image model or its folder, a diffusers pipeline, a folder of images with captions,
or any function of captions and a seed. Only its images are used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillroom.data.captioned_folders import FolderTeacher, centre_square
from stillroom.errors import UserError, nearest
from stillroom.folders.pipelines import check_parts, is_pipeline, read_pipeline
from stillroom.folders.shipped import SHIPPED
from stillroom.pictures import PictureGenerator, load_generator
from stillroom.surgery.modules import weights_hash
from stillroom.task import SIDE_FILE, find_model_class, model_home

SEEDS = 2**32


class Drawn(NamedTuple):
    """images: float32 ``[N, 3, H, W]`` in [-1, 1] as drawn (perhaps not finite). seeds, rows: what each was drawn from:
    the seed that the teacher was given, and the row of the batch that shared it."""

    images: Tensor
    seeds: list[int]
    rows: list[int]


class Teacher:
    """A teacher under its name in a plan.

    given: anything that has ``sample_each(captions, seeds)`` or ``sample(captions, seed)``, or is called like the
    latter; each returns ``[N, 3, H, W]`` in [-1, 1]. It may say ``fingerprint`` (the hash of its weights), ``settings``
    (how it samples, a dictionary) and ``check(caption)`` (raises UserError for a caption that it cannot read).
    size: images of another size are cropped to their central square and resized to this; 0 takes them as they are.
    """

    def __init__(self, name: str, given: Any, size: int = 0) -> None:
        self.name, self.given, self.size = name, given, size
        self.folder = given if isinstance(given, FolderTeacher) else None
        self.fingerprint = _fingerprint(given)
        self.settings = dict(getattr(given, "settings", {}))
        if not any(
            callable(way) for way in (getattr(given, "sample_each", None), getattr(given, "sample", None), given)
        ):
            raise UserError(
                f"teacher {name!r} is a {type(given).__name__}",
                cure="give a model's folder, a folder of images, or a function of captions and a seed",
            )

    def describe(self) -> dict[str, Any]:
        """What a plan says of it."""
        return {"fingerprint": self.fingerprint, "settings": self.settings}

    def seeds(self, caption: str, seeds: Sequence[int], mention: int) -> Sequence[int]:
        """The seeds with which it draws the caption when this is named for the ``mention``-th time (from 0). A folder
        has its own: the numbers of the images it has."""
        if self.folder is not None:
            return range(self.folder.count(caption)) if mention == 0 else ()
        return [seed + mention * (max(seeds) + 1) for seed in seeds]

    def check(self, caption: str) -> None:
        if (check := getattr(self.given, "check", None)) is not None:
            check(caption)

    def source(self, caption: str, seed: int) -> str:
        """The file that an image came from, if it came from one."""
        return self.folder.source(caption, seed) if self.folder is not None else ""

    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """One image for each caption and seed. Where the teacher can seed each sample, image i depends on its caption
        and seed alone; else on the whole batch.

        Raises UserError for anything but N colour images.
        """
        rows = list(range(len(captions)))
        if self.folder is not None:
            given, rows = list(seeds), [0] * len(captions)
            images = self.folder.sample_each(captions, seeds)
        elif callable(each := getattr(self.given, "sample_each", None)):
            given = [draw_seed(self.name, [pair]) for pair in zip(captions, seeds, strict=True)]
            rows, images = [0] * len(captions), each(list(captions), given)
        else:
            one = draw_seed(self.name, list(zip(captions, seeds, strict=True)))
            given = [one] * len(captions)
            images = getattr(self.given, "sample", self.given)(list(captions), one)
        return Drawn(self._checked(images, len(captions)), given, rows)

    def _checked(self, images: Any, count: int) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] not in ((count, 3), (count, 1)):
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UserError(
                f"teacher {self.name!r} gave {got} for {count} captions", cure="a teacher gives images [N, 3, H, W]"
            )
        images = images.detach().cpu()
        images = images.float().div(127.5).sub(1.0) if images.dtype == torch.uint8 else images.float()
        images = images.expand(-1, 3, -1, -1)
        if not self.size or images.shape[2:] == (self.size, self.size):
            return images
        finite = images.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        return centre_square(images.where(finite, torch.nan), self.size)


def draw_seed(teacher: str, pairs: Sequence[tuple[str, int]]) -> int:
    """The seed, below 2^32, from which ``teacher`` draws these (caption, seed) pairs in one go."""
    text = json.dumps(["stillroom draw", teacher, *pairs], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % SEEDS


def _fingerprint(given: Any) -> str:
    """The hash of its weights; of a plain function, its name."""
    said = getattr(given, "fingerprint", None)
    if isinstance(said, str):
        return said
    kind = given if hasattr(given, "__qualname__") else type(given)
    return f"{kind.__module__}.{kind.__qualname__}"


def hash_weights(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 over all weights, by name."""
    return hashlib.sha256(
        "".join(f"{name} {weights_hash(part)}\n" for name, part in sorted(modules.items())).encode()
    ).hexdigest()


class ModelTeacher:
    """A finished model that draws captions as a teacher. changed: sampler settings other than its own, e.g.
    ``guidance``."""

    def __init__(self, generator: PictureGenerator, **changed: Any) -> None:
        self.generator, self.changed = generator, changed
        self.settings = generator.changed(**changed).to_dict()
        self.fingerprint = hash_weights(generator.networks)

    def check(self, caption: str) -> None:
        self.generator.check(caption)

    def sample_each(self, captions: list[str], seeds: list[int]) -> Tensor:
        return self.generator.sample(captions, seed=seeds, batch=len(captions), **self.changed)


class PipelineTeacher:
    """Any text-to-image pipeline of diffusers as a teacher. settings: arguments of its call, e.g. ``height``;
    ``guidance`` and ``steps`` stand for its ``guidance_scale`` and ``num_inference_steps``. Each image has a generator
    of its own."""

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        names = {"guidance": "guidance_scale", "steps": "num_inference_steps"}
        self.pipeline, self.settings = pipeline, {names.get(key, key): value for key, value in settings.items()}
        pipeline.set_progress_bar_config(disable=True)
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.fingerprint = hash_weights(parts)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | None = None, **settings: Any) -> PipelineTeacher:
        """From a folder with a ``model_index.json``; safetensors only."""
        from diffusers import DiffusionPipeline

        check_parts(Path(folder))
        pipeline = read_pipeline(DiffusionPipeline, Path(folder))
        return cls(pipeline.to(device or "cpu"), **settings)

    def sample_each(self, captions: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = self.pipeline(prompt=captions, generator=generators, output_type="pt", **self.settings)
        return drawn.images.float() * 2 - 1


# --- by name or folder ------------------------------------------------------------------------------------------------
def as_teachers(
    given: Mapping[str, Any], size: int, settings: Mapping[str, Any], device: torch.device | None = None
) -> dict[str, Teacher]:
    """Teachers by name, from folders or objects. settings: sampler settings for the models among them.

    Raises UserError for a folder that holds neither a model nor images with captions, and for settings out of range.
    """
    for key, value in settings.items():
        if isinstance(value, int | float) and (not math.isfinite(value) or (key == "steps" and value < 1)):
            raise UserError(f"setting {key} is {value}", cure="steps are at least 1, all numbers finite")
    found: dict[str, Teacher] = {}
    for name, one in given.items():
        if isinstance(one, str | Path):
            one = _from_folder(str(one), size, settings, device)
        elif isinstance(one, FolderTeacher):
            one = FolderTeacher(one.folder, size) if size not in (0, one.size) else one
        elif isinstance(one, PictureGenerator) and one.asked_by == "captions":
            one = ModelTeacher(one, **settings)
        found[name] = Teacher(name, one, size)
    return found


def _from_folder(source: str, size: int, settings: Mapping[str, Any], device: torch.device | None) -> Any:
    if not Path(source).expanduser().is_dir() and source not in SHIPPED:
        raise UserError(
            f"no teacher {source!r}{nearest(source, SHIPPED)}",
            cure=f"give a model's folder, a folder of images with captions, or one of: {', '.join(SHIPPED)}",
        )
    folder = model_home(source)
    if is_pipeline(folder) and not (folder / SIDE_FILE).is_file():  # any of diffusers', also of classes unknown here
        return PipelineTeacher.load(folder, device, **settings)
    kind = find_model_class(folder)
    if kind is None:
        return FolderTeacher(folder, size)
    if kind.asked_by != "captions":
        raise UserError(f"teacher {source!r} {kind.does}", cure="give a model that draws captions")
    return ModelTeacher(load_generator(folder).to(device or "cpu"), **settings)
