"""The contract between a run and its task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from stillroom import training
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.method import Method
from stillroom.recipe import Recipe

IN_MEMORY = "(in memory)"
"""Stands in a recipe for a teacher or data that were given as objects."""

COLUMNS = 8
"""Samples in a row of a sample grid."""


class Generator(Protocol):
    """A finished model: something that draws or recognises images, can be timed and written to a folder."""

    sampler: Sampler

    def save(self, folder: str | Path, **extra: Any) -> None: ...


class Task:
    """Base of all tasks. One object serves one run; :meth:`load` comes first.

    ``data``: what the trainer reads. ``origin``: where it came from, in words. ``made``: teachers that the
    method itself trained, set when it has.
    """

    data: Any
    origin: str
    made: Mapping[str, nn.Module] = MappingProxyType({})

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        """Read teachers and data and check that they fit together. Writes nothing into the run's folder.

        teacher, data: objects to use instead of those that the recipe names. Raises UserError.
        """
        raise NotImplementedError

    def sketch(self, recipe: Recipe) -> None:
        """Like :meth:`load`, for a plan: networks have no weights (:func:`~stillroom.surgery.skeleton.weights_unread`),
        and what networks would have to compute of the data has the right shapes alone."""
        self.load(recipe)

    def check(self, method: Any) -> None:
        """Raises UserError where the built method does not fit this task. Default: it does."""

    def networks(self) -> tuple[Any, ...]:
        """What the method's ``build`` is given."""
        raise NotImplementedError

    def teachers(self) -> Mapping[str, Any]:
        """The teachers by the name that tables and files call them."""
        raise NotImplementedError

    def student(self, network: nn.Module, sampler: Sampler) -> Any:
        """The trained network as a :class:`Generator`."""
        raise NotImplementedError

    def rows(self, generator: Any, seed: int) -> tuple[list[str], Tensor | None]:
        """Samples to look at: ``(names of the rows, [rows, COLUMNS, C, H, W])``; None where there are no pictures."""
        raise NotImplementedError

    def measure(self, recipe: Recipe, student: Any) -> dict[str, Any]:
        """Costs and, where there is a bench for the data, scores of student, teachers and real images.

        ``{who: {"nfe", "params", "latency_ms", "macs"}, "scores": {who: ...}, "bench": ..., "score_names": ...}``.
        """
        raise NotImplementedError


def build_method(recipe: Recipe, task: Task) -> Method:
    """The recipe's method with its networks, made from those of the loaded ``task``. Raises UserError where they do not
    fit."""
    return training.build_method(recipe, lambda: by_name(task.networks()), task.check)


def by_name(networks: Any) -> dict[str, Any]:
    """What a method's ``build`` may ask for: of a denoiser, a space, a network, or a student's network and its
    teachers'."""
    first, *others = networks if isinstance(networks, list | tuple) else (networks,)
    if isinstance(first, Denoiser):
        return {"teacher": first, "teachers": [first]}
    if not isinstance(first, nn.Module):
        return {"space": first}
    return {"student": first, "teachers": others} | ({"teacher": others[0]} if len(others) == 1 else {})


def teacher_names(names: Sequence[str]) -> list[str]:
    """What tables and files call teachers: the last parts of their names, but ``teacher-1`` and so on where these are
    not unique, or are those of the student's or the floor's column."""
    short = [Path(name).name for name in names]
    taken = {"", "student", "floor"}
    return [f"teacher-{i}" if name in taken or short.count(name) > 1 else name for i, name in enumerate(short, start=1)]


def sampling_cost(generator: Any, draw: Callable[[int], Any]) -> dict[str, Any]:
    """``latency_ms`` (median of 30 calls, by batch size) and ``macs`` per sample of ``draw(batch)``."""
    from stillroom.evaluation import cost

    timings = cost.latency(draw, batches=(1, 32))
    return {"latency_ms": {str(t.batch): round(t.median_ms, 3) for t in timings}, "macs": cost.macs(lambda: draw(1))}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
