"""Benches: data, teachers and scores that stay fixed while methods change. One room for each, found by walking them;
installed packages offer theirs as ``stillroom.benches``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from stillroom.bench.base import Bench
from stillroom.errors import UserError, nearest
from stillroom.registry import Registry

__all__ = ["Bench", "bench", "bench_card", "benches", "find_bench", "get_bench", "trained_teacher"]

_BENCHES: Registry[type[Bench]] = Registry("bench", "benches", __name__, inside="bench")
_B = TypeVar("_B", bound=Bench)


def bench(name: str) -> Callable[[type[_B]], type[_B]]:
    """Class decorator: make a bench known by its name."""

    def add(cls: type[_B]) -> type[_B]:
        cls.name = name
        _BENCHES.add(name, cls)
        return cls

    return add


def benches() -> dict[str, type[Bench]]:
    """All known benches by name: stillroom's own and those that installed packages offer."""
    return _BENCHES.known()


def bench_class(name: str) -> type[Bench]:
    """A bench by its name. Raises UserError for an unknown one, naming the nearest."""
    return _BENCHES.get(name)


def get_bench(name: str, seed: int = 0) -> Bench:
    """A new copy of a bench, as arms of this seed find it. Raises UserError for an unknown name."""
    return bench_class(name)(seed)


def find_bench(task: str, source: str, data: Any) -> Bench | None:
    """The bench that can judge a run of this task on these data, read from ``source``; None where there is none."""
    found = next((cls for cls in benches().values() if cls.serves(task, source, data)), None)
    return found.over(source, data) if found is not None else None


def trained_teacher(name: str, source: str) -> nn.Module | None:
    """A network that a bench trains on first use, by name; None where no bench has it. Raises UserError where it has
    learnt from other data than ``source``."""
    owner = next((cls for cls in benches().values() if name in cls.trains), None)
    if owner is None:
        return None
    if source != owner.source:
        raise UserError(f"teacher {name!r} knows {owner.source!r} alone", cure="give the folder of one of your own")
    return owner().trained(name)


def bench_card(name: str) -> str:
    """Markdown: what a bench is made of, its floor, and the scores of its shipped teachers. name: of a bench, or of
    data that one can be made of. Raises UserError for an unknown one."""
    known = benches()
    if name in known:
        return known[name]().card()
    if (reader := next((cls for cls in known.values() if cls.reads(name)), None)) is not None:
        return reader.over(name).card()
    raise UserError(f"unknown bench {name!r}{nearest(name, known)}", cure=f"known: {', '.join(known)}, or a folder")
