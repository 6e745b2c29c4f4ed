"""Clusters: points in the plane whose classes have four places each, too many for a small student to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.bench import bench
from stillroom.bench.mixture import GaussianMixture
from stillroom.bench.points import PointBench
from stillroom.diffusion.denoiser import Denoiser
from stillroom.errors import UserError
from stillroom.evaluation import metrics
from stillroom.evaluation.scores import Score
from stillroom.folders.shipped import ASSETS
from stillroom.networks.point_mlp import PointMLP

CLASSES, PLACES = 8, 4
REACH = 1.5
APART = 0.5
STD = 0.06
SMALL = {"small": 16, "tiny": 6}
"""Students of less capacity than the teacher, by the width of their network of two blocks."""


@bench("clusters")
class ClustersBench(PointBench):
    """Eight classes, each of four places at random in [-1.5, 1.5]^2 (standard deviation 0.06), at least 0.5 from each
    other within a class.

    Nothing orders the places, so a network has to keep all 32 of them: a student that is small, or that is driven to
    what is likeliest, gives some up.
    """

    scores = (
        Score("ced", "Conditional energy distance", "lower"),
        Score("covered", "Share of the places that get at least a quarter of their due"),
        Score("balance", "Evenness of a class's places: the exponential of their entropy, over four"),
        Score("in_mode", "Share within three standard deviations of a place of its class"),
        Score("spread", "Standard deviation within a place, over that of the data", worst=math.nan),
    )
    teaches = ("clusters",)
    teacher_dir = ASSETS / "clusters-teacher"
    classes = tuple(f"class {c}" for c in range(CLASSES))

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        component_class = torch.arange(CLASSES).repeat_interleave(PLACES)
        self.mixture = GaussianMixture(places(), std=STD, classes=component_class)

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        """As ever; ``student``: one of :data:`SMALL`, a network with new weights."""
        name = wanted.pop("student", "")
        if name and name not in SMALL:
            raise UserError(f"this bench has no student {name!r}", cure=f"one of: {', '.join(SMALL)}")
        found = super().given(**wanted)
        return {**found, "student": fresh(found["teacher"], SMALL[name])} if name else found

    def judge(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of ``samples [N, 2]`` asked for as ``labels [N]``, each counted for the nearest place of its class.

        ``ced``: conditional energy distance to 8,000 data points (has a floor); ``covered``: share of the 32 places
        that have at least 1/16 of their class's samples within three standard deviations (data: 1); ``balance``: mean
        over classes of exp(entropy of the places' shares) / 4 (data: 1; one place alone: 0.25); ``in_mode``: share
        within three standard deviations of a place of its class (data: 0.989); ``spread``: root mean square distance
        from the place, of those, over that of the data.
        """
        points, labels = samples.detach().double().cpu(), labels.cpu()
        own = self.mixture.means.reshape(CLASSES, PLACES, 2)[labels]
        distance, place = (points[:, None] - own).norm(dim=2).min(1)
        inside = distance <= 3 * STD
        covered, balance = [], []
        for c in labels.unique():
            mine = labels == c
            hits = torch.bincount(place[mine & inside], minlength=PLACES).double() / mine.sum()
            shares = torch.bincount(place[mine], minlength=PLACES).double() / mine.sum()
            covered.append((hits >= 1 / (4 * PLACES)).double().mean())
            balance.append(torch.special.entr(shares).sum().exp() / PLACES)
        within = 9 / 2  # of a Gaussian's squares, cut off at three standard deviations
        of_data = STD * math.sqrt(2 * (1 - math.exp(-within) * (1 + within)) / (1 - math.exp(-within)))
        spread = distance[inside].square().mean().sqrt() / of_data if bool(inside.any()) else math.nan
        reference = self._reference
        return {
            "ced": metrics.conditional_energy_distance(points, labels, reference.array, reference.labels),
            "covered": float(torch.stack(covered).mean()),
            "balance": float(torch.stack(balance).mean()),
            "in_mode": float(inside.double().mean()),
            "spread": float(spread),
        }


def places() -> Tensor:
    """The places ``[32, 2]`` float64, class by class, the same for ever."""
    generator = torch.Generator().manual_seed(32)
    found = torch.empty(CLASSES, PLACES, 2, dtype=torch.float64)
    for c in range(CLASSES):
        kept = 0
        while kept < PLACES:
            point = (2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1) * REACH
            if bool(((found[c, :kept] - point).norm(dim=1) >= APART).all()):
                found[c, kept] = point
                kept += 1
    return found.reshape(-1, 2)


def fresh(teacher: Denoiser, width: int) -> Denoiser:
    """A denoiser as the teacher is one, with a network of two blocks of this width and new weights, from torch's own
    random state."""
    network = PointMLP(2, width, 2, CLASSES)
    return Denoiser(network, teacher.process, teacher.prediction, null=teacher.null, shape=teacher.shape)
