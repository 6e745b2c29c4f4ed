"""Words that the tasks' model cards share, and what teachers are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def listed(names: str) -> list[str]:
    """The names in ``a, b``, in order; none of an empty text."""
    return [name.strip() for name in names.split(",") if name.strip()]


def made_from(names: str) -> str:
    """The names in backquotes, joined by "and"."""
    return " and ".join(f"`{name}`" for name in listed(names))


def calls(result: Mapping[str, Any]) -> str:
    """How many network evaluations the student takes, and its teachers."""
    teachers = list(result.get("teachers", ()))
    theirs = ", ".join(f"{who} takes {result[who]['nfe']}" for who in teachers)
    beside = f" ({'the ' * (len(teachers) == 1)}{theirs})" if theirs else ""
    return evaluations(result["student"]["nfe"]) + beside


def evaluations(nfe: int) -> str:
    return f"{nfe} network evaluation{'s' if nfe > 1 else ''}"


def teacher_names(names: Sequence[str]) -> list[str]:
    """What tables and files call teachers: the last parts of their names, but ``teacher-1`` and so on where these are
    not unique, or are those of the student's or the floor's column."""
    short = [Path(name).name for name in names]
    taken = {"", "student", "floor"}
    return [f"teacher-{i}" if name in taken or short.count(name) > 1 else name for i, name in enumerate(short, start=1)]
