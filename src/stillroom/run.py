"""A run: recipe in, folder out. Everything is checked before the first byte is written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillroom.data.source import ArrayData, load_data
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler
from stillroom.engine.checkpoint import lock_run, write_atomically, writing
from stillroom.engine.trainer import Trainer, mix
from stillroom.errors import UserError, nearest
from stillroom.method import Method, get_method
from stillroom.models.families import parameter_count
from stillroom.models.folder import ImageGenerator
from stillroom.recipe import Recipe

if TYPE_CHECKING:
    from stillroom.bench.fashion import FashionBench

IN_MEMORY = "(in memory)"
"""Stands in a recipe for a teacher or data that were given as objects."""

ROWS, COLUMNS = 10, 8
"""Size of the sample grids: classes (or rows of unconditional samples) by samples."""


@dataclass
class RunResult:
    """What a run leaves. ``report`` is None on all processes but the first."""

    run_dir: Path
    student: ImageGenerator
    scores: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None


def run(
    recipe: Recipe,
    run_dir: str | Path,
    resume: bool = False,
    *,
    teacher: Denoiser | ImageGenerator | None = None,
    data: ArrayData | None = None,
) -> RunResult:
    """Distil as ``recipe`` says and write everything into ``run_dir``. Under torchrun every process calls this; the
    first one writes.

    teacher, data: objects to use instead of those that the recipe names.

    Raises :class:`UserError` before anything is written if recipe, teacher, data and folder do not fit together, and
    :class:`~stillroom.errors.TrainingDiverged` if training does not hold.
    """
    run_dir = Path(run_dir)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        check_folder(run_dir, resume)
    if data is None:
        data = load_data(recipe.data, "train")
    source = as_generator(teacher) if teacher is not None else load_teacher(recipe.teacher)
    check_fit(source.denoiser, data, recipe.teacher, recipe.data)
    method = get_method(recipe.method)(recipe.method_options(), recipe.lora)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(mix("build", recipe.engine.seed))  # heads and adapters start at random
            method.build(source.denoiser)
    except ValueError as error:
        raise UserError(f"method {recipe.method!r} cannot use teacher {recipe.teacher!r}: {error}") from error
    for role in recipe.lora:
        if getattr(getattr(method, role, None), "adapter", None) is None:
            roles = [name for name, part in method.named_children() if isinstance(part, Denoiser)]
            raise UserError(
                f"recipe key 'lora.{role}': {recipe.method!r} makes no LoRA of that name{nearest(role, roles)}",
                cure=f"its networks: {', '.join(roles)}",
            )
    trainer = Trainer(method, data, recipe.engine, run_dir, resume, recipe_hash=recipe.hash())
    if not first:
        return RunResult(run_dir, _train(trainer, source, data))
    check_space(run_dir, method, recipe)
    with lock_run(run_dir), writing(run_dir):
        if not resume:
            write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
        student = _train(trainer, source, data)
        return finish(recipe, run_dir, method, source, student, data)


def _train(trainer: Trainer, source: ImageGenerator, data: ArrayData) -> ImageGenerator:
    trainer.fit()
    network = trainer.export_role()
    trainer.world.leave()
    assert isinstance(network, Denoiser)
    return ImageGenerator(network, trainer.method.sampler(), source.classes or data.classes)


def finish(
    recipe: Recipe, run_dir: Path, method: Method, source: ImageGenerator, student: ImageGenerator, data: ArrayData
) -> RunResult:
    """Save and score a trained student and write the report."""
    from stillroom.report import write_report
    from stillroom.report.card import model_card
    from stillroom.report.images import save_grid

    part = run_dir / "student.part"
    shutil.rmtree(part, ignore_errors=True)
    student.save(part, method=recipe.method, recipe_hash=recipe.hash())
    shutil.rmtree(run_dir / "student", ignore_errors=True)
    part.rename(run_dir / "student")

    (run_dir / "samples").mkdir(exist_ok=True)
    names: list[str] = []
    for who, generator in (("teacher", source), ("student", student)):
        names, images = class_rows(generator, (), COLUMNS, recipe.evaluate.seed)
        save_grid(images, run_dir / "samples" / f"{who}.png")

    result: dict[str, Any] = {
        "name": run_dir.name,
        "method": recipe.method,
        "recipe_hash": recipe.hash(),
        "seed": recipe.engine.seed,
        "stillroom": _version(),
        "torch": torch.__version__,
        "machine": _machine(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": data.origin,
        "rows": names,
        "cost": training_cost(run_dir),
        **measure(recipe, source, student, data),
    }
    write_atomically(run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    write_atomically(run_dir / "student" / "README.md", model_card(recipe, result, type(method).paper))
    return RunResult(run_dir, student, result.get("scores", {}), result["cost"], write_report(run_dir))


def training_cost(run_dir: Path) -> dict[str, Any]:
    """Steps, images and seconds of training, from the log's last row."""
    from stillroom.report.log import read_metrics

    rows = read_metrics(run_dir)
    last = rows[-1] if rows else {}
    return {key: last[key] for key in ("step", "images", "seconds") if key in last}


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


