"""Losses of students that jump along the path of a probability-flow ODE, in continuous time or by small steps.

Continuous consistency is in TrigFlow's units: ``u = cos(t) x0 + sin(t) eps``, ``F`` the network's velocity there, and
``f(u, t) = cos(t) u - sin(t) F(u, t)`` (arXiv 2410.11081, eq. 4-5). Mean velocities are those of a rectified flow,
``x_t = (1 - t) x0 + t eps``: ``F(x, t, r)`` leads from x at t to ``x - (t - r) F`` at r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.derivatives import How, jvp, replayed
from stillroom.diffusion.process import Process, TrigFlow, expand, last_time
from stillroom.diffusion.sampling import heun_step
from stillroom.diffusion.times import TimeLaw
from stillroom.draws import Draws

TRIG = TrigFlow()

FIRST = 1e-4
"""Of the last time, the least that a network is asked at."""
NEAR_ENOUGH = 0.2
"""Of the ratio of noise that a step begins at, what it leads to at least, if an x0-prediction is to correct it."""
Norm = Literal["rms", "l2"]
"""Of a sample's tangent: root of the mean square over its elements, or of their sum of squares."""


def trig_times(law: TimeLaw, draw: Draws, std: float, process: Process, like: Tensor) -> Tensor:
    """TrigFlow's times ``[B]`` whose ``log(std tan t)`` is drawn by ``law`` (arXiv 2410.11081, sec. 3), to the last one
    that ``process`` knows."""
    t = replace(law, mean=law.mean - math.log(std)).sample(draw, TRIG).to(like)
    return t.clamp(max=last_time(process, TRIG))


def scm_tangent(own: Tensor, other: Tensor, slope: Tensor, u: Tensor, t: Tensor, warm: Tensor | float = 1.0) -> Tensor:
    """``-cos^2(t) (F - du/dt) - r (cos t sin t u + J)``, which is ``cos(t) df/dt`` where r = 1: f moves against its own
    change where F moves along this (arXiv 2410.11081, eq. 6 and alg. 1; 2503.09641, alg. 1).

    own: F; other: du/dt, the velocity of the path that the student is to be consistent on; both ``[B, ...]`` like
    ``u``, without a graph. slope: J, the derivative of F along ``cos t sin t (du/dt, 1)``: the factor is inside. warm:
    r, which grows from 0 to 1, or one for each sample ``[B]``.
    """
    cos, sin = expand(t.cos(), u), expand(t.sin(), u)
    warm = expand(warm, u) if isinstance(warm, Tensor) else warm
    return -(cos**2) * (own - other) - warm * (cos * sin * u + slope)


def bound(t: Tensor, ratio: float, warm: float) -> Tensor | float:
    """r of :func:`scm_tangent`: 0 where TrigFlow's ``tan t`` is below ``ratio``, where F learns the path's own velocity
    and nothing else; ``warm`` elsewhere. A network that predicts x0 is bound to nothing where there is no noise, and
    may come to say one picture of all that it is shown, which is consistent; it is bound to the path so."""
    return torch.where(t.tan() < ratio, 0.0, warm) if ratio else warm


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


def evened(process: Process, prediction: str, t: Tensor) -> Tensor:
    """``(d out / d v)^2 [B]``: what a loss of velocities at ``t [B]`` is multiplied by where a network's output is not
    the velocity, so that a step moves v as far as that of one which predicts it; 1 for such a one.

    Where the output is x0, v is ``1 / sigma`` times as sensitive (TrigFlow: ``F = (cos(t) u - x0) / sin(t)``), and
    the smallest times would have nearly all of the gradient; where it is eps, ``1 / alpha`` times, and the last would.
    """
    (p, q), alpha, sigma = process.velocity_weights(t), process.alpha(t), process.sigma(t)
    if prediction == "x0":
        return (sigma / (p * sigma - q * alpha)).square()
    if prediction == "eps":
        return (alpha / (q * alpha - p * sigma)).square()
    return torch.ones_like(t)


class Change(NamedTuple):
    """own: F with a graph. tangent: how f changes along the path, without one; both ``[B, ...]``."""

    own: Tensor
    tangent: Tensor


