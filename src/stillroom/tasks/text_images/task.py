"""Images from captions: one or several teachers known by their samples, a student that learns from stored ones."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench import find_bench
from stillroom.cache import cache_folder
from stillroom.data.captioned_folders import read_captions
from stillroom.data.scenes.captions import spoken
from stillroom.data.scenes.pictures import scene_set
from stillroom.data.source import ASSETS
from stillroom.data.store import MANIFEST
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.folders.shipped import model_folder
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.recipe import Recipe
from stillroom.surgery.modules import parameter_count
from stillroom.synthesis import plan_hash, synthesize
from stillroom.tasks.base import COLUMNS, Task, sampling_cost, say, teacher_names
from stillroom.tasks.text_images.data import CaptionedData, encode_images, store_data
from stillroom.tasks.text_images.model import TextImageGenerator

EXAMPLES = {
    "single": "a photo of a seven",
    "two": "a two and a five",
    "counting": "three fours",
    "colours": "a red eight",
    "position": "a three to the left of a nine",
    "attribution": "a green one and a purple six",
}
"""One caption of each kind, for sample grids."""

SYNTHETIC = ASSETS / "scenes-synthetic"
"""The shipped images of the two shipped teachers."""


class TextImages(Task):
    """Teachers draw captions; the student learns from what they drew, and at the end from real pictures."""

    data: CaptionedData
    space: TextImageSpace

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        self.sources = self._teachers(recipe.teacher, teacher)
        self.space = next(iter(self.sources.values())).space
        for name, source in self.sources.items():
            if source.space.name != self.space.name:
                raise UserError(
                    f"teacher {name!r} has another text encoder or codec ({source.space.name}) than "
                    f"{next(iter(self.sources))!r} ({self.space.name})",
                    cure="store its images with `stillroom synthesize` and give that folder as data",
                )
        self.data = data if data is not None else self._data(recipe)
        self.origin = self.data.origin

    def sketch(self, recipe: Recipe) -> None:
        """A batch of latents and captions in the shapes of the teachers' space."""
        self.sources = self._teachers(recipe.teacher, None)
        self.space = next(iter(self.sources.values())).space
        wanted, folder = recipe.synthesis, Path(recipe.data).expanduser()
        if recipe.data != "scenes" and not wanted.images and not (folder / MANIFEST).is_file():
            raise _no_store(recipe.data)
        self.data = self._blank(recipe, self.space.shape)
        if wanted.small:
            small = (self.space.codec.channels, *self.space.codec.grid((wanted.small, wanted.small)))
            self.data.parts["small"] = self._blank(recipe, small)
        if (folder / "pairs").is_dir() or (recipe.data == "scenes" and wanted.pairs):
            self.data.parts["pairs"] = self._blank(recipe, self.space.shape)
        self.origin = self.data.origin

    def _blank(self, recipe: Recipe, shape: tuple[int, ...]) -> CaptionedData:
        rows = torch.zeros(recipe.engine.batch, *shape)
        mirrored = rows if recipe.synthesis.mirror else None
        text = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in self.space.text.encode([""]).items()}
        which = torch.zeros(len(rows), dtype=torch.long)
        return CaptionedData(rows, [""], which, text, std=rows, mirrored=mirrored, mirrored_std=mirrored)

    def _teachers(self, named: str, given: Any) -> dict[str, TextImageGenerator]:
        self.folders: dict[str, Path] = {}
        if given is not None:
            return {"teacher": given}
        names = [name.strip() for name in named.split(",")]
        if len(set(names)) != len(names):
            raise UserError(f"teacher {named!r} names one twice", cure="give each teacher once, separated by commas")
        self.folders = dict(zip(teacher_names(names), map(model_folder, names), strict=True))
        return {name: TextImageGenerator.load(folder) for name, folder in self.folders.items()}

    def _data(self, recipe: Recipe) -> CaptionedData:
        wanted, shipped = recipe.synthesis, recipe.data == "scenes"
        folder = SYNTHETIC if shipped else Path(recipe.data).expanduser()
        if wanted.images:
            folder = self._synthesised(recipe)
        elif not (folder / MANIFEST).is_file():
            raise _no_store(recipe.data)
        encode = functools.partial(store_data, space=self.space, cache=cache_folder() / "stores", report=say)
        data = encode(folder, sizes={"small": wanted.small} if wanted.small else {}, mirror=wanted.mirror)
        if (folder / "pairs").is_dir():
            data.parts["pairs"] = encode(folder / "pairs")
        elif shipped and wanted.pairs:
            images, captions = scene_set(wanted.pairs, wanted.seed, "train")
            data.parts["pairs"] = encode_images(images, [caption.text for caption in captions], self.space)
        return data

    def _synthesised(self, recipe: Recipe) -> Path:
        """Data distillation: what the teachers draw for the captions, made once and kept in the cache."""
        wanted = recipe.synthesis
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "several processes cannot share the making of images inside a run",
                cure="make them first (torchrun -m stillroom synthesize), then give that folder as data",
            )
        captions = read_captions(f"scenes:{wanted.images}" if recipe.data == "scenes" else recipe.data, wanted.seed)
        captions = captions._replace(texts=captions.texts[: wanted.images], places=captions.places[: wanted.images])
        plan: dict[str, Any] = {"seeds": (wanted.seed,), "route": wanted.route}
        plan["filters"] = list(dict.fromkeys(["readable", *wanted.filters]))
        folder = cache_folder() / "synthetic" / plan_hash(self.sources, captions, **plan)
        say(f"images by {recipe.teacher}: {folder}")
        synthesize(self.sources, captions, folder, resume=True, **plan)
        return folder

    def networks(self) -> tuple[TextImageSpace]:
        return (self.space,)

    def teachers(self) -> Mapping[str, TextImageGenerator]:
        return self.sources

    def student(self, network: nn.Module, sampler: Sampler) -> TextImageGenerator:
        return TextImageGenerator(network, sampler, self.space)

    def rows(self, generator: TextImageGenerator, seed: int) -> tuple[list[str], Tensor]:
        return caption_rows(generator, () if self.of_scenes else self.data.captions[: len(EXAMPLES)], COLUMNS, seed)

    @property
    def of_scenes(self) -> bool:
        """Whether the data speak the scenes' grammar, so that the bench can judge the pictures."""
        return of_scenes(self.data.captions, self.space.size)

    def measure(self, recipe: Recipe, student: TextImageGenerator) -> dict[str, Any]:
        generators = {"student": student, **self.sources}
        measured: dict[str, Any] = {
            who: {"nfe": generator.sampler.nfe, "params": parameter_count(generator.network)}
            for who, generator in generators.items()
        }
        measured["task"] = "text-image"
        if recipe.evaluate.n == 0:
            return measured
        say("timing student and teachers")
        caption = self.data.captions[0]
        for who, generator in generators.items():
            measured[who] |= sampling_cost(generator, lambda batch, g=generator: g.sample([caption] * batch))
        bench = find_bench("text-images", recipe.data, self.data)
        found = bench.compare(generators, recipe.evaluate.n, recipe.evaluate.seed, self.folders) if bench else {}
        if not found:
            return measured
        return measured | found | {"score_names": {score["key"]: score["name"] for score in found["metrics"]}}


def of_scenes(captions: Sequence[str], size: tuple[int, int]) -> bool:
    """Whether captions and pictures are the scenes bench's, so that it can judge them."""
    return spoken(captions) and tuple(size) == (32, 32)


def _no_store(data: str) -> UserError:
    return UserError(
        f"data {data!r} are no stored images of a teacher",
        cure="make them with `stillroom synthesize`, or let the run make them: synthesis.images=10000",
    )


def caption_rows(generator: TextImageGenerator, captions: Sequence[str], n: int, seed: int) -> tuple[list[str], Tensor]:
    """``n`` samples for each caption (default: one of each kind), as ``(captions, [rows, n, C, H, W])``."""
    chosen = list(captions) or list(EXAMPLES.values())
    images = generator.sample([caption for caption in chosen for _ in range(n)], seed=seed)
    return chosen, images.unflatten(0, (len(chosen), n))
