"""Words that the tasks' model cards share, and what teachers are called."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.method import get_method
from stillroom.recipe import Recipe
from stillroom.task import IN_MEMORY


def listed(names: str) -> list[str]:
    """The names in ``a, b``, in order; none of an empty text."""
    return [name.strip() for name in names.split(",") if name.strip()]


def made_from(names: str) -> str:
    """The names in backquotes, joined by "and"."""
    return " and ".join(f"`{name}`" for name in listed(names))


def began(recipe: Recipe, untrained: Container[str] = ()) -> str:
    """What the student of a run began as, after its noun: a relative clause. untrained: names of networks that have new
    weights; so have those of config files."""
    teachers = listed(recipe.teacher)
    how = get_method(recipe.method).begins(recipe.method_options())
    new = recipe.student in untrained or recipe.student.endswith(".json")
    form = (
        f" of the form {made_from(recipe.student)},"
        if recipe.student
        else " of its teacher's form,"
        if teachers
        else ""
    )
    if how == "teacher" and teachers:
        return f"{form} that began with layers of `{teachers[0]}`".strip()
    if how == "new" or new:
        return f"{form} trained from new weights".strip()
    if recipe.student == IN_MEMORY:
        return "that began as a network given in memory"
    return (
        f"that began as {made_from(recipe.student)}" if recipe.student else f"that began as its teacher `{teachers[0]}`"
    )


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
