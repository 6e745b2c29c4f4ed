"""What the scenes world can say: things in a picture, captions that ask for them, and whether a picture obeys.

A picture holds up to four digits, one to each cell of a 2x2 grid. Captions come in six categories, after those of
GenEval (arXiv:2310.11513): one digit, two, several of a kind, a colour, a position, and who has which
colour. The grammar is small and closed, so that every caption can be listed, read back exactly and checked exactly.

Some combinations are held out of the ``train`` captions: pairs of digits, digits in a colour, and numbers of a digit.
``heldout`` captions are made of such combinations only. Each of their words is common in training; together they are
new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from stillroom.errors import UserError, nearest

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
CATEGORIES = ("single", "two", "counting", "colours", "position", "attribution")
CAPTION_SPLITS = ("train", "heldout")
COUNTS = (2, 3, 4)
RELATIONS = ("left", "right", "above", "below")
MIRRORED = {"left": "right", "right": "left"}
CELLS = 4
"""Cells 0 and 1 are the top row, 2 and 3 the bottom row, each from left to right."""

HELD_PAIRS = frozenset(frozenset((digit, (digit + 3) % 10)) for digit in range(10))
"""Pairs of digits, 10 of 45, that no training caption names together."""
HELD_COLOURS = frozenset({*((digit, digit % 6) for digit in range(10)), (0, 4), (1, 5)})
"""``(digit, colour)``, 12 of 60, two to each colour, that no training caption names together."""
HELD_COUNTS = frozenset({(2, 1), (2, 6), (3, 3), (3, 8), (4, 0), (4, 5)})
"""``(count, digit)``, 6 of 30, that no training caption names together."""

_PHRASINGS: dict[str, tuple[str, ...]] = {
    "single": ("a {0}", "a photo of a {0}", "a picture of a {0}", "the digit {0}"),
    "two": ("a {0} and a {1}", "a photo of a {0} and a {1}", "a {0} with a {1}", "both a {0} and a {1}"),
    "counting": ("{n} {0}", "a photo of {n} {0}", "exactly {n} {0}", "a group of {n} {0}"),
    "colours": ("a {c0} {0}", "a photo of a {c0} {0}", "a {0} in {c0}", "the digit {0} in {c0}"),
    "position": (
        "a {0} {to} a {1}",
        "a photo of a {0} {to} a {1}",
        "{to} a {1} is a {0}",
        "a {0} {side} and a {1} {other}",
    ),
    "attribution": (
        "a {c0} {0} and a {c1} {1}",
        "a photo of a {c0} {0} and a {c1} {1}",
        "a {0} in {c0} and a {1} in {c1}",
        "a {c0} {0} with a {c1} {1}",
    ),
}
_TO = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_SIDE = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Thing:
    """A digit in a picture: ``cell`` 0..3, ``digit`` 0..9, ``colour`` an index into :data:`COLOURS`."""

    cell: int
    digit: int
    colour: int

    def __post_init__(self) -> None:
        if not (0 <= self.cell < CELLS and 0 <= self.digit < 10 and 0 <= self.colour < len(COLOURS)):
            raise ValueError(f"no such thing: {self}")

    @property
    def row(self) -> int:
        return self.cell // 2

    @property
    def column(self) -> int:
        return self.cell % 2


@dataclass(frozen=True)
class Scene:
    """What a picture holds, at most one thing to a cell; ``ground`` is the seed of what lies behind them."""

    things: tuple[Thing, ...]
    ground: int = 0

    def __post_init__(self) -> None:
        if len({thing.cell for thing in self.things}) < len(self.things):
            raise ValueError(f"two things in one cell: {self.things}")


@dataclass(frozen=True)
class Want:
    """A digit that a caption asks for, in a colour of :data:`COLOURS` or in any."""

    digit: int
    colour: int | None = None


@dataclass(frozen=True)
class Caption:
    """``text`` and what it asks for: ``wants``, all of them and nothing else. With a ``relation`` the first want stands
    to the ``left`` of the second, to its ``right``, ``above`` or ``below`` it; where else is free."""

    text: str
    category: str
    wants: tuple[Want, ...]
    relation: str = ""

    @property
    def combinations(self) -> tuple[bool, ...]:
        """For every combination that the caption names, whether it is held out. Empty for a single digit."""
        digits = [want.digit for want in self.wants]
        coloured = ((w.digit, w.colour) in HELD_COLOURS for w in self.wants if w.colour is not None)
        if self.category == "counting":
            return ((len(digits), digits[0]) in HELD_COUNTS,)
        return (*coloured, *(frozenset(pair) in HELD_PAIRS for pair in itertools.combinations(digits, 2)))

    def belongs_to(self, split: str) -> bool:
        """``train``: nothing held out; ``heldout``: only what is. A caption of both kinds belongs to neither."""
        held = self.combinations
        return not any(held) if split == "train" else bool(held) and all(held)


# --- the grammar ------------------------------------------------------------------------------------------------------
def _meanings(category: str) -> Iterator[Caption]:
    """What a category can ask for, without words."""
    pairs = tuple(itertools.permutations(range(10), 2))
    if category == "single":
        yield from (Caption("", category, (Want(digit),)) for digit in range(10))
    elif category == "two":
        yield from (Caption("", category, (Want(a), Want(b))) for a, b in pairs)
    elif category == "counting":
        yield from (Caption("", category, (Want(digit),) * count) for count in COUNTS for digit in range(10))
    elif category == "colours":
        yield from (Caption("", category, (Want(d, c),)) for d in range(10) for c in range(len(COLOURS)))
    elif category == "position":
        yield from (Caption("", category, (Want(a), Want(b)), relation) for a, b in pairs for relation in RELATIONS)
    else:
        colours = tuple(itertools.permutations(range(len(COLOURS)), 2))
        yield from (Caption("", category, (Want(a, c), Want(b, d))) for a, b in pairs for c, d in colours)


def _worded(meaning: Caption, phrasing: str) -> Caption:
    first, last, relation = meaning.wants[0], meaning.wants[-1], meaning.relation
    words = PLURALS if meaning.category == "counting" else DIGIT_WORDS
    text = phrasing.format(
        words[first.digit],
        words[last.digit],
        n=DIGIT_WORDS[len(meaning.wants)],
        c0="" if first.colour is None else COLOURS[first.colour],
        c1="" if last.colour is None else COLOURS[last.colour],
        to=_TO.get(relation, ""),
        side=_SIDE.get(relation, ""),
        other=_SIDE.get(_OPPOSITE.get(relation, ""), ""),
    )
    return dataclasses.replace(meaning, text=re.sub(r"\ba eight\b", "an eight", text))


@cache
def _language(category: str) -> tuple[Caption, ...]:
    """Every caption of a category, whatever its split."""
    return tuple(_worded(meaning, p) for meaning in _meanings(category) for p in _PHRASINGS[category])


@cache
def all_captions(category: str, split: str = "train") -> tuple[Caption, ...]:
    """Every caption of a ``category`` in ``train`` or ``heldout``, in a fixed order. No single digit is held out."""
    _known(category, CATEGORIES, "category")
    _known(split, CAPTION_SPLITS, "caption split")
    return tuple(caption for caption in _language(category) if caption.belongs_to(split))


def categories(split: str = "train") -> tuple[str, ...]:
    """The categories that have captions in ``split``: all six in ``train``, all but ``single`` in ``heldout``."""
    return tuple(category for category in CATEGORIES if all_captions(category, split))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the grammar, sorted."""
    return tuple(sorted({word for text in _by_text() for word in text.split()}))


