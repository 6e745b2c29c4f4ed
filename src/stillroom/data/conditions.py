"""Conditions without pictures, for methods that read nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from stillroom.data.source import LABELS, ArrayData
from stillroom.errors import UserError

LABELS_ALONE = "labels"
"""The name of data that are a teacher's own classes."""
OF_EACH = 100


class NoPictures(dict):
    """A batch of conditions alone. what: they are, in words."""

    def __init__(self, what: str = "prompts", **values: Any) -> None:
        super().__init__(**values)
        self.what = what

    def __missing__(self, key: str) -> Any:
        if key == "x":
            refuse(self.what)
        raise KeyError(key)


class LabelsAlone(ArrayData):
    """The classes of a generator, equally often, as data of its ``shape`` that have no pictures: asking for one is a
    UserError. count: of the classes; 0: rows without any condition. names: of the classes, where they have any."""

    def __init__(self, count: int, names: Sequence[str], shape: Sequence[int]) -> None:
        labels = torch.arange(count).repeat(OF_EACH)
        rows = torch.zeros(1, dtype=torch.uint8).expand(len(labels) or OF_EACH, *shape)  # the memory of one number
        origin = f"{count} labels, no images" if count else "noise alone, no images"
        super().__init__(rows, {LABELS: labels} if count else {}, names, LABELS_ALONE, origin)

    def images(self, index: Any = slice(None)) -> Tensor:
        refuse(LABELS_ALONE)

    def take(self, index: Tensor, origin: str = "") -> LabelsAlone:
        found = copy.copy(self)
        found.array, found.ids, found._orders = self.array[:1].expand(len(index), *self.shape), self.ids[index], {}
        found.cond = {key: value[index] for key, value in self.cond.items()}
        return found

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> dict[str, Any]:
        index = self.indices(seed, step, size)[rows if rows is not None else slice(None)]
        cond = {key: value[index] for key, value in self.cond.items()}
        return NoPictures(LABELS_ALONE, cond=cond, id=self.ids[index], index=index)


def refuse(what: str) -> NoReturn:
    raise UserError(
        f"this method reads real images, but the data are {what} alone",
        cure="give images, with the conditions that they have; without any learn for example boot, kd and pdd, dmd2 "
        "with options.gan_weight=0 and twinflow with options.image_free=true",
    )
