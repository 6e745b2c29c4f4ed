"""Samplers: how a finished model is run. Each is data (saved beside the weights) plus one pure function.

All ODE solvers work on the process normalised by ``alpha + sigma``, i.e. as a rectified flow in ``u = sigma / (alpha +
sigma)``: regular at both ends for every process, and there Euler is exactly DDIM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import VP, Process, RectifiedFlow, expand
from stillroom.draws import Draws
from stillroom.errors import UserError

Renoise = Literal["fresh", "fixed", "ddim"]


def ddim_step(p: Prediction, process: Process, s: Tensor) -> Tensor:
    """From ``x_t`` to ``x_s`` along the ODE with the prediction held fixed: ``alpha_s x0 + sigma_s eps`` (Euler)."""
    return process.alpha(s) * p.x0 + process.sigma(s) * p.eps


def jump(p: Prediction, s: Tensor) -> Tensor:
    """:func:`ddim_step` with a time ``s <= p.t`` for each sample, ``[B]``; the identity where the two are equal, also
    at time 0, where an x0-prediction has no eps."""
    process, t = p.process, p.t
    ratio = process.sigma(s) / process.sigma(t).clamp_min(torch.finfo(p.x_t.dtype).tiny)
    ratio = torch.where(s == t, torch.ones_like(ratio), ratio)
    return expand(ratio, p.x_t) * p.x_t + expand(process.alpha(s) - ratio * process.alpha(t), p.x_t) * p.x0


def heun_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    guidance: float,
    euler: Tensor | None = None,
) -> Tensor:
    """Second order: Euler, then the mean of both ends' slopes ``dy/du = eps - x0``, ``y = x / (alpha + sigma)``. Times
    ``[B]`` or scalars. euler: rows ``[B]`` that stay at the first order."""
    process = denoiser.process
    first = denoiser(x, t, cond, guidance)
    scale_t, scale_s = (expand(process.alpha(time) + process.sigma(time), x) for time in (t, s))
    u_t, u_s = expand(process.sigma(t), x) / scale_t, expand(process.sigma(s), x) / scale_s
    slope_t = first.eps - first.x0
    second = denoiser((x / scale_t + (u_s - u_t) * slope_t) * scale_s, s, cond, guidance)
    slope = (slope_t + second.eps - second.x0) / 2
    if euler is not None:
        slope = torch.where(expand(euler, x), slope_t, slope)
    return (x / scale_t + (u_s - u_t) * slope) * scale_s


def ancestral_step(p: Prediction, process: Process, t: Tensor, s: Tensor, eta: float, noise: Tensor) -> Tensor:
    """DDPM's posterior step; ``eta`` = 0 is DDIM, 1 is ancestral (arXiv 2010.02502, eq. 16)."""
    a_t, s_t, a_s, s_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    fresh = eta * s_s / s_t * (s_t**2 - (a_t / a_s * s_s) ** 2).clamp_min(0).sqrt()
    return a_s * p.x0 + (s_s**2 - fresh**2).clamp_min(0).sqrt() * p.eps + fresh * noise


def fresh_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal, drawn where the generator is (on the CPU where there is none) and brought to ``like``."""
    place = "cpu" if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=place).to(like)


def visited(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    cond: Cond,
    guidance: Tensor | float = 1.0,
    eta: float = 0.0,
    fresh: Callable[[], Tensor] | None = None,
) -> Iterator[Prediction]:
    """The answers at each step of a sampler from ``noise [B, ...]`` over ``times [T + 1]``, the last of which is the
    end: deterministic (DDIM), or with ``eta`` above 0 and ``fresh`` noise as :func:`ancestral_step` does. The last
    answer's ``x0`` is the sample."""
    process, x = denoiser.process, denoiser.process.sigma(times[0]) * noise
    for t, s in itertools.pairwise(times):
        p = denoiser(x, t, cond, guidance)
        yield p
        if eta and fresh is not None and s > 0:
            x = ancestral_step(p, process, t, s, eta, fresh())
        elif s is not times[-1]:
            x = ddim_step(p, process, s)


