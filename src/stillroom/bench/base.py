"""What a bench is: data, teachers and scores that stay fixed while methods change."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.evaluation.scores import Score
from stillroom.task import told

NO_FOLDERS: Mapping[str, Path] = MappingProxyType({})


class Bench:
    """A fixed small setting for proofs, and where runs learn from its data, the judge of their students.

    A proof's arm is built from :meth:`given`, trained on :meth:`data`, made a :meth:`model` and given scores by
    :meth:`score`; the floor is what real data, or the teacher, get at the same size. A run of a bench's own data is
    shown what :meth:`compare` says.

    name: set by :func:`~stillroom.bench.bench`. task: of its students, the name of a task. scores: what is measured,
    in the order of tables. teaches: names that ``stillroom teach`` knows. trains: names of networks that the bench
    trains on first use and keeps, which a run may name as teachers; source: the data set that these have learnt from.
    seed: of this copy; a bench that splits its data, mislabels them or trains its teachers anew does so by it.
    """

    name: ClassVar[str]
    task: ClassVar[str]
    scores: ClassVar[tuple[Score, ...]]
    teaches: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[tuple[str, ...]] = ()
    source: str = ""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    # --- what a proof asks ----------------------------------------------------------------------------------------
    def given(self, **wanted: Any) -> Mapping[str, Any]:
        """What a method's ``build`` may ask for, by the names that tasks use: ``teacher``, ``teachers``, ``student``,
        ``space``, ``classes``. wanted: ``teacher``, where the bench has a choice. Draws from torch's own random state,
        which the caller sets. Raises UserError for a teacher that the bench has not."""
        raise NotImplementedError

    def network(self, **wanted: Any) -> nn.Module:
        """A trained network of the bench's own, run as it is by arms without a method. wanted: the arm's ``data``.
        Raises UserError where the bench has none."""
        raise UserError(f"bench {self.name!r} has no trained network", cure="give every arm a method")

    def data(self, **wanted: Any) -> Any:
        """What an arm learns from. wanted: the arm's ``data``, in the bench's own words; nothing: the bench's standard.
        Raises UserError for what there is not."""
        raise NotImplementedError

    def mislead(self, method: Any, data: Any) -> Any:
        """The data of an arm that must fail: each answer is another question's. A teacher that the method holds is
        spoilt in place."""
        raise NotImplementedError

    def model(self, network: nn.Module, sampler: Any) -> Any:
        """A trained network, or the bench's own, as a finished model."""
        raise NotImplementedError

    def draw(self, model: Any, n: int) -> Any:
        """``n`` answers of the model, to be timed."""
        raise NotImplementedError

    def score(self, model: Any, seed: int) -> dict[str, Any]:
        """The scores of a model by key, drawn with ``seed`` where it draws; numbers that are no scores may stand beside
        them."""
        raise NotImplementedError

    def floor(self) -> dict[str, Any]:
        """The same scores of real data, or of the teacher, at the same size."""
        raise NotImplementedError

    # --- what a run asks ------------------------------------------------------------------------------------------
    @classmethod
    def serves(cls, task: str, source: str, data: Any) -> bool:
        """Whether a run of this task on these data can be judged here. source: as the recipe names them."""
        return False

    @classmethod
    def reads(cls, source: str) -> bool:
        """Whether such a bench can be made of the data that a command names, beside its own."""
        return False

    @classmethod
    def over(cls, source: str, data: Any = None) -> Bench:
        """The bench on data that it serves or reads; data: what has been read already."""
        return cls()

    def compare(
        self, everyone: Mapping[str, Any], n: int, seed: int, folders: Mapping[str, Path] = NO_FOLDERS
    ) -> dict[str, Any]:
        """What a run's report shows of finished models: ``{"scores": {who: {key: value}}, "metrics": [Score.to_dict()],
        "bench": {"n", "reference", ...}}``, with the floor; empty where they cannot be judged here.

        everyone: models by the name that tables call them. n: samples. folders: of those that were read from one;
        scores that lie there, or were measured earlier, are not measured again, and ``bench["earlier"]`` names them.
        """
        raise NotImplementedError

    def try_out(self, model: Any) -> None:
        """Raises what :meth:`compare` would raise for such a model, as far as little work tells; asked before a run
        begins. Default: nothing is known."""

    # --- what the demo asks ---------------------------------------------------------------------------------------
    def verdicts(self, wish: str, images: Tensor) -> Sequence[bool | None] | None:
        """Whether each of ``images [N, C, H, W]`` in [-1, 1] shows what was asked for; None where the bench cannot
        tell. Raises UserError where its judge cannot be read."""
        return None

    # --- what it can make -----------------------------------------------------------------------------------------
    @classmethod
    def folder(cls) -> Path:
        """The room: where the class lies."""
        return Path(sys.modules[cls.__module__].__file__ or "").parent

    def teach(
        self,
        name: str,
        out: Path | None = None,
        overrides: Sequence[str] = (),
        run_dir: Path | None = None,
        resume: bool = False,
    ) -> dict[str, Any]:
        """Train one of :attr:`teaches` into the folder ``out`` (default: the shipped one) and return its card."""
        raise NotImplementedError

    def trained(self, name: str) -> nn.Module:
        """One of :attr:`trains`."""
        raise NotImplementedError

    # --- in words -------------------------------------------------------------------------------------------------
    def card(self) -> str:
        """Markdown: what the bench is, how it is scored, and its floor."""
        floor = self.floor()
        lines = [f"# Bench: {self.name}", "", *inspect.cleandoc(type(self).__doc__ or "").splitlines(), ""]
        lines += ["| score | better | floor |", "| --- | --- | ---: |"]
        for score in self.scores:
            better = "neither" if math.isnan(score.lost) else score.better
            lines.append(f"| {score.name} (`{score.key}`) | {better} | {told_number(floor.pop(score.key, ''))} |")
        lines += ["", *(f"- {key}: {told_number(value)}" for key, value in floor.items())]
        return "\n".join(lines).rstrip() + "\n"


