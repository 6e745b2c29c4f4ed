"""What is to be drawn: captions × teachers × seeds, in an order that depends on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.data.captioned_folders import Captions, check_caption, read_captions
from stillroom.data.store import FORMAT, encode_json
from stillroom.errors import UserError, nearest
from stillroom.evaluation.filters import Filter, make_filters
from stillroom.synthesis.teachers import Teacher

ROUTES = ("one", "all", "round-robin")
REPEATS = ("drop", "redraw")
Router = Callable[[str, Sequence[str]], str]
"""``(caption, names of the teachers that can draw it) -> name of the one that does``."""


class Item(NamedTuple):
    """One image to draw; ``number`` is its place in the plan and its key in the store."""

    number: int
    caption: str
    teacher: str
    seed: int


@dataclass(frozen=True)
class SynthesisPlan:
    """Everything that determines a store. ``repeated``: mentions of a caption that were left out as repetitions."""

    items: list[Item]
    teachers: dict[str, Teacher]
    filters: list[Filter]
    shard_size: int
    batch: int
    settings: dict[str, Any]
    repeated: int = 0

    @property
    def shards(self) -> int:
        return -(-len(self.items) // self.shard_size)

    def shard(self, number: int) -> list[Item]:
        return self.items[number * self.shard_size : (number + 1) * self.shard_size]

    def batches(self, number: int) -> Iterator[tuple[Teacher, list[Item]]]:
        """The items of a shard, teacher by teacher, in the batches in which they are drawn."""
        items = self.shard(number)
        for name, teacher in self.teachers.items():
            mine = [item for item in items if item.teacher == name]
            for start in range(0, len(mine), self.batch):
                yield teacher, mine[start : start + self.batch]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the settings, which hold a hash of all items."""
        return hashlib.sha256(encode_json(self.settings)).hexdigest()


def make_plan(
    teachers: Mapping[str, Teacher],
    captions: str | Path | Captions | Iterable[str] | None,
    *,
    seeds: Sequence[int] = (0,),
    route: str | Router = "one",
    repeats: str | None = None,
    filters: Iterable[str | Filter] | Mapping[str, float] = ("readable",),
    shard_size: int = 1000,
    batch: int = 64,
    size: int = 0,
) -> SynthesisPlan:
    """The plan that :func:`stillroom.synthesis.synthesize` carries out; its arguments are explained there.

    Raises UserError for anything that is wrong with them, naming the line of a caption that a teacher cannot read.
    """
    if not teachers:
        raise UserError("no teachers were named", cure="give at least one")
    seeds = list(dict.fromkeys(seeds))
    if not seeds or any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds):
        raise UserError(f"seeds must be whole numbers from 0, got {' '.join(map(str, seeds)) or 'none'}")
    for what, number, least in (("shard size", shard_size, 1), ("batch", batch, 1), ("size", size, 0)):
        if number < least:
            raise UserError(f"the {what} must be at least {least}, got {number}")
    if isinstance(route, str) and route not in ROUTES:
        raise UserError(f"unknown route {route!r}{nearest(route, ROUTES)}", cure=f"routes: {', '.join(ROUTES)}")
    made = make_filters(filters)
    made.sort(key=lambda one: one.name != "readable")  # other filters are not shown what is not finite
    found = _captions(teachers, captions, seeds)
    if repeats is None:
        repeats = "redraw" if found.redraw else "drop"
    if repeats not in REPEATS:
        raise UserError(f"repeats is {repeats!r}{nearest(repeats, REPEATS)}", cure="use drop or redraw")
    items, repeated = _items(teachers, found, seeds, route, repeats == "redraw")
    if not items:
        raise UserError("there is nothing to draw", cure="give captions that the teachers have images of")
    whole = hashlib.sha256()
    for item in items:
        whole.update(encode_json([item.caption, item.teacher, item.seed]) + b"\n")
    settings = {
        "format": FORMAT,
        "captions": {"count": len(found.texts), "sha256": hashlib.sha256("\n".join(found.texts).encode()).hexdigest()},
        "teachers": {name: teacher.describe() for name, teacher in teachers.items()},
        "seeds": seeds,
        "route": route if isinstance(route, str) else "own",
        "repeats": repeats,
        "filters": {one.name: one.describe() for one in made},
        "filter_order": [one.name for one in made],
        "shard_size": shard_size,
        "batch": batch,
        "resize": size,
        "items": {"count": len(items), "sha256": whole.hexdigest()},
    }
    return SynthesisPlan(items, dict(teachers), made, shard_size, batch, settings, repeated)


def _captions(
    teachers: Mapping[str, Teacher], captions: str | Path | Captions | Iterable[str] | None, seeds: Sequence[int]
) -> Captions:
    if captions is None:
        own = {caption: "" for teacher in teachers.values() if teacher.folder for caption in teacher.folder.captions}
        if not own:
            raise UserError("no captions were given", cure="give a text file, one caption per line, or scenes:N")
        return Captions(list(own), [f"caption {caption!r}" for caption in own])
    if isinstance(captions, str | Path):
        return read_captions(captions, min(seeds))
    if isinstance(captions, Captions):
        return captions
    texts, places = [], []
    for number, text in enumerate(captions, 1):
        places.append(f"caption {number}")
        texts.append(check_caption(text, places[-1]))
    if not texts:
        raise UserError("no captions were given", cure="give at least one")
    return Captions(texts, places)


def _items(
    teachers: Mapping[str, Teacher], captions: Captions, seeds: Sequence[int], route: str | Router, redraw: bool
) -> tuple[list[Item], int]:
    items: list[Item] = []
    mentions: dict[str, int] = {}
    readable: set[tuple[str, str]] = set()
    repeated = 0
    for position, (caption, place) in enumerate(zip(captions.texts, captions.places, strict=False)):
        mention = mentions.get(caption, 0)
        mentions[caption] = mention + 1
        if mention and not redraw:
            repeated += 1
            continue
        able = [name for name, teacher in teachers.items() if teacher.seeds(caption, seeds, mention)]
        if not able:
            if mention:  # only folders know it, and their images of it are in the plan already
                repeated += 1
                continue
            raise UserError(f"{place}: no teacher has an image of {caption!r}", cure="remove the caption")
        for name in _routed(caption, mention, position, able, route):
            if (name, caption) not in readable:
                try:
                    teachers[name].check(caption)
                except UserError as error:
                    raise UserError(f"{place}: {error.message}", error.cure) from None
                readable.add((name, caption))
            for seed in teachers[name].seeds(caption, seeds, mention):
                items.append(Item(len(items), caption, name, seed))
    return items, repeated


def _routed(caption: str, mention: int, position: int, able: Sequence[str], route: str | Router) -> Sequence[str]:
    """The teachers that draw a caption: all; or one, by the hash of the caption (whatever else the list holds) or in
    turn."""
    if route == "all":
        return able
    if route == "one":
        drawn = hashlib.sha256(encode_json(["stillroom route", caption, mention])).digest()
        return [able[int.from_bytes(drawn[:8], "big") % len(able)]]
    if route == "round-robin":
        return [able[position % len(able)]]
    assert callable(route)
    chosen = route(caption, able)
    if chosen not in able:
        raise UserError(f"the route sends {caption!r} to {chosen!r}", cure=f"choose one of {', '.join(able)}")
    return [chosen]
