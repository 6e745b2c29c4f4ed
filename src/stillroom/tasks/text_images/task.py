"""Images from captions: one or several teachers known by their samples, a student that learns from stored ones."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.cache import cache_folder
from stillroom.data.captioned_folders import read_captions
from stillroom.data.scenes.captions import spoken
from stillroom.data.scenes.pictures import SIDE, scene_set
from stillroom.data.source import ASSETS
from stillroom.data.store import MANIFEST
from stillroom.data.synthetic import SynthesisOptions
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError, nearest
from stillroom.folders.shipped import SHIPPED
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.recipe import Recipe
from stillroom.synthesis import plan_hash, synthesize
from stillroom.task import COLUMNS, NOTHING, Card, Model, Rows, Task, model_home, say, sheet, task
from stillroom.tasks.text_images.data import CaptionedData, encode_images, store_data
from stillroom.tasks.text_images.model import EXAMPLES, TextImageGenerator
from stillroom.tasks.words import calls, listed, made_from, teacher_names

SYNTHETIC = ASSETS / "scenes-synthetic"
"""The shipped images of the two shipped teachers."""


@task("text-images")
class TextImages(Task):
    """Teachers draw captions; the student learns from what they drew, and at the end from real pictures. What is drawn
    is said by the method's own ``options.synthesis``."""

    model = TextImageGenerator
    data_names = ("scenes",)
    objects = {
        "teacher": (TextImageGenerator,), "student": (TextImageGenerator, nn.Module), "data": (CaptionedData,)
    }  # fmt: skip
    data: CaptionedData
    space: TextImageSpace

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Such a model, or a pipeline, of which it takes the parts."""
        return (folder / "model_index.json").is_file() or super().reads(folder)

    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        self.sources = self._teachers(recipe.teacher, given.get("teacher"))
        self.space = next(iter(self.sources.values())).space
        for name, source in self.sources.items():
            if source.space.name != self.space.name:
                raise UserError(
                    f"teacher {name!r} has another text encoder or codec ({source.space.name}) than "
                    f"{next(iter(self.sources))!r} ({self.space.name})",
                    cure="store its images with `stillroom synthesize` and give that folder as data",
                )
        self._begin(recipe, given)
        self.data = given["data"] if "data" in given else self._data(recipe)
        self.origin = self.data.origin

    def _begin(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """The network that the student goes on from; None: the method makes a new one."""
        one = given.get("student")
        if one is None and recipe.student:
            if "/" not in recipe.student and recipe.student not in SHIPPED and not Path(recipe.student).exists():
                ours = [name for name, folder in SHIPPED.items() if TextImageGenerator.holds(ASSETS / folder)]
                raise UserError(
                    f"no student {recipe.student!r}{nearest(recipe.student, ours)}",
                    cure=f"give the folder of a run or of a generator, or one of: {', '.join(ours)}",
                )
            one = TextImageGenerator.load(model_home(recipe.student))
        self.start: nn.Module | None = one.network if isinstance(one, TextImageGenerator) else one

    def sketch(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """A batch of latents and captions in the shapes of the teachers' space. Data that are given are not looked
        at."""
        self.sources = self._teachers(recipe.teacher, given.get("teacher"))
        self.space = next(iter(self.sources.values())).space
        self._begin(recipe, given)
        wanted, folder = synthesis_of(recipe), Path(recipe.data).expanduser()
        if "data" not in given and recipe.data != "scenes" and not wanted.images and not (folder / MANIFEST).is_file():
            raise no_store(recipe.data)
        self.data = self._blank(recipe, self.space.shape)
        if wanted.small:
            small = (self.space.codec.channels, *self.space.codec.grid((wanted.small, wanted.small)))
            self.data.parts["small"] = self._blank(recipe, small)
        if (folder / "pairs").is_dir() or (recipe.data == "scenes" and wanted.pairs):
            self.data.parts["pairs"] = self._blank(recipe, self.space.shape)
        self.origin = self.data.origin

    def _blank(self, recipe: Recipe, shape: tuple[int, ...]) -> CaptionedData:
        rows = torch.zeros(recipe.engine.batch, *shape)
        mirrored = rows if synthesis_of(recipe).mirror else None
        text = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in self.space.text.encode([""]).items()}
        which = torch.zeros(len(rows), dtype=torch.long)
        return CaptionedData(rows, [""], which, text, std=rows, mirrored=mirrored, mirrored_std=mirrored)

    def _teachers(self, named: str, given: Any) -> dict[str, TextImageGenerator]:
        if given is not None:
            return {"teacher": given}
        names = listed(named)
        if not names:
            raise UserError("no teacher was named", cure="give one or several: teacher=scenes-sd3,scenes-pixart")
        if len(set(names)) != len(names):
            raise UserError(f"teacher {named!r} names one twice", cure="give each teacher once, separated by commas")
        self.folders = dict(zip(teacher_names(names), map(model_home, names), strict=True))
        return {who: TextImageGenerator.load(folder) for who, folder in self.folders.items()}

    def _data(self, recipe: Recipe) -> CaptionedData:
        wanted, shipped = synthesis_of(recipe), recipe.data == "scenes"
        folder = SYNTHETIC if shipped else Path(recipe.data).expanduser()
        if wanted.images:
            folder = self._synthesised(recipe)
        elif not (folder / MANIFEST).is_file():
            raise no_store(recipe.data)
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
        wanted = synthesis_of(recipe)
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

    def given(self) -> Mapping[str, Any]:
        networks = [teacher.network for teacher in self.sources.values()]
        return {"space": self.space, "student": self.start, "teachers": networks, "classes": []}

    def teachers(self) -> Mapping[str, TextImageGenerator]:
        return self.sources

    def student(self, network: nn.Module, sampler: Sampler) -> TextImageGenerator:
        return TextImageGenerator(network, sampler, self.space)

    def rows(self, model: Model, seed: int, most: int = 80) -> Rows:
        """Captions of each kind of the scenes world where the data are of it, else the data's first ones."""
        known = tuple(self.space.size) == (SIDE, SIDE) and spoken(self.data.captions)
        asked = list(EXAMPLES.values()) if known else list(self.data.captions[: len(EXAMPLES)])
        rows, columns = sheet(len(asked), COLUMNS, most)
        return model.rows(asked[:rows], columns, seed)

    def call(self, model: Any, batch: int) -> Tensor:
        return model.sample([self.data.captions[0]] * batch)

    @classmethod
    def card(cls, recipe: Recipe, result: Mapping[str, Any]) -> Card:
        use = f"images = student.sample({result['rows'][:2]!r}, seed=0)  # [N, C, H, W] in [-1, 1]"
        makes = f"A student of {made_from(recipe.teacher)} that makes an image in {calls(result)}"
        return Card(makes, [use], hub_library="diffusers", tag="text-to-image")


def synthesis_of(recipe: Recipe) -> SynthesisOptions:
    """What the method's options say of the images that teachers draw; of a method without such an option, none."""
    return getattr(recipe.method_options(), "synthesis", SynthesisOptions())


def no_store(data: str, cure: str = "") -> UserError:
    return UserError(
        f"data {data!r} are no stored images of a teacher",
        cure=cure or "make them with `stillroom synthesize`, or let the run make them: options.synthesis.images=10000",
    )
