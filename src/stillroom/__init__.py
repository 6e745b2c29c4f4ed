"""stillroom: a teacher goes in, a smaller or faster student comes out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stillroom import methods
from stillroom.errors import TrainingDiverged, UserError

if TYPE_CHECKING:
    from stillroom.exports import Exported
    from stillroom.method import Method
    from stillroom.planning import Plan
    from stillroom.task import Model

try:
    __version__ = version("stillroom")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["TrainingDiverged", "UserError", "distill", "export", "load", "methods", "plan"]


def distill(
    method: str,
    *,
    teacher: Any = None,
    student: Any = None,
    data: Any = None,
    steps: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Model:
    """Distil a teacher and return the finished student.

    method: slug of a method or shipped recipe, or a recipe file.
    teacher: name of a bench's teacher, a model folder, or a :class:`~stillroom.diffusion.denoiser.Denoiser`.
    student: what is trained: a network by name, a model folder, a run, or an object; by default a copy of the teacher.
    data: name of a data set, a folder, or an :class:`~stillroom.data.source.ArrayData`.
    run_dir: where the run is written, by default ``runs/<name>``.
    options: the method's own options.

    Raises :class:`UserError` if these do not fit together and :class:`TrainingDiverged` if training does not hold.
    """
    from stillroom.recipe import Recipe
    from stillroom.run import run

    named, objects = _named(teacher=teacher, student=student, data=data)
    given: dict[str, Any] = {"engine.steps": steps, "engine.seed": seed, "name": name, **named}
    given |= {f"options.{key}": value for key, value in options.items()}
    recipe = Recipe.load(method, **{key: value for key, value in given.items() if value is not None})
    folder = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    student = run(recipe, folder, resume, **objects).student
    return load(folder) if student is None else student


def _named(**things: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """What a recipe says of teacher, student and data, and those that are objects."""
    from stillroom.task import IN_MEMORY

    given = {key: thing for key, thing in things.items() if thing is not None}
    objects = {key: thing for key, thing in given.items() if not isinstance(thing, str | Path)}
    return {key: IN_MEMORY if key in objects else str(thing) for key, thing in given.items()}, objects


def plan(
    method: str,
    *,
    teacher: Any = None,
    student: Any = None,
    data: Any = None,
    world: int = 1,
    memory: int | str = 0,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Plan:
    """What :func:`distill` with the same arguments would take: memory and operations of every turn.

    overrides: recipe keys to change, as on the command line ("engine.batch=64"). world: processes, of one device each.
    memory: of one device, in bytes or as text ("24GB"); where it is too little, the plan's ``advice`` says what to
    change. options: the method's own options. Raises :class:`UserError` where a run would.
    """
    from stillroom.planning import plan as planned
    from stillroom.recipe import Recipe

    named, objects = _named(teacher=teacher, student=student, data=data)
    recipe = Recipe.load(method, overrides, **named, **{f"options.{key}": value for key, value in options.items()})
    return planned(recipe, world=world, memory=memory, given=objects)


def load(folder: str | Path) -> Model:
    """A finished student or a teacher, from its folder, from a run, or a shipped one by name. What it does depends on
    what it is: ``.sample(labels)``, or ``.sample(captions)`` where it understands words, gives images in [-1, 1]; a
    classifier has ``.classify(images)`` or ``.classify(texts)``, an encoder ``.features(images)``."""
    from stillroom.task import load_model

    return load_model(folder)


def export(
    model: Any,
    to: str = "onnx",
    out: str | Path | None = None,
    *,
    int8: bool = False,
    whole: bool = False,
    data: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a finished model for another runtime and compare it with eager there.

    model: a run, a model folder or a shipped model by name, or what :func:`load` returns.
    to: ``onnx``, ``openvino`` or ``torch``. out: the new folder, by default ``exports/NAME-TO``.
    int8: a quantised file beside it, of a classifier or encoder (onnx), scored on ``data``'s test split (by default
    the run's). whole: the whole of a one-step generator beside its network. force: replace an older export.

    Returns the folder and what its ``export.json`` says. Raises :class:`UserError` and leaves nothing behind for what
    cannot be exported, for missing packages, and where the file answers otherwise than the model.
    """
    from stillroom.exports import export_model

    return export_model(model, to, out, int8=int8, whole=whole, data=data, force=force)


class _Methods(ModuleType):
    """``stillroom.methods`` is the package that the methods lie in, and, called, all of them by slug."""

    def __call__(self) -> dict[str, type[Method]]:
        from stillroom.method import methods as known

        return known()


# Importing a module of the package binds its name here, over any function of that name: so the package is the function.
sys.modules["stillroom.methods"].__class__ = _Methods
