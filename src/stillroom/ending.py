"""The end of a run, after its training: steps that are each done once and kept, so that a run that was stopped between
two of them goes on with the next; and a trial of them all, before the training."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from stillroom.bench import find_bench
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.engine.progress import showing
from stillroom.errors import DiskFull, UserError
from stillroom.files import refusal, write
from stillroom.folders.weights import weights_unwritten
from stillroom.method import get_method
from stillroom.parsing import parse_json
from stillroom.pictures import REAL_SIZE, PictureGenerator
from stillroom.recipe import Recipe
from stillroom.report.log import ENDING, RESULT, is_finished, read_metrics, read_result
from stillroom.surgery.skeleton import weights_unread
from stillroom.task import Model, Rows, Task, model_class, say

LARGE = 30_000_000
"""Weights from which on a student is tried without writing them."""
WIDE = 64 * 64
"""Places of a sample above which no sheet is drawn for the trial: a small network too takes long over a large one."""
T = TypeVar("T")


class Ending:
    """What has been done of the end of a run, in a file of its folder until all is done."""

    def __init__(self, run_dir: Path) -> None:
        self.path, self.done = run_dir / ENDING, {}
        if self.path.is_file():
            with contextlib.suppress(OSError, ValueError, TypeError):  # then all of it is done again
                self.done = dict(parse_json(self.path.read_bytes(), nan=True))

    def once(self, step: str, act: Callable[[], Any]) -> Any:
        """What ``act`` gives, as JSON can hold it; kept, so that a resumed run does not ask again."""
        if step not in self.done:
            self.done[step] = act()
            write(self.path, json.dumps(self.done))
        return self.done[step]


def finish(recipe: Recipe, run_dir: Path, task: Task, student: Model) -> dict[str, Any]:
    """Save, draw, time and score a trained student, and write result, model card and report. Steps that were done
    before are not done again. Gives what is in ``result.json``."""
    ending = Ending(run_dir)
    ending.once("student", lambda: save(recipe, run_dir, student))
    teachers, left_out = shown_teachers(recipe, task)
    everyone = {**teachers, "student": student}
    also = other_ways(recipe, task, student)
    drawn = {**everyone, **(also if recipe.evaluate.samples else {})}
    shown = {who: ending.once(f"sheet of {who}", _sheet(recipe, run_dir, task, who, m)) for who, m in drawn.items()}
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
        "rows": next((found["rows"] for found in reversed(shown.values()) if found["rows"]), []),
        "cost": training_cost(run_dir),
        "task": task.name,
    }
    if texts := {who: found["texts"] for who, found in shown.items() if found["texts"]}:
        result["texts"] = texts
    if left_out:
        result["left_out"] = left_out
    if also:
        result["also"] = {who: model.nfe for who, model in also.items()}
    for who, model in {"student": student, **task.teachers()}.items():
        result[who] = {"nfe": model.nfe, "params": model.parameters}
        if recipe.evaluate.n and who in everyone:
            result[who] |= ending.once(f"cost of {who}", lambda who=who, model=model: _cost(task, who, model))
    result |= ending.once("facts", lambda: task.facts(recipe, student))
    if recipe.evaluate.n:
        result |= ending.once("scores", lambda: _scores(recipe, task, {"student": student, **teachers}))
    write(run_dir / RESULT, json.dumps(result, indent=2) + "\n")
    return complete(recipe, run_dir)


def complete(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Model card and report, from ``result.json``, whose content is given."""
    from stillroom.report import write_report
    from stillroom.report.card import model_card

    result = read_result(run_dir)
    write(run_dir / "student" / "README.md", model_card(recipe, result, get_method(recipe.method).paper))
    write_report(run_dir)
    (run_dir / ENDING).unlink(missing_ok=True)
    assert is_finished(run_dir)
    return result


# --- the steps --------------------------------------------------------------------------------------------------------
def save(recipe: Recipe, run_dir: Path, student: Model) -> bool:
    """The student's folder, written aside and renamed."""
    part = run_dir / "student.part"
    shutil.rmtree(part, ignore_errors=True)
    student.save(part, task=student.task, method=recipe.method, recipe_hash=recipe.hash())
    shutil.rmtree(run_dir / "student", ignore_errors=True)
    part.rename(run_dir / "student")
    return True


def shown_teachers(recipe: Recipe, task: Task) -> tuple[dict[str, Model], dict[str, float]]:
    """The teachers that are drawn, timed and scored; and those that are not, with the floating-point operations of one
    of their answers."""
    asked, teachers = recipe.evaluate.teachers, dict(task.teachers())
    if asked == "always" or not (recipe.evaluate.samples or recipe.evaluate.n):
        return teachers, {}
    sizes = {who: float(teacher.flops) for who, teacher in teachers.items()}
    left = {who: size for who, size in sizes.items() if asked == "never" or size > REAL_SIZE}
    return {who: teacher for who, teacher in teachers.items() if who not in left}, left


