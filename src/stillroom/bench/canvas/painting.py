"""Digits painted on a canvas, anew for every batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stillroom.cache import code_of
from stillroom.data.source import LABELS, ArrayData
from stillroom.draws import mix


class Canvases(ArrayData):
    """Digits whose place, contrast and noise are drawn anew for every batch, by the run's seed and its step.

    ink: ``[N, 1, 16, 16]``, 0 to 1. What is asked for by row (:meth:`images`, :meth:`take`) is one fixed canvas of each
    digit, painted by ``seed``.
    """

    def __init__(self, ink: Tensor, labels: Tensor, classes: Sequence[str], seed: int, what: str) -> None:
        images, _ = painted(ink, seed)
        origin = f"canvas: {what}, painted anew for every batch"
        super().__init__(images, {LABELS: labels}, classes, "canvas", origin)
        self.ink = ink

    @cached_property
    def fingerprint(self) -> str:
        """Of the fixed canvases, and of how the others are painted."""
        return f"{super().fingerprint} {code_of(painted)}"

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> dict[str, Any]:
        found = super().batch(seed, step, size, rows)
        images, _ = painted(self.ink[self.indices(seed, step, size)], mix("canvas", seed, step))
        return found | {"x": images[rows if rows is not None else slice(None)]}


def painted(ink: Tensor, seed: int, side: int = 20) -> tuple[Tensor, Tensor]:
    """Digits ``[N, 1, 16, 16]`` (ink 0 to 1) on canvases ``[N, 1, side, side]``, pixels from -1 (none) to 1 or so;
    and what each pixel belongs to, ``[N, side, side]``."""
    generator = torch.Generator().manual_seed(seed)
    n, _, size, _ = ink.shape
    corner = torch.randint(side - size + 1, (n, 2), generator=generator)
    contrast = 0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator)
    images = 0.15 * torch.randn(n, 1, side, side, generator=generator) - 1
    belongs = torch.zeros(n, side, side, dtype=torch.long)
    half = size // 2
    quarter = torch.tensor([[1, 2], [3, 4]]).repeat_interleave(half, 0).repeat_interleave(half, 1)
    down, across = (corner[:, axis, None] + torch.arange(size) for axis in (0, 1))
    place = torch.arange(n)[:, None, None], down[:, :, None], across[:, None, :]
    images[:, 0][place] += 2 * (ink * contrast)[:, 0]
    belongs[place] = quarter
    return images, belongs
