"""The ring: points in the plane, on which a proof about score distillation takes seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.bench import bench
from stillroom.bench.base import only
from stillroom.bench.mixture import GaussianMixture
from stillroom.bench.points import PointBench
from stillroom.data.source import LABELS
from stillroom.diffusion.denoiser import Denoiser
from stillroom.evaluation import metrics
from stillroom.evaluation.scores import Score
from stillroom.folders.shipped import ASSETS

CLASSES = 8
RADII = (0.75, 1.25)
STD = 0.06


@bench("ring")
class RingBench(PointBench):
    """Eight classes on a ring, each with two radial modes (radii 0.75 and 1.25, standard deviation 0.06).

    A class-conditional mode is easy to drop, and the mean over a class lies in neither of its modes: a blurred student
    and a collapsed student both show.
    """

    scores = (
        Score("ced", "Conditional energy distance", "lower"),
        Score("in_mode", "Share within three standard deviations of a mode of its class"),
        Score("std", "Standard deviation per coordinate (data: 0.731)", worst=math.nan),
        Score("mode_balance", "Share of the rarer radial mode in the worst class"),
        Score("class_std", "Standard deviation within a class, over that of the data", worst=math.nan),
    )
    teaches = ("ring",)
    teacher_dir = ASSETS / "ring-teacher"
    classes = tuple(f"{360 * c // CLASSES} degrees" for c in range(CLASSES))

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        component_class = torch.arange(CLASSES).repeat_interleave(len(RADII))
        angle = component_class.double() * (2 * math.pi / CLASSES)
        radius = torch.tensor(RADII, dtype=torch.float64).repeat(CLASSES)
        means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.mixture = GaussianMixture(means, std=STD, classes=component_class)

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        """As ever; ``student``: ``inner``, see :meth:`inner`."""
        if wanted.get("student") != "inner":
            return super().given(**wanted)
        only("teacher", {key: value for key, value in wanted.items() if key != "student"})
        return {**super().given(), "student": self.inner()}

    def inner(self, steps: int = 500, rows: int = 256) -> Denoiser:
        """A one-step student (from all noise) that draws the inner mode of every class and never the outer: the
        teacher's copy, fitted to ``mean + STD z``. Half of the modes are missing, the others are as they should be."""
        student, process = self.network(), self.network().process
        means = self.mixture.means.reshape(CLASSES, len(RADII), 2)[:, 0].float()
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            z, label = torch.randn(rows, 2), torch.randint(CLASSES, (rows,))
            t = torch.tensor(process.t_max)
            loss = (student(process.sigma(t) * z, t, {LABELS: label}).x0 - means[label] - STD * z).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return student

    def judge(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of ``samples [N, 2]`` asked for as ``labels [N]``.

        ``ced``: conditional energy distance to 8,000 data points (has a floor); ``std``: per coordinate, all points
        (data: 0.731); ``in_mode``: share within three standard deviations of a mode of its own class (data: 0.989);
        ``mode_balance``: share of the rarer radial mode, nearest mode counted, in the class where it is smallest
        (data: a little under 0.5; a dropped mode: 0); ``class_std``: standard deviation within a class over that of
        the data, averaged over classes (a student collapsed to one point per class: 0).
        """
        points, labels = samples.detach().double().cpu(), labels.cpu()
        own = self.mixture.means.reshape(CLASSES, len(RADII), 2)[labels]
        distance, mode = (points[:, None] - own).norm(dim=2).min(1)
        inner = torch.stack([(mode[labels == c] == 0).double().mean() for c in torch.unique(labels)])
        reference = self._reference
        within = torch.stack(
            [(points[labels == c] - points[labels == c].mean(0)).square().mean().sqrt() for c in labels.unique()]
        )
        of_data = (STD**2 + ((RADII[1] - RADII[0]) / 2) ** 2 / 2) ** 0.5
        return {
            "ced": metrics.conditional_energy_distance(points, labels, reference.array, reference.labels),
            "std": float((points - points.mean(0)).square().mean().sqrt()),
            "in_mode": float((distance <= 3 * STD).double().mean()),
            "mode_balance": float(torch.minimum(inner, 1 - inner).min()),
            "class_std": float(within.mean() / of_data),
        }
