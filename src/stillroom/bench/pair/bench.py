"""The pair: two classes of points that overlap, between which guidance shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillroom.bench import bench
from stillroom.bench.mixture import GaussianMixture
from stillroom.bench.points import PointBench
from stillroom.evaluation import metrics
from stillroom.evaluation.scores import Score
from stillroom.folders.shipped import ASSETS


@bench("pair")
class PairBench(PointBench):
    """Two overlapping classes, ``N((-1, 0), I)`` and ``N((+1, 0), I)``: the bench on which guidance shows.

    Without guidance a sample falls on its class's side with probability 0.841; guidance pushes the classes apart along
    the first axis and must leave the second alone.
    """

    scores = (
        Score("ced", "Conditional energy distance", "lower"),
        Score("accuracy", "Share on the own class's side"),
        Score("shift", "Mean distance of a class from the middle (data: 1)", worst=math.nan),
        Score("std_along", "Standard deviation along the axis of the classes (data: 1)", worst=math.nan),
        Score("std_across", "Standard deviation across that axis (data: 1)", worst=math.nan),
    )
    teaches = ("pair",)
    teacher_dir = ASSETS / "pair-teacher"
    classes = ("left", "right")

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        self.mixture = GaussianMixture(means, std=1.0, classes=torch.arange(2))

    def judge(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of ``samples [N, 2]`` asked for as ``labels [N]``: ``accuracy`` (on the class's own side; data:
        0.841), ``shift`` (mean distance of a class from the middle; data: 1), ``std_along`` and ``std_across`` (within
        a class, on the first and second axis; data: 1), ``ced`` (conditional energy distance to 8,000 data points)."""
        points, labels = samples.detach().double().cpu(), labels.cpu()
        side = points[:, 0] * (2 * labels - 1)
        spread = torch.stack([points[labels == c].std(0) for c in (0, 1)]).mean(0)
        reference = self._reference
        return {
            "ced": metrics.conditional_energy_distance(points, labels, reference.array, reference.labels),
            "accuracy": float((side > 0).double().mean()),
            "shift": float(side.mean()),
            "std_along": float(spread[0]),
            "std_across": float(spread[1]),
        }
