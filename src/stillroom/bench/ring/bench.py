"""The ring: points in the plane, on which a proof about score distillation takes seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.bench import bench
from stillroom.bench.mixture import GaussianMixture
from stillroom.bench.points import PointBench
from stillroom.data.source import LABELS
from stillroom.diffusion.denoiser import Denoiser
from stillroom.errors import UserError
from stillroom.evaluation import metrics
from stillroom.evaluation.scores import Score
from stillroom.folders.shipped import ASSETS

CLASSES = 8
RADII = (0.75, 1.25)
STD = 0.06
STUDENTS = ("inner", "raw")
"""Students to go on from, beside the teacher's copy."""


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
        """As ever; ``student``: one of :data:`STUDENTS`, see :meth:`fitted`."""
        name = wanted.pop("student", "")
        if name and name not in STUDENTS:
            raise UserError(f"this bench has no student {name!r}", cure=f"one of: {', '.join(STUDENTS)}")
        return {**super().given(**wanted), **({"student": self.fitted(name)} if name else {})}

    def fitted(self, name: str, steps: int = 400, rows: int = 256) -> Denoiser:
        """A one-step student (from all noise) by regression from the teacher's copy. ``inner``: draws the inner mode
        of every class, as it is, and never the outer (``mean + STD z``). ``raw``: its raw output, not what that stands
        for, is the teacher's guess of the clean point."""
        teacher, student = self.network(), self.network()
        t = torch.tensor(student.process.t_max)
        means = self.mixture.means.reshape(CLASSES, len(RADII), 2)[:, 0].float()
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            z, label = torch.randn(rows, 2), torch.randint(CLASSES, (rows,))
            noise = student.process.sigma(t) * z
            found = student(noise, t, {LABELS: label})
            if name == "inner":
                error = found.x0 - (means[label] + STD * z)
            else:
                error = found.value - teacher(noise, t, {LABELS: label}).x0.detach()
            optimizer.zero_grad()
            error.square().mean().backward()
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


def likelihood(points: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """A reward: the log density ``[B]`` of points ``[B, 2]`` under the mixture of their classes."""
    own = RingBench().mixture.means.reshape(CLASSES, len(RADII), 2).to(points)[cond[LABELS]]
    parts = -(points[:, None] - own).square().sum(2) / (2 * STD**2)
    return torch.logsumexp(parts, 1) - math.log(len(RADII) * 2 * math.pi * STD**2)


def outward(points: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """A reward that asks for more than the data have: the distance from the middle, ``[B]``."""
    return points.norm(dim=1)
