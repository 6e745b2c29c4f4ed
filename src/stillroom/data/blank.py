"""Rows without contents: what stands in for data that a plan does not need to read."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillroom.data.source import LABELS, ArrayData
from stillroom.data.texts import Texts
from stillroom.folders.public import DATA, PublicData, is_public, write_sizes

if TYPE_CHECKING:
    from stillroom.recipe import Recipe

WORDS = 512
"""Of a text: more than any model reads."""


class BlankImages(ArrayData):
    """Images that are all the same one, so that any number of them takes the memory of one."""

    def images(self, index: Any = slice(None)) -> Tensor:
        return torch.zeros(1).expand(len(torch.arange(self.n)[index]), *self.shape)

    def take(self, index: Tensor, origin: str = "") -> BlankImages:
        kept = {key: value[index] for key, value in self.cond.items()}
        array = self.array[:1].expand(len(index), *self.shape)
        return BlankImages(array, kept, self.classes, self.name, origin or self.origin, ids=self.ids[index])


def blank(public: PublicData) -> ArrayData | Texts:
    """As many rows as the data say, of their shape. Each class has as many as every other."""
    names = [str(i) for i in range(public.classes)]
    labels = torch.arange(public.rows) % max(public.classes, 1)
    if public.texts:
        return Texts([" ".join(["word"] * WORDS)] * public.rows, labels, names, public.what)
    assert public.shape is not None
    images = torch.zeros(1, *public.shape, dtype=torch.uint8).expand(public.rows, -1, -1, -1)
    return BlankImages(images, {LABELS: labels} if names else {}, names, public.what)


@contextlib.contextmanager
def by_sizes(recipe: Recipe, given: Mapping[str, Any], task: str) -> Iterator[tuple[Recipe, Mapping[str, Any]]]:
    """While a plan is made: the recipe with folders without weights in place of public models' names, and ``given``
    with stand-ins for public data. task: the name of the method's."""
    with tempfile.TemporaryDirectory(prefix="stillroom-sizes-") as place:
        found = recipe
        for who in ("teacher", "student"):
            names = [name.strip() for name in getattr(recipe, who).split(",")]
            if who not in given and any(map(is_public, names)):
                folders = [_folder(name, Path(place)) if is_public(name) else name for name in names]
                changed: dict[str, Any] = {who: ",".join(folders)}
                found = replace(found, **changed)
        known = DATA.get(recipe.data) if "data" not in given and not Path(recipe.data).exists() else None
        if known is not None and task == "text-images":
            store = Path(place) / "data"
            (store / "pairs").mkdir(parents=True)  # by which a plan knows that there are some
            (store / "manifest.json").write_text("{}")
            found = replace(found, data=str(store))
        elif known is not None:  # of prompts and pictures for a pipeline no plan reads any
            found = replace(found, data="(in memory)")
            given = {**given, "data": blank(known)} if known.rows else given
        yield found, given


def _folder(name: str, place: Path) -> str:
    plain, at, size = name.partition("@")
    if not (place / plain).exists():
        write_sizes(plain, place / plain)
    return f"{place / plain}{at}{size}"
