"""Losses of networks that jump: F(x, t, r), the mean velocity of a flow's path from time t to r below it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.diffusion.process import expand


def integral(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, t: Tensor, r: Tensor, steps: int
) -> Tensor:
    """``I = sum F(x_i, t_i, t_i+1) (t_i - t_i+1)`` over ``steps`` equal steps of ``x [B, ...]`` from t to r ``[B]``,
    each of which moves x by its own part."""
    whole = torch.zeros_like(x)
    times = [t + (r - t) * i / steps for i in range(steps + 1)]
    for start, end in zip(times[:-1], times[1:], strict=True):
        moved = expand(start - end, x) * velocity(x, start, end)
        x, whole = x - moved, whole + moved
    return whole


def jump_residual(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    said: Tensor,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    v: Tensor,
    delta: float,
    order: int,
) -> Tensor:
    """``D = ((t - r) F - I - delta v) / delta``: what F = ``said`` is off from a first small step along ``v`` and
    ``order`` jumps of ``velocity`` from there to r; for jumps shorter than delta ``F - v`` (arXiv 2512.05150's code).
    0 where ``said`` is the mean velocity of the path. No division by t - r, which may be 0."""
    short = t - r < delta
    after = torch.where(short, r, t - delta)
    rest = integral(velocity, x - delta * v, after, r, order)
    far = (expand(t - r, x) * said - rest) / delta - v
    return torch.where(expand(short, x), said - v, far)


def barron(said: Tensor, target: Tensor, scale: float = 1e-3) -> Tensor:
    """``(m / c) sg[(m / c^2 + 1)^(-1/2)]`` per sample ``[B]``, m the mean squared error over its elements, c ``scale``:
    about the root of m, with its gradient halved (arXiv 2512.05150's code; 1701.03077 with alpha = 1)."""
    m = (said - target).square().flatten(1).mean(1)
    return m / scale * (m.detach() / scale**2 + 1).rsqrt()
