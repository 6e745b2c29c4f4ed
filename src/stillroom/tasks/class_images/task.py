"""Class-conditional images: one teacher that draws classes (or nothing in particular), data in classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from stillroom.bench.fashion import FashionBench

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
        from stillroom.bench.fashion import SHAPE, FashionBench

        say("timing student and teacher")
        for who, generator in generators.items():
            measured[who] |= sampling_cost(generator, label_drawer(generator))
        if recipe.data == IN_MEMORY or self.data.shape != SHAPE or len(self.data.classes) < 2:
            return measured
        bench = FashionBench(recipe.data, report=say)
        n = min(recipe.evaluate.n, bench.train.n)
        say(f"scoring {n:,} samples")
        student_scores = score(bench, student, n, recipe.evaluate.seed)
        taught, earlier = teacher_scores(bench, self.teacher, recipe.teacher, n, recipe.evaluate.seed)
        scores = {"student": student_scores, "teacher": taught, "floor": bench.floor(n)}
        told = ("n", "extractor", "reference", "names")
        about = {key: student_scores[key] for key in ("n", "extractor", "reference")}
        return measured | {
            "bench": about | {"earlier": ["teacher"] if earlier else []},
            "score_names": student_scores["names"],
            "scores": {who: {k: v for k, v in values.items() if k not in told} for who, values in scores.items()},
        }


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


def score(bench: FashionBench, generator: ImageGenerator, n: int, seed: int) -> dict[str, Any]:
    labels = bench.labels(n)
    return bench.score(generator.sample(labels if class_count(generator.denoiser) else n, seed=seed), labels)


def teacher_scores(
    bench: FashionBench, teacher: ImageGenerator, name: str, n: int, seed: int
) -> tuple[dict[str, Any], bool]:
    """The scores, and whether they were measured earlier: a teacher takes tens of evaluations per sample, so they come
    from its own card where that has them, and are else kept in the cache, by its very files."""
    from stillroom.cache import kept_json

    if name == IN_MEMORY:
        return score(bench, teacher, n, seed), False
    folder = model_folder(name)
    expected = {"n": n, "extractor": bench.extractor.name, "reference": bench.test.origin}
    for row in _teacher_card(folder).get("samplers", ()):
        known = row["scores"]
        if row["sampler"] == teacher.sampler.to_dict() and all(known[key] == value for key, value in expected.items()):
            return dict(known), True
    digest = hashlib.sha256(
        f"{bench.train.fingerprint} {bench.test.fingerprint} {bench.extractor.name} {n} {seed}".encode()
    )
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(path.read_bytes())
    measured = False

    def measure() -> dict[str, Any]:
        nonlocal measured
        measured = True
        say(f"scoring the teacher (once; {teacher.sampler.nfe} network evaluations for each of {n:,} samples)")
        return score(bench, teacher, n, seed)

    scores = kept_json("teachers/scores", measure, parts=[digest.hexdigest()])
    return scores, not measured


def _teacher_card(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "card.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def bench_card(name: str) -> str:
    """Markdown: what a bench is made of, its floor, and the scores of its shipped teacher by sampler."""
    from stillroom.bench.fashion import FashionBench

    bench = FashionBench(name, report=say)
    rows = {}
    for row in _teacher_card(bench.teacher_dir).get("samplers", ()) if name == "fashion" else ():
        sampler = row["sampler"]
        words = [str(sampler.get("solver", sampler["name"])), f"guidance {sampler['guidance']:g}", f"{row['nfe']} NFE"]
        rows[f"teacher, {', '.join(words)}"] = row["scores"]
    return bench.bench_card(rows)
