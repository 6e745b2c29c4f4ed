"""What the benches of points in the plane share: classes of a Gaussian mixture, and a small trained teacher."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from stillroom.bench.classes import ClassBench
from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.data.source import LABELS, ArrayData
from stillroom.diffusion.process import Process

REFERENCE = 8_000


class PointBench(ClassBench):
    """Points of a mixture in classes. The shipped teacher is a small network, so that students can start from its
    weights; :meth:`exact` is the perfect one."""

    n = batch = 4_000
    classes: ClassVar[tuple[str, ...]]
    mixture: GaussianMixture

    def labels(self, n: int) -> Tensor:
        """Balanced."""
        return torch.arange(n) % len(self.classes)

    def points(self, n: int = 20_000, seed: int = 0) -> ArrayData:
        """``n`` float32 points ``[n, 2]`` with balanced classes."""
        labels = self.labels(n)
        points = self.mixture.sample(n, torch.Generator().manual_seed(seed), labels).float()
        origin = f"{self.name}: {n:,} points, seed {seed}"
        return ArrayData(points, {LABELS: labels}, list(self.classes), self.name, origin)

    @cached_property
    def train(self) -> ArrayData:  # type: ignore[override]
        """The standard training points."""
        return self.points()

    def exact(self, process: Process) -> MixtureDenoiser:
        """The perfect teacher; the label after the last is unconditional."""
        return MixtureDenoiser(self.mixture, process)

    @cached_property
    def _reference(self) -> ArrayData:
        return self.points(REFERENCE, seed=2**31)

    def floor_of(self, n: int, seed: int = 1) -> dict[str, float]:
        """:meth:`judge` of ``n`` fresh points."""
        fresh = self.points(n, seed)
        return self.judge(fresh.array, fresh.labels)