def scm_change(
    ask: Callable[[Tensor, Tensor], Tensor],
    velocity: Tensor,
    u: Tensor,
    t: Tensor,
    warm: Tensor | float = 1.0,
    how: How = "exact",
    step: float = 1e-3,
) -> Change:
    """:func:`scm_tangent` of a student. ask: ``(u, t)`` to F; velocity: du/dt of the path, ``[B, ...]``."""
    factor = t.cos() * t.sin()
    ask = replayed(ask, u)
    _, slope = jvp(ask, (u, t), (expand(factor, u) * velocity, factor), how, step)
    own = ask(u, t)
    return Change(own, scm_tangent(own.detach(), velocity, slope, u, t, warm))


def map_change(
    ask: Callable[[Tensor, Tensor, Tensor], Tensor],
    velocity: Tensor,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    warm: float = 1.0,
    how: How = "exact",
    step: float = 1e-3,
) -> Change:
    """``v - F - q (t - r) dF/dt``, the change of ``x - (t - r) F(x, t, r)`` along the path where q = 1, and 0 for mean
    velocities (arXiv 2505.13447, eq. 6 and 9; 2506.14603, sec. 3.2). ask: ``(x, t, r)`` to F. velocity: v of the path,
    ``[B, ...]``. warm: q."""
    ask = replayed(ask, x)
    _, slope = jvp(lambda x, t: ask(x, t, r), (x, t), (velocity, torch.ones_like(t)), how, step)
    own = ask(x, t, r)
    return Change(own, velocity - own.detach() - warm * expand(t - r, x) * slope)


def adaptive(tangent: Tensor, power: float = 1.0, c: float = 1e-3) -> Tensor:
    """``1 / (|g|^2 + c)^power`` per sample ``[B]``, of the mean square over elements (arXiv 2505.13447, sec. 4.3)."""
    return (tangent.flatten(1).square().mean(1) + c) ** -power


def noise_ratio(process: Process, t: Tensor) -> Tensor:
    """``sigma / alpha``, finite where nothing of the signal is left."""
    return process.sigma(t) / process.alpha(t).clamp_min(1e-6)


def earlier(process: Process, t: Tensor, gap: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """The time at which a consistency model is asked beside ``t [B]``: ``r = s (1 - gap n(s))`` in ratios of noise to
    signal, ``n(s) = 1 + k / (1 + exp(b s))``, at least 0 (arXiv 2406.14548, eq. 10). A gap of 1 leads to data, which is
    denoising."""
    ratio = noise_ratio(process, t)
    lower = ratio * (1 - gap * (1 + k * torch.sigmoid(-b * ratio))).clamp_min(0)
    found = process.time_of(torch.ones_like(lower), lower).to(t)
    return torch.where(lower > 0, found, torch.zeros_like(found))


def reached(
    process: Process,
    teacher: Denoiser | None,
    x0: Tensor,
    eps: Tensor,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Cond,
    guidance: float = 1.0,
) -> Tensor:
    """``x_r``, which has the noise of ``x_t`` or, with a teacher, is reached by a Heun step of it. t, r: ``[B]``.

    Where the teacher predicts x0, steps to much smaller noise are Euler's: its slope there is ``(x - x0) / sigma``, the
    error of x0 over next to nothing, as arXiv 2206.00364, alg. 1, leaves the correction at 0 away."""
    if teacher is None:
        return process.add_noise(x0, eps, r)
    far = noise_ratio(process, r) < NEAR_ENOUGH * noise_ratio(process, t)
    euler = far if teacher.prediction in ("x0", "edm") else None
    return heun_step(teacher, x_t, t, r.clamp_min(FIRST * process.t_max), cond, guidance, euler)


def pulled(student: Denoiser, x_r: Tensor, r: Tensor, cond: Cond) -> Tensor:
    """What a consistency model is pulled to: the student's x0-prediction at ``x_r``, or ``x_r`` itself where r is 0."""
    above = r.clamp_min(FIRST * student.process.t_max)
    return torch.where(expand(r > 0, x_r), student(x_r, above, cond).x0, x_r)


def huber(said: Tensor, target: Tensor, c: float = 0.0) -> Tensor:
    """``sqrt(|said - target|^2 + c^2) - c`` per sample ``[B]``, the norm over all elements; for c = 0 the distance
    (arXiv 2310.14189, sec. 3.3; 2406.14548, sec. 3.2)."""
    squared = (said - target.detach()).flatten(1).square().sum(1)
    return (squared + max(c, 1e-6) ** 2).sqrt() - c