def _version() -> str:
    from stillroom import __version__

    return __version__


# --- what goes in -----------------------------------------------------------------------------------------------------
def teacher_folder(name: str) -> Path:
    """The folder of a teacher: a bench's shipped one by the bench's name, or the path itself."""
    from stillroom.bench.fashion import FashionBench

    if name == "fashion":
        return FashionBench().teacher_dir
    if "/" not in name and not Path(name).exists():
        raise UserError(f"no teacher {name!r}{nearest(name, ['fashion'])}", cure="give `fashion`, or a model's folder")
    return Path(name).expanduser()


def load_teacher(name: str) -> ImageGenerator:
    """Raises UserError for a teacher that works on latents: the data are pixels in [-1, 1]."""
    folder = teacher_folder(name)
    if (folder / "vae").is_dir():
        raise UserError(
            f"teacher {name!r} works on the latents of its vae/, the data are pixels",
            cure="choose a pixel-space teacher",
        )
    return ImageGenerator.load(folder)


def as_generator(teacher: Denoiser | ImageGenerator) -> ImageGenerator:
    return teacher if isinstance(teacher, ImageGenerator) else ImageGenerator(teacher, ODESampler())


def load_generator(folder: str | Path) -> ImageGenerator:
    """A model folder, or a run's ``student/``."""
    folder = Path(folder)
    if (folder / "recipe.yaml").is_file():
        if not (folder / "student").is_dir():
            raise UserError(f"run {folder} has no student yet", cure=f"finish it: stillroom run --resume {folder}")
        folder = folder / "student"
    return ImageGenerator.load(folder)


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
def check_folder(run_dir: Path, resume: bool) -> None:
    """Raises UserError for a folder that is finished, in use, or (without ``resume``) not empty."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} is a file", cure="choose another --name")
    if (run_dir / "result.json").is_file():
        raise UserError(f"run {run_dir} is already finished", cure="choose another --name, or delete the folder")
    if in_use(run_dir):
        raise UserError(f"run folder {run_dir} is in use", cure="wait for it, or choose another --name")
    if resume and not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"there is no run to resume in {run_dir}", cure="start it without --resume")
    if not resume and run_dir.is_dir() and any(run_dir.iterdir()):
        cure = f"carry on with `stillroom run --resume {run_dir}`, or choose another --name"
        if not (run_dir / "recipe.yaml").is_file():
            cure = "choose another --name"
        raise UserError(f"run folder {run_dir} is not empty", cure=cure)
    parent = next(parent for parent in run_dir.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(run_dir if run_dir.is_dir() else parent, os.W_OK):
        raise UserError(f"cannot write to {parent}", cure="run stillroom in a folder of your own")


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


def check_space(run_dir: Path, method: Method, recipe: Recipe) -> None:
    """Raises UserError if the disk cannot hold the checkpoints: weights and two moments of every network, ``keep``
    times and one more while it is written."""
    need = 12 * parameter_count(method) * (recipe.engine.keep + 1) + 50_000_000
    parent = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(parent).free) < need:
        raise UserError(
            f"disk full: {parent} has {free / 1e6:.0f} MB free, this run needs {need / 1e6:.0f} MB",
            cure="free some space, or lower engine.keep",
        )


def in_use(run_dir: Path) -> bool:
    """Whether a living process holds the run's folder."""
    path = run_dir / ".lock"
    if not path.is_file():
        return False
    with path.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# --- what comes out ---------------------------------------------------------------------------------------------------