def only(what: str, wanted: Mapping[str, Any]) -> None:
    """Raises UserError where a bench that has one ``what`` is asked for another."""
    if wanted:
        asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise UserError(f"this bench has one {what}, not {asked}", cure="leave it away")


def given_things(teachers: Sequence[nn.Module], **others: Any) -> dict[str, Any]:
    """What :meth:`Bench.given` returns: the ``teachers``, ``teacher`` where there is one, and the others."""
    return {"teachers": list(teachers), **({"teacher": teachers[0]} if len(teachers) == 1 else {}), **others}


def shown(scores: Iterable[Score], values: Mapping[str, Mapping[str, Any]], **about: Any) -> dict[str, Any]:
    """What :meth:`Bench.compare` gives: those of the scores that somebody has, and all numbers of ``values``."""
    numbers = {
        who: {key: value for key, value in found.items() if key != "n" and isinstance(value, int | float)}
        for who, found in values.items()
    }
    return told([score for score in scores if any(score.key in found for found in numbers.values())], numbers, **about)


def read_card(folder: Path) -> dict[str, Any]:
    """A teacher's ``card.json``; empty where its folder has none."""
    try:
        return dict(json.loads((folder / "card.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def card_rows(name: str, card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of a teacher's card by sampler, in words."""
    rows = {}
    for row in card.get("samplers", ()):
        sampler = row["sampler"]
        words = [str(sampler.get("solver", sampler["name"])), f"guidance {sampler['guidance']:g}", f"{row['nfe']} NFE"]
        rows[f"{name}, {', '.join(words)}"] = row["scores"]
    return rows


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Lines of Markdown: a row for each of ``rows``, with its N and those of ``columns`` (key -> heading) that it
    has."""
    lines = [
        f"| images | N | {' | '.join(columns.values())} |",
        f"| --- | ---: | {' | '.join('---:' for _ in columns)} |",
    ]
    for name, row in rows.items():
        values = (told_number(row.get(key, "")) for key in columns)
        lines.append(f"| {name} | {row['n']:,} | {' | '.join(values)} |")
    return lines


def told_number(value: Any) -> str:
    """Four significant digits of what is no whole number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def random_seed() -> int:
    """Of a network that is to be made from torch's own random state, yet by a seed."""
    return int(torch.randint(2**31, ()))
