"""The one score-difference loss, with plug-ins, and the fake score's own loss.

With ``D_r`` the teacher's ("real") and ``D_f`` the fake score's x0-predictions at ``x_t``, ``d = D_f - D_r`` and
``e = D_f - x0``, per sample and summed over elements:

    L = omega * n * ( l_di <sg d, x0> - l_sim <psi(d), e> + l_fgm |d|^2 )

where psi(d) = d is the gradient of |d|^2 / 2. For another distance D, psi is its gradient and the last part
``2 l_fgm D(d)``.

Network parameters are frozen by the turn; the graph through ``x0`` and ``x_t`` is kept unless something is ``sg``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.process import EDM, Process, expand

HEALTH = {
    "fake_error": "the fake score's denoising loss on the student's samples, of the kind that fake_loss names: how "
    "well it follows the student",
    "score_gap": "mean of (D_f - D_r)^2 over elements and batch, D_f and D_r the fake score's and the teacher's "
    "x0-predictions at x_t, under the guidance that each has in the loss: 0 where the student's distribution is the "
    "teacher's and both are asked as they were trained; with guidance in one of them it levels off above 0",
    "sample_std": "standard deviation of all elements of a batch of the student's samples: falls where they collapse",
}
"""What methods of this kind note in a run."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample, ``[B]``."""
    return (a * b).flatten(1).sum(1)


def square(a: Tensor) -> Tensor:
    """Squared norm per sample, ``[B]``."""
    return dot(a, a)


@dataclass(frozen=True)
class Distance:
    """A distance of two predictions as a function of their difference ``d [B, ...]``, by its norm over all elements of
    a sample. ``value``: ``D(d) [B]``; ``psi``: the gradient of D, like d."""

    value: Callable[[Tensor], Tensor]
    psi: Callable[[Tensor], Tensor]


SQUARED = Distance(value=lambda d: square(d) / 2, psi=lambda d: d)
"""``|d|^2 / 2``: SiD's, and SIM's L2 ablation."""


def pseudo_huber(c: Tensor | float) -> Distance:
    """``sqrt(|d|^2 + c^2) - c``, psi(d) = d / sqrt(|d|^2 + c^2) (arXiv 2410.16794, section 3). ``c``: a number or
    ``[B]``."""
    return Distance(
        value=lambda d: (square(d) + c * c).sqrt() - c,
        psi=lambda d: d * expand((square(d) + c * c).rsqrt(), d),
    )


def power(beta: float) -> Distance:
    """``|d|^beta``, psi(d) = beta |d|^(beta - 2) d, beta > 1 (arXiv 2410.16794)."""
    return Distance(
        value=lambda d: square(d).clamp_min(1e-20) ** (beta / 2),
        psi=lambda d: beta * d * expand(square(d).clamp_min(1e-20) ** (beta / 2 - 1), d),
    )


def mean_abs_normaliser(x0: Tensor, real: Tensor, floor: float = 1e-5) -> Tensor:
    """``1 / mean |x0 - D_r|`` per sample ``[B]``, detached: DMD's and SiD's normaliser (arXiv 2311.18828, eq. 8)."""
    return 1 / (x0 - real).detach().abs().flatten(1).mean(1).clamp_min(floor)


def moment_loss(x0: Tensor, mean: float, variance: float) -> Tensor:
    """``KL(N(mu_i, v_i) | N(mean, variance))`` of the mean and the variance over all elements of each sample, averaged
    over the batch ``[B, ...]``: a scalar (arXiv 2511.22677, eq. 7)."""
    own_mean, own = x0.flatten(1).mean(1), x0.flatten(1).var(1, unbiased=False).clamp_min(1e-8)
    return 0.5 * ((own + (own_mean - mean) ** 2) / variance - 1 - (own / variance).log()).mean()


def score_difference_loss(
    x0: Tensor,
    fake: Tensor,
    real: Tensor,
    *,
    di: Tensor | float = 0.0,
    sim: Tensor | float = 0.0,
    fgm: Tensor | float = 0.0,
    distance: Distance = SQUARED,
    own: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """The generic loss, averaged over the batch: a scalar.

    x0, fake, real: generated data and the two x0-predictions at its noised version, ``[B, ...]``.
    di, sim, fgm: weights of the three parts, numbers or ``[B]``; parts with weight 0 are not computed.
    distance: what psi is the gradient of.
    own: the fake score's x0-prediction inside e, where it is asked there under a guidance of its own.
    weight: ``omega * n`` per sample, detached by the caller where its paper says so.
    Minimising moves x0 from the fake towards the real prediction.
    """
    d = fake - real
    loss = torch.zeros(x0.shape[0], device=x0.device, dtype=x0.dtype)
    if not _is_zero(di):
        loss = loss + di * dot(d.detach(), x0)
    if not _is_zero(sim):
        loss = loss - sim * dot(distance.psi(d), (fake if own is None else own) - x0)
    if not _is_zero(fgm):
        loss = loss + 2 * fgm * distance.value(d)
    return (weight * loss).mean()


def _is_zero(weight: Tensor | float) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def snr_weight(process: Process, t: Tensor) -> Tensor:
    """EDM's weight ``(sigma^2 + sd^2) / (sigma sd)^2`` at the noise-to-signal ratio of ``t``, sd = 0.5, ``[B]``
    (arXiv 2206.00364, Table 1). For EDM itself its own sigma_data."""
    sd = process.sigma_data if isinstance(process, EDM) else 0.5
    ratio = process.sigma(t) / process.alpha(t).clamp_min(1e-4)
    return (ratio**2 + sd**2) / (ratio * sd).clamp_min(1e-4) ** 2


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean squared error over elements, weighted per sample ``[B]``, averaged over the batch: a scalar."""
    return (weight * (prediction - target).square().flatten(1).mean(1)).mean()


FakeLoss = Literal["v", "eps", "x0", "snr"]


def fake_score_loss(p: Prediction, x0: Tensor, eps: Tensor, kind: FakeLoss = "v") -> Tensor:
    """The fake score's denoising loss on generated ``x0`` noised by ``eps``: mean squared error of the chosen view of
    the prediction ``p``; ``snr`` is EDM's weighted x0 error."""
    if kind == "x0":
        return denoising_loss(p.x0, x0)
    if kind == "snr":
        return denoising_loss(p.x0, x0, snr_weight(p.process, p.t))
    if kind == "eps":
        return denoising_loss(p.eps, eps)
    on_x0, on_eps = (expand(c, x0) for c in p.process.velocity_weights(p.t))
    return denoising_loss(p.v, on_x0 * x0 + on_eps * eps)
