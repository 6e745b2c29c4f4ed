"""The mechanism bench: points in the plane whose noised density, score and posterior mean are known exactly.

A Gaussian mixture under ``x_t = alpha x0 + sigma eps`` stays one, so the perfect teacher is a formula and a proof about
score distillation takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from stillroom.data.source import ASSETS, LABELS, ArrayData
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.process import Process
from stillroom.evaluation import metrics


class GaussianMixture(nn.Module):
    """``sum_k w_k N(mean_k, C_k)``, and its density, score and posterior mean under Gaussian noise.

    ``means [K, D]``; ``std`` (a number, or ``[K]``) or ``covariances [K, D, D]``; ``weights [K]``, equal unless given;
    ``classes [K]``: each component's class, for conditional questions. Points ``x [B, ...]`` with D numbers per row;
    ``alpha`` and ``sigma`` are numbers or ``[B]``. Computed in float64, returned in x's own type, differentiable in x.

    ``labels [B]`` restricts each row to the components of its class; a label equal to the number of classes means all.
    At ``sigma = 0`` every component must have full rank.
    """

    means: Tensor
    log_weights: Tensor
    spread: Tensor
    axes: Tensor
    classes: Tensor | None

    def __init__(
        self,
        means: Tensor,
        std: float | Sequence[float] | Tensor | None = None,
        covariances: Tensor | None = None,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        super().__init__()
        if (std is None) == (covariances is None):
            raise ValueError("give either std or covariances")
        count, size = means.shape
        if covariances is None:
            variances = torch.as_tensor(std, dtype=torch.float64).square().expand(count)
            covariances = variances[:, None, None] * torch.eye(size, dtype=torch.float64)
        spread, axes = torch.linalg.eigh(covariances.double())
        weights = torch.ones(count) if weights is None else weights
        self.register_buffer("means", means.double())
        self.register_buffer("spread", spread.clamp(min=0))
        self.register_buffer("axes", axes)
        self.register_buffer("log_weights", weights.double().log() - weights.double().sum().log())
        self.register_buffer("classes", None if classes is None else classes.long())

    @property
    def n_classes(self) -> int:
        return 0 if self.classes is None else int(self.classes.max()) + 1

    def _prior(self, labels: Tensor | None) -> Tensor:
        """Log weights, ``[1, K]`` or by row ``[B, K]``, normalised within the class."""
        if labels is None:
            return self.log_weights[None]
        if self.classes is None:
            raise ValueError("this mixture has no classes")
        inside = (self.classes == labels[:, None]) | (labels[:, None] == self.n_classes)
        return torch.log_softmax(self.log_weights.masked_fill(~inside, -torch.inf), dim=1)

    def _parts(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets from the noised means along the components' axes, their variances (both ``[B, K, D]``), ``alpha``."""
        rows = x.flatten(1).double()
        alpha, sigma = (torch.as_tensor(c, dtype=torch.float64).reshape(-1, 1, 1) for c in (alpha, sigma))
        offsets = torch.einsum("kij,bki->bkj", self.axes, rows[:, None] - alpha * self.means)
        variances = (alpha.square() * self.spread + sigma.square()).expand_as(offsets)
        return offsets, variances, alpha

    def _joint(self, offsets: Tensor, variances: Tensor, labels: Tensor | None) -> Tensor:
        """``log w_k + log N_k(x)``, ``[B, K]``."""
        log_normal = -0.5 * (offsets.square() / variances + (2 * math.pi * variances).log()).sum(2)
        return self._prior(labels) + log_normal

    def log_density(
        self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0, labels: Tensor | None = None
    ) -> Tensor:
        """``[B]``: log density of ``x_t`` at the noise level."""
        offsets, variances, _ = self._parts(x, alpha, sigma)
        return self._joint(offsets, variances, labels).logsumexp(1).to(x.dtype)

    def score(
        self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0, labels: Tensor | None = None
    ) -> Tensor:
        """Gradient of :meth:`log_density` in x, shape of x: the mean of the components' scores by responsibility."""
        offsets, variances, _ = self._parts(x, alpha, sigma)
        return self._mixed(-offsets / variances, 0.0, self._joint(offsets, variances, labels), x)

    def posterior_mean(
        self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, labels: Tensor | None = None
    ) -> Tensor:
        """``E[x0 | x_t]``, shape of x: the perfect x0-prediction. Exact at both ends of a process."""
        offsets, variances, alpha = self._parts(x, alpha, sigma)
        towards = alpha * self.spread * offsets / variances
        return self._mixed(towards, self.means, self._joint(offsets, variances, labels), x)

    def _mixed(self, along_axes: Tensor, shift: Tensor | float, joint: Tensor, x: Tensor) -> Tensor:
        each = torch.einsum("kij,bkj->bki", self.axes, along_axes) + shift
        return (joint.softmax(1)[:, :, None] * each).sum(1).reshape(x.shape).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """``[n, D]`` float64 points, of the classes ``labels [n]`` where given."""
        prior = self._prior(labels).exp().expand(n, -1)
        component = torch.multinomial(prior, 1, generator=generator).squeeze(1)
        noise = (
            torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
            * self.spread[component].sqrt()
        )
        return self.means[component] + torch.einsum("nij,nj->ni", self.axes[component], noise)


