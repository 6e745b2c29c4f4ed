"""A run: recipe in, folder out. Everything is checked before the first byte is written."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillroom import ending
from stillroom.engine.track import check_installed, names_of
from stillroom.engine.trainer import Trainer
from stillroom.errors import DiskFull, TrainingDiverged, UserError
from stillroom.files import held, in_use, stay_inside, write, writing
from stillroom.folders.pipelines import sized
from stillroom.method import Method, get_method
from stillroom.recipe import Recipe
from stillroom.report.log import RESULT, is_finished
from stillroom.surgery.modules import parameter_count
from stillroom.task import Model, Task, make_task
from stillroom.training import build_method, train


@dataclass
class RunResult:
    """What a run leaves. ``report`` is None on all processes but the first; ``student`` is None where nothing but the
    report was left to do."""

    run_dir: Path
    student: Any = None
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
    noted = Recipe.load(run_dir) if resume and (run_dir / "recipe.yaml").is_file() else recipe
    if noted.folder and not (Path(noted.folder).is_dir() and os.path.samefile(noted.folder, ".")):
        run_dir = run_dir.absolute()
    with noted.place():
        return _run_here(recipe, run_dir, resume, given)


def _run_here(recipe: Recipe, run_dir: Path, resume: bool, given: Mapping[str, Any]) -> RunResult:
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        check_folder(run_dir, resume)
        for name in (*recipe.teacher.split(","), recipe.student):
            stay_inside(sized(name.strip())[0])  # what is named by a word alone is shipped
    if resume and (run_dir / RESULT).is_file():  # all that takes networks is done
        if not first:
            return RunResult(run_dir)
        with held(run_dir), writing(run_dir, full_disk_only=True):
            return _told(run_dir, ending.complete(recipe, run_dir))
    track = names_of(recipe.track)
    check_installed(track)
    cls = get_method(recipe.method)
    task = make_task(cls.task, given.get("teacher", recipe.teacher))
    task.check_kinds(recipe, given)
    task.load(recipe, given)
    method = build_method(recipe, task.given, task.check)
    trainer = Trainer(method, task.data, recipe.engine, run_dir, resume, recipe_hash=recipe.hash(), track=track)
    if not first:
        return RunResult(run_dir, _train(trainer, task, share=False))
    check_space(run_dir, trainer, recipe)
    with held(run_dir), writing(run_dir, full_disk_only=True):
        if not resume:
            write(run_dir / "recipe.yaml", replace(recipe, folder=str(Path.cwd())).to_yaml())
        try:
            if _can_be_tried(trainer):
                ending.try_out(recipe, run_dir, task, trainer.export_role(share=True), method.sampler())
            # what was given as an object stays as it is; all else is ours alone
            student = _train(trainer, task, share="teacher" not in given and "student" not in given)
        except UserError as error:
            waits = resume or isinstance(error, TrainingDiverged | DiskFull)
            if not waits and trainer.step == 0:
                shutil.rmtree(run_dir, ignore_errors=True)  # it was empty: the next try may have it
            raise
        del trainer, method
        gc.collect()  # optimizers and the method's other networks are done with
        return finish(recipe, run_dir, task, student)


def _train(trainer: Trainer, task: Task, share: bool) -> Model:
    network, sampler = train(trainer, share)
    if trainer.config.parallel != "fsdp":  # else one process has a part of their weights only
        task.made = trainer.method.trained_teachers()
    return task.student(network, sampler)


def finish(recipe: Recipe, run_dir: Path, task: Task, student: Model) -> RunResult:
    """The end of a run, after its training."""
    return _told(run_dir, ending.finish(recipe, run_dir, task, student), student)


def _told(run_dir: Path, result: dict[str, Any], student: Any = None) -> RunResult:
    return RunResult(run_dir, student, result.get("scores", {}), result["cost"], run_dir / "report.html")


def _can_be_tried(trainer: Trainer) -> bool:
    """Whether the student can be used as it is before the training: it is whole, and no closed form is to fill it. What
    goes on from a checkpoint was tried when it began."""
    assert trainer.run_dir is not None
    begun = any((trainer.run_dir / "checkpoints").glob("step-*"))
    return not begun and not trainer.sharded and trainer.config.steps > 0 and type(trainer.method).fit is Method.fit


# --- checks -----------------------------------------------------------------------------------------------------------
def check_folder(run_dir: Path, resume: bool) -> None:
    """Raises UserError for a folder that is finished, in use, or (without ``resume``) not empty."""
    if run_dir.is_symlink():
        raise UserError(f"run folder {run_dir} is a symbolic link", cure="name the folder that it leads to")
    stay_inside(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} is a file", cure="choose another --name")
    if is_finished(run_dir):
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


def check_space(run_dir: Path, trainer: Trainer, recipe: Recipe) -> None:
    """Raises UserError if the disk cannot hold the checkpoints, ``keep`` times and one more while it is written
    (trained weights, two moments each, averages), and the student."""
    trained = {id(p): p for player in trainer.players.values() for p in player.trained}
    averages = sum(value.nbytes for average in trainer.averages.values() for value in average.values.values())
    checkpoint = 12 * sum(p.numel() for p in trained.values()) + averages
    need = checkpoint * (recipe.engine.keep + 1) + 4 * parameter_count(trainer.exported()) + 50_000_000
    parent = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(parent).free) < need:
        raise UserError(
            f"disk full: {parent} has {free / 1e6:.0f} MB free, this run needs {need / 1e6:.0f} MB",
            cure="free some space, or lower engine.keep",
        )