def measure(recipe: Recipe, source: ImageGenerator, student: ImageGenerator, data: ArrayData) -> dict[str, Any]:
    """Costs of a sample and, where the data is a bench, scores of student, teacher and real images."""
    measured: dict[str, Any] = {
        who: {"nfe": generator.sampler.nfe, "params": parameter_count(generator.denoiser)}
        for who, generator in (("student", student), ("teacher", source))
    }
    if recipe.evaluate.n == 0:
        return measured
    from stillroom.bench.fashion import SHAPE, FashionBench

    _say("timing student and teacher")
    for who, generator in (("student", student), ("teacher", source)):
        measured[who] |= sampling_cost(generator)
    if recipe.data == IN_MEMORY or data.shape != SHAPE or len(data.classes) < 2:
        return measured
    bench = FashionBench(recipe.data, report=_say)
    n = min(recipe.evaluate.n, bench.train.n)
    _say(f"scoring {n:,} samples")
    student_scores = score(bench, student, n, recipe.evaluate.seed)
    scores = {
        "student": student_scores,
        "teacher": teacher_scores(bench, source, recipe.teacher, n, recipe.evaluate.seed),
        "floor": bench.floor(n),
    }
    told = ("n", "extractor", "reference", "names")
    return measured | {
        "bench": {key: student_scores[key] for key in ("n", "extractor", "reference")},
        "score_names": student_scores["names"],
        "scores": {who: {k: v for k, v in values.items() if k not in told} for who, values in scores.items()},
    }


def score(bench: FashionBench, generator: ImageGenerator, n: int, seed: int) -> dict[str, Any]:
    labels = bench.labels(n)
    return bench.score(generator.sample(labels if class_count(generator.denoiser) else n, seed=seed), labels)


def teacher_scores(bench: FashionBench, teacher: ImageGenerator, name: str, n: int, seed: int) -> dict[str, Any]:
    """A teacher takes tens of evaluations per sample, so its scores come from its own card where that has them, and are
    else kept in the cache, by its very files."""
    from stillroom.bench.fashion import cache_folder

    if name == IN_MEMORY:
        return score(bench, teacher, n, seed)
    folder = teacher_folder(name)
    expected = {"n": n, "extractor": bench.extractor.name, "reference": bench.test.origin}
    for row in _teacher_card(folder).get("samplers", ()):
        known = row["scores"]
        if row["sampler"] == teacher.sampler.to_dict() and all(known[key] == value for key, value in expected.items()):
            return dict(known)
    digest = hashlib.sha256(
        f"{bench.train.fingerprint} {bench.test.fingerprint} {bench.extractor.name} {n} {seed}".encode()
    )
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(path.read_bytes())
    path = cache_folder() / "teachers" / f"{digest.hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    _say(f"scoring the teacher (once; {teacher.sampler.nfe} network evaluations for each of {n:,} samples)")
    scores = score(bench, teacher, n, seed)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not results
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(scores))
    return scores


def _teacher_card(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "card.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def bench_card(name: str) -> str:
    """Markdown: what a bench is made of, its floor, and the scores of its shipped teacher by sampler."""
    from stillroom.bench.fashion import FashionBench

    bench = FashionBench(name, report=_say)
    rows = {}
    for row in _teacher_card(bench.teacher_dir).get("samplers", ()) if name == "fashion" else ():
        sampler = row["sampler"]
        words = [str(sampler.get("solver", sampler["name"])), f"guidance {sampler['guidance']:g}", f"{row['nfe']} NFE"]
        rows[f"teacher, {', '.join(words)}"] = row["scores"]
    return bench.bench_card(rows)


def sampling_cost(generator: ImageGenerator) -> dict[str, Any]:
    """``latency_ms`` (median of 30 calls, by batch size) and ``macs`` per sample."""
    from stillroom.evaluation import cost

    classes = class_count(generator.denoiser)

    def draw(batch: int) -> Tensor:
        return generator.sample([i % classes for i in range(batch)] if classes else batch)

    timings = cost.latency(draw, batches=(1, 32))
    return {"latency_ms": {str(t.batch): round(t.median_ms, 3) for t in timings}, "macs": cost.macs(lambda: draw(1))}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
