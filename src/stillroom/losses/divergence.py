"""f-divergences ``D_f(q||p) = E_p[f(r)], r = q/p``, expanded over noise levels (arXiv 2505.20755).

Each is given by ``C(r) = r^2 f''(r)`` and its derivatives, from which the three weights of the expanded gradient
follow: score-implicit ``C``, score-Fisher ``(C - r C') / 2`` and plain Diff-Instruct ``r^2 C'' / 2``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.errors import UserError, nearest

Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """``c``, ``c1``, ``c2``: C(r) and its first two derivatives. ``curved``: whether the second is anything but 0."""

    c: Curve
    c1: Curve
    c2: Curve
    curved: bool = True

    def fisher(self, r: Tensor) -> Tensor:
        return (self.c(r) - r * self.c1(r)) / 2

    def direct(self, r: Tensor) -> Tensor:
        return r**2 * self.c2(r) / 2


def _mix(reverse: float, forward: float) -> Divergence:
    return Divergence(
        c=lambda r: reverse + forward * r,
        c1=lambda r: torch.full_like(r, forward),
        c2=torch.zeros_like,
        curved=False,
    )


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": _mix(1.0, 0.0),
    "forward_kl": _mix(0.0, 1.0),
    "jeffreys": _mix(0.6, 0.4),
    "js": Divergence(
        c=lambda r: r / (r + 1),
        c1=lambda r: (r + 1) ** -2,
        c2=lambda r: -2 * (r + 1) ** -3,
    ),
    "chi2": Divergence(
        c=lambda r: 2 * r**2,
        c1=lambda r: 4 * r,
        c2=lambda r: torch.full_like(r, 4.0),
    ),
    "hellinger": Divergence(
        c=lambda r: r**0.5 / 2,
        c1=lambda r: r**-0.5 / 4,
        c2=lambda r: -(r**-1.5) / 8,
    ),
}


def get_divergence(name: str) -> Divergence:
    if name not in DIVERGENCES:
        raise UserError(
            f"unknown divergence {name!r}{nearest(name, DIVERGENCES)}", cure=f"one of: {', '.join(DIVERGENCES)}"
        )
    return DIVERGENCES[name]


def density_ratio(logits: Tensor, limit: float = 10.0, low: float = 1e-3, high: float = 1e3) -> Tensor:
    """``r = q / p = exp(logit)`` per sample ``[B]`` from the mean logit of a discriminator of real (q) against
    generated (p), clamped."""
    return logits.reshape(len(logits), -1).mean(1).clamp(-limit, limit).exp().clamp(low, high)
