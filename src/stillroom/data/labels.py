"""Names of classes: their order where nobody gives one, and which class of a network each class of the data is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from stillroom.errors import UserError, nearest

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?")
_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, sorted: by value where all are numbers, else as texts."""
    found = set(names)
    if all(_NUMBER.fullmatch(name) for name in found):
        return sorted(found, key=lambda name: (float(name), name))
    return sorted(found)


def label_text(value: Any, place: str) -> str:
    """A label of a table as a name. Raises UserError, naming ``place``, for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if not text:
        raise UserError(
            f"{place}: the label is {'empty' if value is None or value == '' else f'{value!r:.40}'}",
            cure="give each row a label, a name or a number",
        )
    return text


def without_points(names: Iterable[str]) -> dict[str, str]:
    """What each label is called: ``1`` where a program wrote ``1.0``, if all of them are whole numbers."""
    found = {name: _WHOLE.fullmatch(name) for name in names}
    return {name: whole[1] if whole and all(found.values()) else name for name, whole in found.items()}


# --- of data and networks ---------------------------------------------------------------------------------------------
def ways(name: str) -> set[str]:
    """How a name may be written: without regard to case and spaces, whole or one of several by commas (ImageNet's)."""
    return {" ".join(part.replace("_", " ").replace("-", " ").lower().split()) for part in (*name.split(","), name)}


def same_name(a: str, b: str) -> bool:
    """Whether two names mean one class."""
    return bool(ways(a) & ways(b))


def nameless(names: Sequence[str]) -> bool:
    """Whether these are none: ``LABEL_0`` and so on, which transformers writes where nobody named the classes."""
    return list(names) == [f"LABEL_{i}" for i in range(len(names))]


def numbered(mine: Sequence[str], count: int) -> list[str]:
    """What ``count`` outputs without names are called where the classes of the data are numbers of outputs, perhaps not
    of all: ``0, 2, 5`` are not the first three. Empty where they are names, or numbers that no output has."""
    numbers = [int(name) for name in mine if name.isascii() and name.isdecimal() and len(name) <= 18]
    if len({*numbers}) < len(mine) or max(numbers, default=count) >= count:
        return []
    names = list(map(str, range(count)))
    for number, name in zip(numbers, mine):
        names[number] = name
    return names


def places(mine: Sequence[str], theirs: Sequence[str], whose: str) -> list[int]:
    """Where each class of the data (``mine``) stands among a network's outputs (``theirs``), by name.

    Where the network has no names, or the data's are the numbers 0, 1, ... of its outputs, in the data's order.
    whose: the network's classes, for messages. Raises UserError for a class of the data that is none of them.
    """
    straight = list(range(len(mine)))
    if len(mine) == len(theirs) and all(map(same_name, mine, theirs)):
        return straight
    if nameless(theirs) and set(mine) - set(theirs):
        return straight
    exact = {name: place for place, name in enumerate(theirs)}
    alike: dict[str, set[int]] = {}
    for place, name in enumerate(theirs):
        for way in ways(name):
            alike.setdefault(way, set()).add(place)
    found: list[int] = []
    for name in mine:
        fit = {exact[name]} if name in exact else set().union(*(alike.get(way, set()) for way in ways(name)))
        if len(fit) != 1 or fit & {*found}:
            if list(mine) == [str(i) for i in straight] and len(mine) <= len(theirs):
                return straight
            which = "none" if not fit else "several" if len(fit) > 1 else "as another one is, one"
            raise UserError(
                f"class {name!r} of the data is {which} of {whose}{nearest(name, theirs)}",
                cure=f"those names are {', '.join(map(repr, theirs[:20]))}{', ...' if len(theirs) > 20 else ''}",
            )
        found += fit
    return found


def matched(mine: Sequence[str], theirs: Sequence[str], whose: str) -> tuple[list[int], list[str]]:
    """:func:`places`, and what the classes are called then: in their order, by the data's names where there are some.
    Arguments and errors: as there."""
    order = places(mine, theirs, whose)
    if nameless(theirs) and order == list(range(len(mine))):
        return order, list(mine)
    names = list(theirs)
    for name, place in zip(mine, order):
        names[place] = name if same_name(name, theirs[place]) else theirs[place]
    return order, names
