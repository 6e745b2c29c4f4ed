"""Points whose noised density, score and posterior mean are known exactly.

A Gaussian mixture under ``x_t = alpha x0 + sigma eps`` stays one, so the perfect teacher is a formula and a proof about
score distillation takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillroom.data.source import LABELS
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.process import Process


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