@cache
def _by_text() -> dict[str, Caption]:
    return {caption.text: caption for category in CATEGORIES for caption in _language(category)}


def parse_caption(text: str) -> Caption:
    """The caption of the grammar with this text (case and spacing aside).

    Raises :class:`~stillroom.errors.UserError` for words or sentences outside it, naming the nearest inside.
    """
    plain = " ".join(text.lower().split())
    if found := _by_text().get(plain):
        return found
    if not plain:
        raise UserError("the caption is empty", cure="write for instance: a red three and a blue seven")
    words = vocabulary()
    if unknown := [word for word in plain.split() if word not in words]:
        raise UserError(
            f"caption {text!r}: unknown word {unknown[0]!r}{nearest(unknown[0], words)}",
            cure=f"the words are: {', '.join(words)}",
        )
    raise UserError(
        f"caption {text!r} has known words, but the scenes world does not say it so",
        cure="write for instance: a seven; a three and a seven; three fives; a red four; "
        "a three to the left of a seven; a red three and a blue seven",
    )


def spoken(texts: Sequence[str]) -> bool:
    """Whether these captions, of which fifty are looked at, are of the grammar."""
    try:
        return all(parse_caption(text) for text in texts[:50])
    except UserError:
        return False


def mirror_breaks(caption: Caption) -> bool:
    """Whether a picture that obeys the caption disobeys it once its left and right are swapped."""
    return caption.relation in MIRRORED