class MixtureDenoiser(Denoiser):
    """The exact denoiser of a mixture under any process: asked like a trained one, guidance included.

    The condition ``label`` is used where the mixture has classes; the number of classes means "unconditional".
    """

    def __init__(self, mixture: GaussianMixture, process: Process, shape: tuple[int, ...] | None = None) -> None:
        null = {LABELS: mixture.n_classes} if mixture.classes is not None else {}
        super().__init__(mixture, process, "x0", null=null, shape=shape or (mixture.means.shape[1],))

    def native(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if unknown := set(cond) - set(self.null):
            raise ValueError(f"this mixture knows no condition {min(unknown)!r}")
        assert isinstance(self.network, GaussianMixture)
        t = t.double()
        return self.network.posterior_mean(x_t, self.process.alpha(t), self.process.sigma(t), cond.get(LABELS))


class RingBench:
    """Eight classes on a ring, each with two radial modes (radii 0.75 and 1.25, standard deviation 0.06).

    A class-conditional mode is easy to drop, and the mean over a class lies in neither of its modes: a blurred student
    and a collapsed student both show.
    """

    CLASSES = 8
    RADII = (0.75, 1.25)
    STD = 0.06
    REFERENCE = 8_000

    def __init__(self) -> None:
        self.component_class = torch.arange(self.CLASSES).repeat_interleave(len(self.RADII))
        angle = self.component_class.double() * (2 * math.pi / self.CLASSES)
        radius = torch.tensor(self.RADII, dtype=torch.float64).repeat(self.CLASSES)
        means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.mixture = GaussianMixture(means, std=self.STD, classes=self.component_class)

    def labels(self, n: int) -> Tensor:
        """``[n]`` int64, balanced."""
        return torch.arange(n) % self.CLASSES

    def data(self, n: int = 20_000, seed: int = 0) -> ArrayData:
        """``n`` float32 points ``[n, 2]`` with balanced classes."""
        labels = self.labels(n)
        points = self.mixture.sample(n, torch.Generator().manual_seed(seed), labels).float()
        names = [f"{360 * c // self.CLASSES} degrees" for c in range(self.CLASSES)]
        return ArrayData(points, {LABELS: labels}, names, "ring", f"ring: {n:,} points, seed {seed}")

    @cached_property
    def train(self) -> ArrayData:
        """The standard training points."""
        return self.data()

    @property
    def teacher_dir(self) -> Path:
        """The shipped trained teacher, a small network (``stillroom teach ring``); :meth:`teacher` is the exact one."""
        return ASSETS / "ring-teacher"

    def teacher(self, process: Process) -> MixtureDenoiser:
        """The perfect teacher; label 8 is unconditional."""
        return MixtureDenoiser(self.mixture, process)

    @cached_property
    def _reference(self) -> ArrayData:
        return self.data(self.REFERENCE, seed=2**31)

    def score(self, points: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of ``points [N, 2]`` asked for as ``labels [N]``.

        ``ced``: conditional energy distance to 8,000 data points (has a floor); ``std``: per coordinate, all points
        (data: 0.731); ``in_mode``: share within three standard deviations of a mode of its own class (data: 0.989);
        ``mode_balance``: share of the rarer radial mode, nearest mode counted, in the class where it is smallest
        (data: a little under 0.5; a dropped mode: 0); ``class_std``: standard deviation within a class over that of
        the data, averaged over classes (a student collapsed to one point per class: 0).
        """
        points, labels = points.detach().double().cpu(), labels.cpu()
        own = self.mixture.means.reshape(self.CLASSES, len(self.RADII), 2)[labels]
        distance, mode = (points[:, None] - own).norm(dim=2).min(1)
        inner = torch.stack([(mode[labels == c] == 0).double().mean() for c in torch.unique(labels)])
        reference = self._reference
        within = torch.stack(
            [(points[labels == c] - points[labels == c].mean(0)).square().mean().sqrt() for c in labels.unique()]
        )
        of_data = (self.STD**2 + ((self.RADII[1] - self.RADII[0]) / 2) ** 2 / 2) ** 0.5
        return {
            "ced": metrics.conditional_energy_distance(points, labels, reference.array, reference.labels),
            "std": float((points - points.mean(0)).square().mean().sqrt()),
            "in_mode": float((distance <= 3 * self.STD).double().mean()),
            "mode_balance": float(torch.minimum(inner, 1 - inner).min()),
            "class_std": float(within.mean() / of_data),
        }

    def floor(self, n: int = 4_000, seed: int = 1) -> dict[str, float]:
        """:meth:`score` of ``n`` fresh data points."""
        fresh = self.data(n, seed)
        return self.score(fresh.array, fresh.labels)


class PairBench:
    """Two overlapping classes, ``N((-1, 0), I)`` and ``N((+1, 0), I)``: the world in which guidance shows.

    Without guidance a sample falls on its class's side with probability 0.841; guidance pushes the classes apart along
    the first axis and must leave the second alone.
    """

    CLASSES = 2

    def __init__(self) -> None:
        means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        self.mixture = GaussianMixture(means, std=1.0, classes=torch.arange(2))

    def labels(self, n: int) -> Tensor:
        """``[n]`` int64, balanced."""
        return torch.arange(n) % self.CLASSES

    def data(self, n: int = 20_000, seed: int = 0) -> ArrayData:
        """``n`` float32 points ``[n, 2]`` with balanced classes."""
        labels = self.labels(n)
        points = self.mixture.sample(n, torch.Generator().manual_seed(seed), labels).float()
        return ArrayData(points, {LABELS: labels}, ["left", "right"], "pair", f"pair: {n:,} points, seed {seed}")

    @cached_property
    def train(self) -> ArrayData:
        """The standard training points."""
        return self.data()

    @property
    def teacher_dir(self) -> Path:
        """The shipped trained teacher (``stillroom teach pair``)."""
        return ASSETS / "pair-teacher"

    @cached_property
    def _reference(self) -> ArrayData:
        return self.data(8_000, seed=2**31)

    def score(self, points: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of ``points [N, 2]`` asked for as ``labels [N]``: ``accuracy`` (on the class's own side; data: 0.841),
        ``shift`` (mean distance of a class from the middle; data: 1), ``std_along`` and ``std_across`` (within a class,
        on the first and second axis; data: 1), ``ced`` (conditional energy distance to 8,000 data points)."""
        points, labels = points.detach().double().cpu(), labels.cpu()
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

    def floor(self, n: int = 4_000, seed: int = 1) -> dict[str, float]:
        """:meth:`score` of ``n`` fresh data points."""
        fresh = self.data(n, seed)
        return self.score(fresh.array, fresh.labels)