SAMPLERS: dict[str, type[Sampler]] = {}
"""Every sampler whose module has been imported, by name."""


class Sampler:
    """Base. ``sample`` turns unit noise ``[B, ...]`` into data ``[B, ...]``; ``generator`` feeds fresh noise."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        SAMPLERS[cls.name] = cls

    @property
    def nfe(self) -> int:
        """Network evaluations per sample (a guided evaluation counts as two)."""
        raise NotImplementedError

    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        raise NotImplementedError

    def shortest(self) -> Sampler:
        """One that draws something of the same shape with less work, for who asks for no more."""
        return self

    def conditions(self, rows: int) -> Cond:
        """What it tells the network besides the user's conditions, ``[rows]`` each."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class ODESampler(Sampler):
    """Many-step deterministic sampling: Euler (= DDIM), Heun (arXiv 2206.00364, Alg. 1), DPM++(2M) (2211.01095)."""

    name: ClassVar[str] = "ode"
    solver: Literal["euler", "heun", "dpm++"] = "heun"
    steps: int = 25
    guidance: float = 1.0

    @property
    def nfe(self) -> int:
        calls = 2 * self.steps - 1 if self.solver == "heun" else self.steps
        return calls * (1 if self.guidance in (0.0, 1.0) else 2)

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        process, cond = denoiser.process, cond or {}
        times = process.grid(self.steps).to(noise)
        x = process.sigma(times[0]) * noise
        previous: tuple[Tensor, Tensor] | None = None  # DPM++'s last x0 and the ratio of its step
        for t, s in zip(times[:-2], times[1:-1], strict=True):
            if self.solver == "heun":
                x = heun_step(denoiser, x, t, s, cond, self.guidance)
            elif self.solver == "euler":
                x = ddim_step(denoiser(x, t, cond, self.guidance), process, s)
            else:
                x, previous = _dpm_step(denoiser(x, t, cond, self.guidance), process, t, s, previous)
        return denoiser(x, times[-2], cond, self.guidance).x0  # the last step goes all the way to clean data


@dataclass(frozen=True)
class ScaleSampler(ODESampler):
    """An :class:`ODESampler` for networks that have the guidance ``scale`` as an input: one evaluation per step and not
    two. A scale of 0 tells them nothing."""

    name: ClassVar[str] = "scale"
    scale: float = 1.5

    def conditions(self, rows: int) -> Cond:
        return {"guidance_scale": torch.full((rows,), self.scale)} if self.scale else {}

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        own = {name: value.to(noise) for name, value in self.conditions(len(noise)).items()}
        return super().sample(denoiser, noise, {**(cond or {}), **own}, generator)