# --- drawing ----------------------------------------------------------------------------------------------------------
def sample_captions(n: int, generator: torch.Generator, split: str = "train") -> list[Caption]:
    """``n`` captions: category first, evenly among those of ``split``, then evenly inside it. The first k of n are
    those of k."""
    pools = [all_captions(category, split) for category in categories(split)]
    draws = torch.rand(n, 2, generator=generator, dtype=torch.float64).tolist()
    return [_pick(_pick(pools, which), where) for which, where in draws]


def distinct_captions(m: int, seed: int = 0, split: str = "train") -> list[Caption]:
    """``m`` different captions, spread over the categories as evenly as their sizes allow. The set for a smaller m is
    the beginning of that for a larger one."""
    decks = []
    for category in categories(split):
        captions = all_captions(category, split)
        order = torch.randperm(len(captions), generator=seeded(f"distinct captions {category} {split} {seed}"))
        decks.append([captions[i] for i in order.tolist()])
    if m > (limit := sum(map(len, decks))):
        raise UserError(f"{m:,} distinct captions of split {split!r}: there are {limit:,}", cure="ask for fewer")
    rounds = itertools.zip_longest(*decks)
    return [caption for row in rounds for caption in row if caption is not None][:m]


def draw_scenes(captions: Sequence[Caption], generator: torch.Generator) -> list[Scene]:
    """A scene for each caption: exactly what it asks for, the rest at random. A free colour is never one held out for
    its digit, so that held-out combinations are only ever seen where a caption names them. The first k of n scenes are
    those of the first k captions."""
    draws = torch.rand(len(captions), 2 + CELLS, generator=generator, dtype=torch.float64).tolist()
    return [_drawn(caption, *row) for caption, row in zip(captions, draws, strict=True)]


def draw_scene(caption: Caption, generator: torch.Generator) -> Scene:
    """:func:`draw_scenes` of one caption."""
    return draw_scenes([caption], generator)[0]


def _drawn(caption: Caption, ground: float, place: float, *shades: float) -> Scene:
    cells = _pick(_places(len(caption.wants), caption.relation), place)
    colours = (
        _pick(_FREE_COLOURS[want.digit], shade) if want.colour is None else want.colour
        for want, shade in zip(caption.wants, shades, strict=False)
    )
    things = (Thing(cell, want.digit, c) for cell, want, c in zip(cells, caption.wants, colours, strict=True))
    return Scene(tuple(things), int(ground * 2**48))


_FREE_COLOURS = [[c for c in range(len(COLOURS)) if (digit, c) not in HELD_COLOURS] for digit in range(10)]


@cache
def _places(count: int, relation: str) -> tuple[tuple[int, ...], ...]:
    """Every way to put ``count`` things into cells that has the relation."""
    return tuple(
        cells
        for cells in itertools.permutations(range(CELLS), count)
        if not relation or _stands(relation, cells[0], cells[1])
    )


def _pick(options: Sequence[_T], u: float) -> _T:
    return options[int(u * len(options))]


def _stands(relation: str, first: int, second: int) -> bool:
    """Whether cell ``first`` lies in that relation to cell ``second``."""
    (row, column), (other_row, other_column) = divmod(first, 2), divmod(second, 2)
    return {
        "left": column < other_column,
        "right": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


# --- judging ----------------------------------------------------------------------------------------------------------
def satisfied(caption: Caption, found: Scene) -> bool:
    """Whether a picture with these things obeys the caption: each asked digit once, in its colour and place, and
    nothing else. Stricter than GenEval, which lets additional things pass outside counting."""
    if len(found.things) != len(caption.wants):
        return False
    return any(
        all(want.digit == t.digit and want.colour in (None, t.colour) for want, t in zip(caption.wants, order))
        and (not caption.relation or _stands(caption.relation, order[0].cell, order[1].cell))
        for order in itertools.permutations(found.things)
    )


def seeded(words: str) -> torch.Generator:
    """A generator whose seed is a hash of ``words``, so that streams with different names have nothing in common."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1)


def _known(word: str, known: Sequence[str], what: str) -> None:
    if word not in known:
        raise UserError(f"unknown {what} {word!r}{nearest(word, known)}", cure=f"use one of {', '.join(known)}")
