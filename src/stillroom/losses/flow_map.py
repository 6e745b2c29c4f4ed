"""Losses of students that jump along the path of a probability-flow ODE: consistency in continuous time.

Everything is in TrigFlow's units: ``u = cos(t) x0 + sin(t) eps``, ``F`` the network's velocity there, and the
consistency function ``f(u, t) = cos(t) u - sin(t) F(u, t)`` (arXiv 2410.11081, eq. 4-5).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stillroom.diffusion.process import expand

Norm = Literal["rms", "l2"]
"""Of a sample's tangent: root of the mean square over its elements, or of their sum of squares."""


def scm_tangent(own: Tensor, other: Tensor, slope: Tensor, u: Tensor, t: Tensor, warm: float = 1.0) -> Tensor:
    """``-cos^2(t) (F - du/dt) - r (cos t sin t u + J)``, which is ``cos(t) df/dt`` where r = 1: f moves against its own
    change where F moves along this (arXiv 2410.11081, eq. 6 and alg. 1; 2503.09641, alg. 1).

    own: F; other: du/dt, the velocity of the path that the student is to be consistent on; both ``[B, ...]`` like
    ``u``, without a graph. slope: J, the derivative of F along ``cos t sin t (du/dt, 1)``: the factor is inside. warm:
    r, which grows from 0 to 1.
    """
    cos, sin = expand(t.cos(), u), expand(t.sin(), u)
    return -(cos**2) * (own - other) - warm * (cos * sin * u + slope)


def normalised(tangent: Tensor, c: float = 0.1, norm: Norm = "rms") -> Tensor:
    """``g / (|g| + c)`` per sample (arXiv 2410.11081, sec. 4.2). With ``rms`` elements are of order one whatever the
    size of a sample; with ``l2`` they are smaller by the root of their number."""
    squares = tangent.flatten(1).square()
    length = (squares.mean(1) if norm == "rms" else squares.sum(1)).sqrt()
    return tangent / (expand(length, tangent) + c)


def towards(answer: Tensor, step: Tensor, weight: Tensor | float = 1.0, logvar: Tensor | None = None) -> Tensor:
    """``exp(-w) weight |answer - sg(answer) - step|^2 + w``, the mean over elements and batch: its gradient by
    ``answer [B, ...]`` is that of ``-2 weight exp(-w) <step, answer>``. logvar: w ``[B]``, learnt beside the network
    (arXiv 2410.11081, eq. 8); none: 0. step: without a graph."""
    error = (answer - answer.detach() - step.detach()).square().flatten(1).mean(1)
    if logvar is None:
        return (weight * error).mean()
    return (weight * torch.exp(-logvar) * error + logvar).mean()
