"""The rectified flow of data N(m, s^2): its velocity, its paths, and their mean velocities, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

M, S = 0.7, 0.4


def _of(t: Tensor, x: Tensor, m: float, s: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``x_t``."""
    t = t.reshape(-1, *(1,) * (x.ndim - 1))
    return (1 - t) * m, ((1 - t).square() * s**2 + t.square()).sqrt()


def velocity(x: Tensor, t: Tensor, m: float = M, s: float = S) -> Tensor:
    """``E[z - x0 | x_t]``."""
    mean, std = _of(t, x, m, s)
    share = t.reshape(-1, *(1,) * (x.ndim - 1))
    return (share - (1 - share) * s**2) / std.square() * (x - mean) - m


def arrives(x: Tensor, t: Tensor, r: Tensor, m: float = M, s: float = S) -> Tensor:
    """Where the path through ``x`` at t is at r: it keeps its standardised place."""
    (mean, std), (mean_r, std_r) = _of(t, x, m, s), _of(r, x, m, s)
    return mean_r + std_r / std * (x - mean)


def mean_velocity(x: Tensor, t: Tensor, r: Tensor, m: float = M, s: float = S) -> Tensor:
    """``(x_t - x_r) / (t - r)``; where the two are equal, the velocity."""
    length = (t - r).reshape(-1, *(1,) * (x.ndim - 1))
    jumped = (x - arrives(x, t, r, m, s)) / length.clamp_min(1e-12)
    return torch.where(length > 1e-9, jumped, velocity(x, t, m, s))
