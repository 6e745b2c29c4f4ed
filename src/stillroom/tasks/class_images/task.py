"""Class-conditional images: one teacher that draws classes (or nothing in particular), data in classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stillroom.data.source import ArrayData, load_data
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler, Sampler
from stillroom.errors import UserError, nearest
from stillroom.folders.shipped import model_folder
from stillroom.recipe import Recipe
from stillroom.surgery.modules import parameter_count
from stillroom.tasks.base import COLUMNS, IN_MEMORY, Task, sampling_cost, say
from stillroom.tasks.class_images.model import ImageGenerator

ROWS = 10
"""Rows of a sample grid: classes, or rows of unconditional samples."""


class ClassImages(Task):
    """One denoiser, sampled by label."""

    data: ArrayData

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        self.data = load_data(recipe.data, "train") if data is None else data
        self.origin = self.data.origin
        self.teacher = as_generator(teacher) if teacher is not None else load_teacher(recipe.teacher)
        check_fit(self.teacher.denoiser, self.data, recipe.teacher, recipe.data)

    def networks(self) -> tuple[Denoiser]:
        return (self.teacher.denoiser,)

    def teachers(self) -> Mapping[str, ImageGenerator]:
        return {"teacher": self.teacher}

    def student(self, network: nn.Module, sampler: Sampler) -> ImageGenerator:
        assert isinstance(network, Denoiser)
        return ImageGenerator(network, sampler, self.teacher.classes or self.data.classes)

    def rows(self, generator: ImageGenerator, seed: int) -> tuple[list[str], Tensor]:
        return class_rows(generator, (), COLUMNS, seed)

    def measure(self, recipe: Recipe, student: ImageGenerator) -> dict[str, Any]:
        generators = {"student": student, "teacher": self.teacher}
        measured: dict[str, Any] = {
            who: {"nfe": generator.sampler.nfe, "params": parameter_count(generator.denoiser)}
            for who, generator in generators.items()
        }
        measured["task"] = "class-image"
        if recipe.evaluate.n == 0:
            return measured
        from stillroom.bench import find_bench

        say("timing student and teacher")
        for who, generator in generators.items():
            measured[who] |= sampling_cost(generator, label_drawer(generator))
        bench = find_bench("class-images", recipe.data, self.data)
        if bench is None:
            return measured
        folders = {"teacher": model_folder(recipe.teacher)} if recipe.teacher != IN_MEMORY else {}
        found = bench.compare(generators, recipe.evaluate.n, recipe.evaluate.seed, folders)
        return measured | found | {"score_names": {score["key"]: score["name"] for score in found["metrics"]}}


def label_drawer(generator: ImageGenerator) -> Any:
    """``draw(batch)``: that many samples, of all classes in turn."""
    classes = class_count(generator.denoiser)

    def draw(batch: int) -> Tensor:
        return generator.sample([i % classes for i in range(batch)] if classes else batch)

    return draw


# --- what goes in -----------------------------------------------------------------------------------------------------
def load_teacher(name: str) -> ImageGenerator:
    """Raises UserError for a teacher that works on latents: the data are pixels in [-1, 1]."""
    folder = model_folder(name)
    if (folder / "vae").is_dir():
        raise UserError(
            f"teacher {name!r} works on the latents of its vae/, the data are pixels",
            cure="choose a pixel-space teacher",
        )
    return ImageGenerator.load(folder)


def as_generator(teacher: Denoiser | ImageGenerator) -> ImageGenerator:
    return teacher if isinstance(teacher, ImageGenerator) else ImageGenerator(teacher, ODESampler())


def class_rows(generator: ImageGenerator, labels: Sequence[str], n: int, seed: int) -> tuple[list[str], Tensor]:
    """``n`` samples for each of the chosen classes (default: all, at most ten), as ``(names, [rows, n, C, H, W])``.

    labels: classes by number or name. A generator without classes gives ten rows without names.
    """
    count = class_count(generator.denoiser)
    classes = list(generator.classes) or [str(i) for i in range(count)]
    if not classes:
        if labels:
            raise UserError("this model takes no labels", cure="leave --labels away")
        images = generator.sample(ROWS * n, seed=seed)
        return [""] * ROWS, images.unflatten(0, (ROWS, n))
    chosen = [_class_index(label, classes) for label in labels] or list(range(min(len(classes), ROWS)))
    images = generator.sample([index for index in chosen for _ in range(n)], seed=seed)
    return [classes[index] for index in chosen], images.unflatten(0, (len(chosen), n))


def _class_index(label: str, classes: list[str]) -> int:
    if label in classes:
        return classes.index(label)
    if label.isdigit() and int(label) < len(classes):
        return int(label)
    raise UserError(
        f"no class {label!r}{nearest(label, classes)}", cure=f"classes: {', '.join(classes)}, or their numbers"
    )


def class_count(denoiser: Denoiser) -> int:
    """Classes of a class-conditional denoiser, whose "unconditional" label comes after the last class; else 0."""
    values = [value for name, value in denoiser.null.items() if "label" in name and isinstance(value, int)]
    return values[0] if values else 0


# --- checks -----------------------------------------------------------------------------------------------------------
def check_fit(denoiser: Denoiser, data: ArrayData, teacher: str, source: str) -> None:
    """Raises UserError where a teacher cannot learn from, or speak about, the data."""
    if tuple(denoiser.shape) != tuple(data.shape):
        raise UserError(
            f"teacher {teacher!r} makes {_size(denoiser.shape)}, but data {source!r} holds {_size(data.shape)}",
            cure="convert the data, or choose a teacher of that size",
        )
    for name in denoiser.null:
        if name not in data.cond:
            raise UserError(
                f"teacher {teacher!r} is conditioned on {name!r}, but data {source!r} has none",
                cure="put the images into one sub-folder per class" if "label" in name else "give data with it",
            )
    if count := class_count(denoiser):
        have = (
            len(data.classes)
            or int(max(int(values.max()) for name, values in data.cond.items() if "label" in name)) + 1
        )
        if have != count:
            raise UserError(
                f"teacher {teacher!r} knows {count} classes, but data {source!r} has {have}",
                cure="give the data the teacher's classes, in its order",
            )


def _size(shape: Sequence[int]) -> str:
    if len(shape) != 3:
        return f"samples of shape {'x'.join(map(str, shape))}"
    channels, height, width = shape
    return f"{width}x{height} images with {channels} channel{'s' if channels > 1 else ''}"
