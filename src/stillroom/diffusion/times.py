"""Time laws: how training times are drawn, as data (so that a recipe can hold one)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.diffusion.process import EDM, Process, RectifiedFlow
from stillroom.draws import Draws


@dataclass(frozen=True)
class TimeLaw:
    """A law of ``t`` on a process.

    law:
      - ``uniform``: t uniform between the fractions ``low`` and ``high`` of ``t_max``;
      - ``logit-normal``: t / t_max = sigmoid(mean + std * n), n standard normal (arXiv 2403.03206), within [low, high];
      - ``log-normal``: log(sigma / alpha) = mean + std * n (EDM's law, arXiv 2206.00364, Table 1, on any process);
      - ``karras``: EDM's grid at a uniform position between ``low`` and ``high`` (SiD's generator law is 0 .. 0.8);
      - ``segments``: one of ``segments`` equal parts of [low, high] uniformly, its upper end.
    stratified: replace the uniform numbers behind the law by one per equal slice of [0, 1) (lower variance).
    at_max: with this probability t = high * t_max instead.
    shift: > 0 warps fractions towards noise, ``s u / (1 + (s - 1) u)``; 0 takes a rectified flow's own shift.
    """

    law: Literal["uniform", "logit-normal", "log-normal", "karras", "segments"] = "uniform"
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    segments: int = 4
    shift: float = 0.0
    stratified: bool = False
    at_max: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"a time law needs 0 <= low < high <= 1, got {self.low} and {self.high}")
        if self.std <= 0 or self.segments < 1 or not 0 <= self.at_max <= 1:
            raise ValueError("a time law needs std > 0, segments >= 1 and at_max in [0, 1]")

    def sample(self, draw: Draws, process: Process, below: float = 0.0, until: Tensor | float | None = None) -> Tensor:
        """Times ``[B]`` for this micro-batch. below: share of the law, its smallest times, that is left out. until: a
        time, or one for each row ``[B]``, that none exceeds: the law given that."""
        u = draw.uniform(draw.local)
        if self.stratified:
            order = torch.randperm(draw.total, generator=draw.generator, device=u.device)[draw.rows]
            u = (order + u) / draw.total
        if until is not None:
            u = u * self.share(torch.as_tensor(until, dtype=torch.float64, device=u.device), process).to(u)
        t = self.quantile(below + (1 - below) * u if below else u, process)
        if self.at_max and until is None:
            t = torch.where(draw.uniform(draw.local) < self.at_max, torch.full_like(t, self.high * process.t_max), t)
        return t

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """The law's quantile function: ``u`` in [0, 1) to times."""
        if self.law in ("logit-normal", "log-normal"):
            normal = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7)) * self.std + self.mean
            if self.law == "logit-normal":
                fraction = self._warp(torch.sigmoid(normal), process)
                return (fraction.clamp(self.low, self.high) * process.t_max).to(u)
            t = process.time_of(torch.ones_like(normal), normal.exp())
            return t.clamp(self.low * process.t_max, self.high * process.t_max).to(u)
        if self.law == "segments":
            part = (u * self.segments).floor() + 1
            fraction = self.low + (self.high - self.low) * part / self.segments
        else:
            fraction = self.low + (self.high - self.low) * u
        if self.law == "karras":
            sigma = (process if isinstance(process, EDM) else EDM()).karras(fraction)
            return process.time_of(torch.ones_like(sigma), sigma)
        return self._warp(fraction, process) * process.t_max

    def share(self, t: Tensor, process: Process) -> Tensor:
        """The law's distribution function: the share of times up to ``t``, in [0, 1], like ``t``. Under a shift it is
        found in unshifted time."""
        fraction = self._unwarp(t / process.t_max, process)
        if self.law == "logit-normal":
            found = torch.special.ndtr((torch.logit(fraction.clamp(0, 1)) - self.mean) / self.std)
        elif self.law == "log-normal":
            ratio = process.sigma(t) / process.alpha(t)
            found = torch.special.ndtr((ratio.log() - self.mean) / self.std)
        else:
            if self.law == "karras":
                edm = process if isinstance(process, EDM) else EDM()
                low, high = edm.sigma_min ** (1 / edm.rho), edm.sigma_max ** (1 / edm.rho)
                ratio = (process.sigma(t) / process.alpha(t)).clamp(edm.sigma_min, edm.sigma_max)
                fraction = (ratio ** (1 / edm.rho) - low) / (high - low)
            found = (fraction - self.low) / (self.high - self.low)
            if self.law == "segments":
                found = (found * self.segments + 1e-9).floor() / self.segments
        return found.clamp(0, 1)

    def _shift(self, process: Process) -> float:
        return self.shift or (process.shift if isinstance(process, RectifiedFlow) else 1.0)

    def _warp(self, fraction: Tensor, process: Process) -> Tensor:
        shift = self._shift(process)
        return shift * fraction / (1 + (shift - 1) * fraction)

    def _unwarp(self, fraction: Tensor, process: Process) -> Tensor:
        shift = self._shift(process)
        return fraction / (shift - (shift - 1) * fraction)


@dataclass(frozen=True)
class Segments:
    """Times ``0 .. steps`` of a grid in ``count`` equal segments (arXiv 2404.13686, sec. 3.1). A time belongs to the
    segment that it is the upper end of, or lies in: segments are open below, so that none of what is asked for is
    empty. Raises ValueError for a count that does not divide the steps.
    """

    steps: int
    count: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.count < 1 or self.steps % self.count:
            raise ValueError(f"{self.steps} steps cannot be cut into {self.count} equal segments")

    def start(self, n: Tensor) -> Tensor:
        """The lower end of the segment of grid times ``n`` in 1 .. steps, int64 ``[B]``."""
        size = self.steps // self.count
        return (n - 1) // size * size

    def end(self, n: Tensor, u: Tensor) -> Tensor:
        """A time to be consistent at, uniform in ``start(n) .. n - 1`` by ``u`` in [0, 1), ``[B]`` each."""
        low = self.start(n)
        return low + (u * (n - low)).long().clamp(max=n - low - 1)
