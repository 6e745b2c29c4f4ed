"""A run: recipe in, folder out. Everything is checked before the first byte is written."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stillroom.bench import find_bench
from stillroom.engine.track import check_installed, names_of
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.files import held, in_use, stay_inside, write, writing
from stillroom.folders.pipelines import sized
from stillroom.method import Method, get_method
from stillroom.recipe import Recipe
from stillroom.surgery.modules import parameter_count
from stillroom.task import Model, Rows, Task, make_task
from stillroom.training import build_method, train


@dataclass
class RunResult:
    """What a run leaves. ``report`` is None on all processes but the first."""

    run_dir: Path
    student: Any
    scores: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None


def run(recipe: Recipe, run_dir: str | Path, resume: bool = False, **given: Any) -> RunResult:
    """Distil as ``recipe`` says and write everything into ``run_dir``. Under torchrun every process calls this; the
    first one writes.

    given: ``teacher``, ``student``, ``data``: objects to use instead of those that the recipe names.

    Raises :class:`UserError` before anything is written if recipe, teacher, data and folder do not fit together, and
    :class:`~stillroom.errors.TrainingDiverged` if training does not hold.
    """
    run_dir = Path(run_dir)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        check_folder(run_dir, resume)
        for name in filter(None, map(str.strip, (*recipe.teacher.split(","), recipe.student))):
            stay_inside(sized(name)[0])  # what is named by a word alone is shipped
    track = names_of(recipe.track)
    check_installed(track)
    cls = get_method(recipe.method)
    task = make_task(cls.task, given.get("teacher", recipe.teacher))
    task.check_kinds(recipe, given)
    task.load(recipe, given)
    method = build_method(recipe, task.given, task.check)
    trainer = Trainer(method, task.data, recipe.engine, run_dir, resume, recipe_hash=recipe.hash(), track=track)
    if not first:
        return RunResult(run_dir, _train(trainer, task))
    check_space(run_dir, method, recipe)
    with held(run_dir), writing(run_dir, full_disk_only=True):
        if not resume:
            write(run_dir / "recipe.yaml", recipe.to_yaml())
        student = _train(trainer, task)
        return finish(recipe, run_dir, method, task, student)


def _train(trainer: Trainer, task: Task) -> Model:
    return task.student(*train(trainer))


def finish(recipe: Recipe, run_dir: Path, method: Method, task: Task, student: Model) -> RunResult:
    """Save and score a trained student and write the report."""
    from stillroom.report import write_report
    from stillroom.report.card import model_card

    if recipe.engine.parallel != "fsdp":  # else one process has a part of their weights only
        task.made = method.trained_teachers()
    part = run_dir / "student.part"
    shutil.rmtree(part, ignore_errors=True)
    student.save(part, task=student.task, method=recipe.method, recipe_hash=recipe.hash())
    shutil.rmtree(run_dir / "student", ignore_errors=True)
    part.rename(run_dir / "student")

    everyone = {**task.teachers(), "student": student}
    shown = show(run_dir, {who: task.rows(model, recipe.evaluate.seed) for who, model in everyone.items()})
    bench = find_bench(task.name, recipe.data, task.data) if recipe.evaluate.n else None
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
        "things": task.things,
        "teachers": list(task.teachers()),
        **shown,
        "cost": training_cost(run_dir),
        **task.measure(recipe, student, bench),
    }
    write(run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    write(run_dir / "student" / "README.md", model_card(recipe, result, type(method).paper))
    return RunResult(run_dir, student, result.get("scores", {}), result["cost"], write_report(run_dir))


def show(run_dir: Path, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Write everybody's pictures into ``samples/``, and say what the rows are called and what texts they hold."""
    from stillroom.report.images import save_grid

    (run_dir / "samples").mkdir(exist_ok=True)
    for who, found in rows.items():
        if found.images is not None:
            save_grid(found.images, run_dir / "samples" / f"{who}.png")
    texts = {who: [list(line) for line in found.texts] for who, found in rows.items() if found.texts}
    names = [list(found.names) for found in rows.values()][-1]
    return {"rows": names} | ({"texts": texts} if texts else {})


def training_cost(run_dir: Path) -> dict[str, Any]:
    """Steps, images and seconds of training, from the log's last row."""
    from stillroom.report.log import read_metrics

    rows = read_metrics(run_dir)
    last = rows[-1] if rows else {"step": 0, "images": 0, "seconds": 0.0}
    return {key: last[key] for key in ("step", "images", "seconds") if key in last}


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


def _version() -> str:
    try:
        return version("stillroom")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


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