def other_ways(recipe: Recipe, task: Task, student: Model) -> dict[str, Model]:
    """The same student run in the other ways that its method names, without those that this kind of model cannot be run
    in."""
    network, found = student.module, {}
    if not isinstance(network, Denoiser):
        return {}
    for name, sampler in get_method(recipe.method).also(recipe.method_options(), network.process).items():
        with contextlib.suppress(UserError):
            found[f"student, {name}"] = task.student(network, sampler)
    return found


def _sheet(recipe: Recipe, run_dir: Path, task: Task, who: str, model: Model) -> Callable[[], dict[str, Any]]:
    def draw() -> dict[str, Any]:
        found = Rows()
        if recipe.evaluate.samples:
            with showing(f"drawing by {who}"):
                found = task.rows(model, recipe.evaluate.seed, recipe.evaluate.samples)
        return write_sheet(run_dir, who, found)

    return draw


def write_sheet(run_dir: Path, who: str, found: Rows) -> dict[str, Any]:
    """Write somebody's pictures into ``samples/``, and say what the rows are called and what texts they hold."""
    from stillroom.report.images import save_grid

    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    if found.images is not None:
        write(run_dir / "samples" / f"{who}.png", lambda aside: save_grid(found.images, aside))
    return {"rows": list(found.names), "texts": [list(line) for line in found.texts]}


def _cost(task: Task, who: str, model: Model) -> dict[str, Any]:
    say(f"timing {who}")
    with showing(f"timing {who}"):
        return task.cost(model)


def _scores(recipe: Recipe, task: Task, everyone: Mapping[str, Model]) -> dict[str, Any]:
    with showing("scoring"):
        return task.scores(recipe, everyone, find_bench(task.name, recipe.data, task.data))


def training_cost(run_dir: Path) -> dict[str, Any]:
    """Steps, images and seconds of training, from the log's last row."""
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


# --- the trial --------------------------------------------------------------------------------------------------------
def try_out(recipe: Recipe, run_dir: Path, task: Task, network: nn.Module, sampler: Sampler) -> None:
    """Do all that the end of a run will do, once and small, with the network as it stands before the training: nobody
    is to learn of a mistake when the training is over. Leaves nothing, and draws none of the training's random numbers.

    network: shares its weights with the one that will be trained, nothing else. Of students above :data:`LARGE` no
    weights are written, and the folder is read again from its configs. Raises UserError, naming what fails.
    """
    began, folder = time.monotonic(), run_dir / "trial"
    student: Model | None = None

    def build() -> None:
        nonlocal student
        student = task.student(network, sampler)

    def draw() -> None:
        assert student is not None
        if not (recipe.evaluate.samples or recipe.evaluate.n):
            return
        if recipe.evaluate.samples and isinstance(student, PictureGenerator) and not (large or wide):
            write_sheet(folder, "student", task.rows(student, recipe.evaluate.seed, 1))
        else:
            task.brief_call(student)
        teachers, left_out = shown_teachers(recipe, task)
        for teacher in teachers.values():
            task.brief_call(teacher)
        for who, size in left_out.items() if recipe.evaluate.teachers == "auto" else ():
            say(
                f"{who} will be neither drawn nor timed nor scored: one answer takes {size / 1e12:.3g} TFLOP "
                "(evaluate.teachers=always asks for it)"
            )

    def score() -> None:
        assert student is not None
        task.facts(recipe, student)
        if recipe.evaluate.n:
            task.brief_scores(recipe, student, find_bench(task.name, recipe.data, task.data))

    def keep() -> None:
        assert student is not None
        with weights_unwritten() if large else nullcontext():
            student.save(folder, task=student.task, method=recipe.method, recipe_hash=recipe.hash())

    def read() -> None:
        assert student is not None
        if not student.reloads:
            return
        reading: AbstractContextManager[Any] = weights_unread() if large else nullcontext()
        with reading:
            model_class(folder).load(folder)

    large = sum(p.numel() for p in network.parameters()) > LARGE
    wide = isinstance(network, Denoiser) and math.prod(network.shape[1:]) > WIDE
    steps = {"be made a model": build, "be drawn": draw, "be scored": score, "be saved": keep, "be read again": read}
    with torch.random.fork_rng():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            for what, act in steps.items():
                _tried(what, act, _switch(what, recipe))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"tried the run's end, before its training: {time.monotonic() - began:.1f} s")


def _switch(what: str, recipe: Recipe) -> str:
    """Settings that leave this step of a run's end away, as a cure says them; empty where none does."""
    asked = {"be drawn": ("samples", "n"), "be scored": ("n",)}.get(what, ())
    return " ".join(f"evaluate.{name}=0" for name in asked if getattr(recipe.evaluate, name))


def _tried(what: str, act: Callable[[], T], switch: str = "") -> T:
    try:
        return act()
    except UserError:
        raise
    except Exception as problem:  # of whatever networks and folders come, nothing may be lost to it later
        if isinstance(refusal(problem, Path()), DiskFull):
            raise  # the run waits for room, and is resumed
        first = next(iter(str(problem).strip().splitlines()), "")[:200]
        raise UserError(
            f"the student of this run could not {what} ({type(problem).__name__}: {first})",
            cure="nothing was trained; choose another teacher or data"
            + (f", or switch off what fails ({switch})" if switch else ""),
        ) from problem