def _dpm_step(
    p: Prediction, process: Process, t: Tensor, s: Tensor, previous: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One DPM++(2M) step with ``h`` the step in log(alpha / sigma); first order at the start."""
    a_t, s_t, a_s, s_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    ratio = s_s * a_t / (s_t * a_s)  # exp(-h)
    h = -ratio.log()
    target = p.x0
    if previous is not None:
        r = previous[1] / h
        target = p.x0 + (p.x0 - previous[0]) / (2 * r)
    return s_s / s_t * p.x_t + a_s * (1 - ratio) * target, (p.x0, h)


@dataclass(frozen=True)
class AncestralSampler(Sampler):
    """Stochastic many-step sampling (DDPM's posterior at ``eta`` = 1)."""

    name: ClassVar[str] = "ancestral"
    steps: int = 50
    eta: float = 1.0
    guidance: float = 1.0

    @property
    def nfe(self) -> int:
        return self.steps * (1 if self.guidance in (0.0, 1.0) else 2)

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        process = denoiser.process
        times = process.grid(self.steps).to(noise)
        x = process.sigma(times[0]) * noise
        for t, s in zip(times[:-2], times[1:-1], strict=True):
            p, noise = denoiser(x, t, cond, self.guidance), fresh_noise(x, generator)
            x = ancestral_step(p, process, t, s, self.eta, noise)
        return denoiser(x, times[-2], cond, self.guidance).x0


@dataclass(frozen=True)
class FewStepSampler(Sampler):
    """Predict x0, noise it again to the next time, repeat; return the last x0 (consistency and score distillation).

    times: decreasing, as fractions of the process's ``t_max``.
    renoise: ``fresh`` noise at each step, the ``fixed`` first noise, or the ``ddim`` noise that the prediction implies.
    """

    name: ClassVar[str] = "few-step"
    times: tuple[float, ...] = (1.0,)
    renoise: Renoise = "fresh"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        if not self.times or any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"few-step times must decrease strictly, got {self.times}")

    @property
    def nfe(self) -> int:
        return len(self.times) * (1 if self.guidance in (0.0, 1.0) else 2)

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        process, eps = denoiser.process, noise
        p: Prediction | None = None
        for fraction in self.times:
            t = torch.full((), fraction * process.t_max, dtype=noise.dtype, device=noise.device)
            if p is not None and self.renoise == "fresh":
                eps = fresh_noise(noise, generator)
            elif p is not None and self.renoise == "ddim":
                eps = p.eps
            x = process.sigma(t) * eps if p is None else process.add_noise(p.x0, eps, t)
            p = denoiser(x, t, cond, self.guidance)
        assert p is not None
        return p.x0


@dataclass(frozen=True)
class FlowMapSampler(FewStepSampler):
    """A :class:`FewStepSampler` for networks that are told a second time: ``to`` which each call leads. ``end``: to 0,
    and the sample is noised anew to the next time; ``next``: to the next time itself, without new noise; ``here``:
    nowhere, which makes it an ordinary sampler of the path (with ``renoise: ddim``). The second time is a rectified
    flow's, from 0 to 1, whatever the network's process."""

    name: ClassVar[str] = "flow-map"
    to: Literal["end", "next", "here"] = "end"

    def conditions(self, rows: int) -> Cond:
        if self.to != "end":
            raise UserError(
                "a pipeline tells its network one second time for all steps",
                cure="one step (options.steps=1; of twinflow options.to=end)",
            )
        return {"r": torch.zeros(rows)}

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        if self.to == "end":
            own = {"r": noise.new_zeros(len(noise))}
            return super().sample(denoiser, noise, {**(cond or {}), **own}, generator)
        process, flow = denoiser.process, RectifiedFlow()
        x = process.sigma(noise.new_tensor(self.times[0] * process.t_max)) * noise
        for here, following in itertools.pairwise((*self.times, 0.0)):
            t, s = (noise.new_tensor(share * process.t_max) for share in (here, following))
            told = s if self.to == "next" else t
            r = flow.time_of(process.alpha(told), process.sigma(told))
            r = r if following or self.to == "here" else 0 * r  # clean data, also where time 0 has noise left
            p = denoiser(x, t, {**(cond or {}), "r": r.expand(len(noise))}, self.guidance)
            x = ddim_step(p, process, s) if following else p.x0
        return x


def flow_map_steps(steps: int) -> FlowMapSampler:
    """So many even steps, each to the next time; a single one to the end."""
    return FlowMapSampler(few_step_times(steps), to="end" if steps == 1 else "next")


def signal(denoiser: Denoiser, eps: Tensor, t: Tensor, cond: Cond, start: float) -> Tensor:
    """What a network says of the noise ``eps [B, ...]`` that a path begins with and of times ``t [B]`` on it: fed pure
    noise whatever the time, its output read as at the first time, ``start`` of ``t_max`` (arXiv 2306.05544)."""
    top = torch.full_like(t, start * denoiser.process.t_max)
    x = expand(denoiser.process.sigma(top), eps) * eps
    return Prediction(denoiser.process, denoiser.prediction, denoiser.native(x, t, cond), x, top).x0


@dataclass(frozen=True)
class SignalSampler(Sampler):
    """One step of a network that maps noise and a time to the signal of its path: asked at the time ``end``, read as at
    ``start``, both as shares of ``t_max``. predicts: the signal itself, or the state ``alpha y + sigma eps``."""

    name: ClassVar[str] = "signal"
    end: float = 0.01
    start: float = 0.99
    predicts: Literal["signal", "state"] = "signal"

    @property
    def nfe(self) -> int:
        return 1

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        t = noise.new_full((len(noise),), self.end * denoiser.process.t_max)
        said = signal(denoiser, noise, t, cond or {}, self.start)
        if self.predicts == "signal":
            return said
        alpha, sigma = (expand(rate, noise) for rate in (denoiser.process.alpha(t), denoiser.process.sigma(t)))
        return (said - sigma * noise) / alpha


@dataclass(frozen=True)
class ScaleFewStepSampler(FewStepSampler):
    """A :class:`FewStepSampler` for networks that have the guidance ``scale`` as an input; a scale of 0 tells them
    nothing."""

    name: ClassVar[str] = "few-step-scale"
    scale: float = 4.5

    def conditions(self, rows: int) -> Cond:
        return {"guidance_scale": torch.full((rows,), self.scale)} if self.scale else {}

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        own = {name: value.to(noise) for name, value in self.conditions(len(noise)).items()}
        return super().sample(denoiser, noise, {**(cond or {}), **own}, generator)


@dataclass(frozen=True)
class SteeredSampler(FewStepSampler):
    """A :class:`FewStepSampler` that says how hard its network is steered away from a negative text, where it is given
    one (:mod:`stillroom.surgery.negatives`): ``negative_scale`` is alpha, which each backbone has one of its own of."""

    name: ClassVar[str] = "few-step-steered"
    negative_scale: float = 0.5


@dataclass(frozen=True)
class TCDSampler(FewStepSampler):
    """Trajectory consistency sampling (arXiv 2402.19159, alg. 4; diffusers' TCDScheduler): from t to the next time p by
    way of ``s = (1 - eta) p``, a whole number for VP:

        x_s = alpha_s x0 + sigma_s eps,    x_p = r x_s + sqrt(sigma_p^2 - r^2 sigma_s^2) z,    r = alpha_p / alpha_s

    The last step ends at time 0 of the process, without z. eta: 0 is DDIM, 1 noises x0 afresh. ``renoise`` is not read.
    """

    name: ClassVar[str] = "tcd"
    eta: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta lies in 0 to 1, got {self.eta}")

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        process = denoiser.process
        times = [torch.full((), f * process.t_max, dtype=noise.dtype, device=noise.device) for f in (*self.times, 0.0)]
        x = process.sigma(times[0]) * noise
        for k, (t, p) in enumerate(itertools.pairwise(times), 1):
            s = (1 - self.eta) * p
            s = s.floor() if isinstance(process, VP) and self.eta else s
            x = jump(denoiser(x, t, cond, self.guidance), s)
            if self.eta and k < len(self.times):
                rest = process.alpha(p) / process.alpha(s)
                left = (process.sigma(p) ** 2 - (rest * process.sigma(s)) ** 2).clamp_min(0).sqrt()
                x = rest * x + left * fresh_noise(x, generator)
        return x


def sampler_from_dict(values: dict[str, Any]) -> Sampler:
    values = dict(values)
    return SAMPLERS[values.pop("name")](**values)


def few_step_times(steps: int, t_init: float = 1.0, shift: float = 1.0) -> tuple[float, ...]:
    """``t_init (1 - k / steps)``, k = 0 .. steps - 1: the evenly spaced schedule of DMD2 and few-step SiD. shift:
    of the shares ``u = 1 - k / steps`` towards noise, ``s u / (1 + (s - 1) u)``."""
    if steps < 1 or not 0 < t_init <= 1:
        raise ValueError(f"few-step times need steps >= 1 and t_init in (0, 1], got {steps} and {t_init}")
    if shift == 1:
        return tuple(t_init * (1 - k / steps) for k in range(steps))
    return tuple(t_init * shift * (steps - k) / (k + shift * (steps - k)) for k in range(steps))


def by_steps(own: int, steps: Iterable[int], sampler: Callable[[int], Sampler]) -> dict[str, Sampler]:
    """The samplers of other numbers of steps than ``own``, by name: "2 steps"."""
    return {f"{n} step{'s' if n > 1 else ''}": sampler(n) for n in steps if n != own}


def share_at(process: Process, alpha: float, sigma: float) -> float:
    """The time, as a share of ``t_max``, at which signal and noise are as ``alpha`` to ``sigma``. Raises UserError
    where the process has none between its ends."""
    parts = (torch.tensor(part, dtype=torch.float64) for part in (alpha, sigma))
    share = float(process.time_of(*parts)) / process.t_max
    if not 0 < share < 1:
        raise UserError(
            f"no time of the {process.name} process has noise and signal as {sigma:.4g} to {alpha:.4g}, "
            "which the second step is to have",
            cure="leave options.middle away, or make it smaller",
        )
    return share


def approach(
    student: Denoiser, draw: Draws, cond: Cond, times: tuple[float, ...], last: int = 0, renoise: Renoise = "fresh"
) -> tuple[Tensor, Tensor]:
    """``(x_in [B, ...], t)``: what a few-step student is asked at step ``last`` (from 0) of ``times``, and when;
    reached as at inference. No gradient."""
    process = student.process
    eps = draw.normal(draw.local, *student.shape).to(next(student.parameters()))
    # filled on the device: a number that is copied to it waits for all that the device has still to do
    ts = [torch.full((), t * process.t_max, dtype=eps.dtype, device=eps.device) for t in times[: last + 1]]
    x_in = process.sigma(ts[0]) * eps
    for t, s in itertools.pairwise(ts):
        with torch.no_grad():
            p = student(x_in, t, cond)
            if renoise == "fresh":
                eps = draw.normal_like(eps)
            elif renoise == "ddim":
                eps = p.eps
            x_in = process.add_noise(p.x0, eps, s)
    return x_in, ts[-1]


def rollout(
    student: Denoiser,
    draw: Draws,
    cond: Cond,
    times: tuple[float, ...],
    *,
    grad: bool,
    last: int | None = None,
    renoise: Renoise = "fresh",
) -> Tensor:
    """A training sample ``x0 [B, ...]`` of a few-step student, made exactly as at inference (backward simulation,
    arXiv 2405.14867, section 4.5): through ``times`` (fractions of ``t_max``) up to step ``last``.

    last: 0-based index of the step returned; by default one index drawn for the whole batch. Inputs are detached
    between steps, so only the last call carries a graph (and only if ``grad``).
    """
    last = draw.index(len(times)) if last is None and len(times) > 1 else (last or 0)
    x_in, t = approach(student, draw, cond, times, last, renoise)
    with torch.set_grad_enabled(grad):
        return student(x_in, t, cond).x0


@torch.no_grad()
def continued(student: Denoiser, draw: Draws, cond: Cond, x0: Tensor, times: tuple[float, ...]) -> Tensor:
    """Where a few-step student ends that has said ``x0 [B, ...]`` and has these ``times`` to go, with fresh noise at
    each step. Without any it is ``x0``. No gradient."""
    for fraction in times:
        t = torch.full((), fraction * student.process.t_max, dtype=x0.dtype, device=x0.device)
        x0 = student(student.process.add_noise(x0, draw.normal_like(x0), t), t, cond).x0
    return x0
