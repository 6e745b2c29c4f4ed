"""A run: recipe in, folder out. Everything is checked before the first byte is written."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stillroom.engine.track import check_installed, names_of
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.files import held, in_use, stay_inside, write, writing
from stillroom.folders.pipelines import sized
from stillroom.folders.shipped import model_folder
from stillroom.method import Method, get_method
from stillroom.recipe import Recipe
from stillroom.surgery.modules import parameter_count
from stillroom.tasks import Task, load_model, make_task
from stillroom.tasks.base import Generator, build_method
from stillroom.training import train


@dataclass
class RunResult:
    """What a run leaves. ``report`` is None on all processes but the first."""

    run_dir: Path
    student: Any
    scores: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None


def run(
    recipe: Recipe, run_dir: str | Path, resume: bool = False, *, teacher: Any = None, data: Any = None
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
        for name in recipe.teacher.split(","):  # what is named by a word alone is shipped
            stay_inside(sized(name.strip())[0])
    track = names_of(recipe.track)
    check_installed(track)
    cls = get_method(recipe.method)
    task = make_task(cls.task, recipe.teacher if teacher is None else teacher)
    task.load(recipe, teacher, data)
    method = build_method(recipe, task)
    trainer = Trainer(method, task.data, recipe.engine, run_dir, resume, recipe_hash=recipe.hash(), track=track)
    if not first:
        return RunResult(run_dir, _train(trainer, task))
    check_space(run_dir, method, recipe)
    with held(run_dir), writing(run_dir, full_disk_only=True):
        if not resume:
            write(run_dir / "recipe.yaml", recipe.to_yaml())
        student = _train(trainer, task)
        return finish(recipe, run_dir, method, task, student)


def _train(trainer: Trainer, task: Task) -> Generator:
    return task.student(*train(trainer))


def finish(recipe: Recipe, run_dir: Path, method: Method, task: Task, student: Generator) -> RunResult:
    """Save and score a trained student and write the report."""
    from stillroom.report import write_report
    from stillroom.report.card import model_card
    from stillroom.report.images import save_grid

    if recipe.engine.parallel != "fsdp":  # else one process has a part of their weights only
        task.made = method.trained_teachers()
    part = run_dir / "student.part"
    shutil.rmtree(part, ignore_errors=True)
    student.save(part, method=recipe.method, recipe_hash=recipe.hash())
    shutil.rmtree(run_dir / "student", ignore_errors=True)
    part.rename(run_dir / "student")

    (run_dir / "samples").mkdir(exist_ok=True)
    names: list[str] = []
    for who, generator in (*task.teachers().items(), ("student", student)):
        names, images = task.rows(generator, recipe.evaluate.seed)
        if images is not None:
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
        "data": task.origin,
        "teachers": list(task.teachers()),
        "rows": names,
        "cost": training_cost(run_dir),
        **task.measure(recipe, student),
    }
    write(run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    write(run_dir / "student" / "README.md", model_card(recipe, result, type(method).paper))
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
def load_generator(folder: str | Path) -> Any:
    """The model in a model folder or a run's ``student/``, or a shipped one by name: an ``ImageClassifier``, a
    ``TextImageGenerator`` where the folder has a text encoder, else an ``ImageGenerator``."""
    folder = model_folder(folder)
    stay_inside(folder)
    if (folder / "recipe.yaml").is_file():
        if not (folder / "student").is_dir():
            raise UserError(f"run {folder} has no student yet", cure=f"finish it: stillroom run --resume {folder}")
        folder = folder / "student"
    return load_model(folder)


# --- checks -----------------------------------------------------------------------------------------------------------
def check_folder(run_dir: Path, resume: bool) -> None:
    """Raises UserError for a folder that is finished, in use, or (without ``resume``) not empty."""
    if run_dir.is_symlink():
        raise UserError(f"run folder {run_dir} is a symbolic link", cure="name the folder that it leads to")
    stay_inside(run_dir)
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
