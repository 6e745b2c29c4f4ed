"""Forward corruptions ``x_t = alpha(t) x0 + sigma(t) eps`` and the way from one to another.

``t`` runs from 0 (data) to ``t_max`` (noise). Coefficients take and return tensors of the shape of ``t`` and are
differentiable in ``t``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from stillroom.errors import UserError, nearest

Make = TypeVar("Make", bound=Callable[..., Any])


def tabulated(make: Make) -> Make:
    """``make``, whose answers are kept. They hold ordinary tensors, also where a plan is the first to ask: fake ones
    would be kept for whoever trains in the same process afterwards."""

    @functools.lru_cache(maxsize=32)
    @functools.wraps(make)
    def kept(*args: Any) -> Any:
        with _disable_current_modes():
            return make(*args)

    return cast(Make, kept)


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """``[B]`` (or scalar) coefficients shaped to multiply ``like`` of shape ``[B, ...]``."""
    return (
        coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))
        if coefficient.ndim
        else coefficient
    )


@dataclass(frozen=True)
class Process:
    """Base of all Gaussian processes."""

    name: ClassVar[str]

    @property
    def t_max(self) -> float:
        """Time of the largest noise, in this process's own units."""
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Signal rate."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Noise rate."""
        raise NotImplementedError

    def velocity_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(p, q)`` of the velocity target ``v = p x0 + q eps`` that networks of this process are trained on."""
        raise NotImplementedError

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The time at which the signal-to-noise ratio is that of the pair ``(alpha, sigma)`` (any common scale)."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """The number that a network of this process is fed for time ``t``."""
        return t

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of shape ``[B, ...]`` from data, unit noise and times ``[B]`` (or one scalar time)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def grid(self, steps: int) -> Tensor:
        """``steps + 1`` decreasing times from ``t_max`` to 0: the process's usual sampling grid (float64)."""
        return torch.linspace(self.t_max, 0.0, steps + 1, dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """``alpha = 1 - t, sigma = t, v = eps - x0`` on [0, 1] (arXiv 2209.03003). ``shift`` warps grids and time laws
    towards noise as in SD3 (arXiv 2403.03206, eq. 23); networks are fed ``time_scale * t``."""

    name: ClassVar[str] = "rectified-flow"
    shift: float = 1.0
    time_scale: float = 1000.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def velocity_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        if self.time_scale == 1000.0:  # as everywhere; files do not say it
            del found["time_scale"]
        return found

    def warp(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def grid(self, steps: int) -> Tensor:
        return self.warp(super().grid(steps))


@dataclass(frozen=True)
class TrigFlow(Process):
    """``alpha = cos t, sigma = sin t, v = cos(t) eps - sin(t) x0`` on [0, pi/2] (arXiv 2410.11081, eq. 4)."""

    name: ClassVar[str] = "trigflow"

    @property
    def t_max(self) -> float:
        return math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        # cos(pi/2) is not 0 in floating point, and negative in float32; the end of the process must be exact.
        return t.cos().clamp_min(0).where(t < self.t_max, torch.zeros_like(t))

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin()

    def velocity_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -t.sin(), t.cos()

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.atan2(sigma, alpha)


@dataclass(frozen=True)
class EDM(Process):
    """``alpha = 1, sigma = t`` on [0, sigma_max], variance exploding (arXiv 2206.00364). ``v`` is the slope, eps."""

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def velocity_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma / alpha.clamp_min(1e-12)).clamp(max=self.sigma_max)

    def network_time(self, t: Tensor) -> Tensor:
        return t.clamp_min(1e-20).log() / 4

    def karras(self, u: Tensor) -> Tensor:
        """Time at position ``u`` in [0, 1] of the grid of eq. 5; u = 0 is ``sigma_min``, u = 1 is ``sigma_max``."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho

    def grid(self, steps: int) -> Tensor:
        positions = torch.linspace(1, 0, steps, dtype=torch.float64)
        return torch.cat([self.karras(positions), torch.zeros(1, dtype=torch.float64)])

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(c_skip, c_out, c_in)`` of Table 1."""
        total = t**2 + self.sigma_data**2
        return self.sigma_data**2 / total, t * self.sigma_data * total.rsqrt(), total.rsqrt()


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@tabulated
def _log_ratio_table(
    schedule: str, steps: int, beta_start: float, beta_end: float, trained: tuple[float, ...], zero_snr: bool
) -> Tensor:
    """``log(sigma / alpha)`` at the integer times of a discrete schedule, float64; infinite where alpha is 0."""
    if trained:
        betas = torch.tensor(trained, dtype=torch.float64)
    elif schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown beta schedule {schedule!r}; known: {', '.join(BETA_SCHEDULES)}")
    kept = torch.cumprod(1 - betas, 0)
    if zero_snr:  # arXiv 2305.08891, alg. 1
        rates = kept.sqrt()
        kept = ((rates - rates[-1]) * (rates[0] / (rates[0] - rates[-1]))) ** 2
    return 0.5 * torch.log((1 - kept) / kept)


@tabulated
def _table_on(device: torch.device, *schedule: Any) -> Tensor:
    """:func:`_log_ratio_table`, taken to the device once."""
    return _log_ratio_table(*schedule).to(device)


def _like(rate: Tensor, t: Tensor) -> Tensor:
    """In the floating type of ``t``; integer timesteps, which diffusers' users pass, get the default type."""
    return rate.to(t) if t.is_floating_point() else rate.to(torch.get_default_dtype())


@dataclass(frozen=True)
class VP(Process):
    """``alpha^2 + sigma^2 = 1`` with the ``steps`` discrete alphas of DDPM (arXiv 2006.11239), ``v = alpha eps - sigma
    x0``. Times are real in [0, steps - 1]; between integers ``log(sigma/alpha)`` is interpolated linearly, so integer
    times reproduce the discrete alphas. Time 0 carries the schedule's smallest noise, not none.

    betas: the ``steps`` noise variances themselves, for a schedule that has no name; then ``schedule`` and its ends say
    nothing. zero_snr: the schedule is stretched until alpha is 0 at ``t_max`` (arXiv 2305.08891, alg. 1); before that
    time, alpha falls linearly from the last discrete alpha that is not 0.
    """

    name: ClassVar[str] = "vp"
    schedule: str = "scaled_linear"
    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: tuple[float, ...] = ()
    zero_snr: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if self.betas and len(self.betas) != self.steps:
            raise UserError(
                f"process 'vp' has {len(self.betas)} betas for {self.steps} steps", cure="give one for each"
            )
        if self.steps < (3 if self.zero_snr else 2):
            raise UserError(f"process 'vp' has {self.steps} steps", cure="give more")
        if not all(0 < beta < 1 for beta in self.betas[:-1]) or (self.betas[-1:] == (1.0,) and not self.zero_snr):
            raise UserError("process 'vp' has betas outside of 0 to 1", cure="a beta of 1 is the last, with zero_snr")

    def to_dict(self) -> dict[str, Any]:
        plain = {"betas": (), "zero_snr": False}
        return {key: value for key, value in super().to_dict().items() if plain.get(key) != value}

    @property
    def t_max(self) -> float:
        return float(self.steps - 1)

    def _table(self, like: Tensor) -> Tensor:
        named = (self.schedule, self.steps, self.beta_start, self.beta_end)
        return _table_on(like.device, *named, self.betas, self.zero_snr)

    @property
    def _intervals(self) -> int:
        """Intervals between whole times in which ``log(sigma/alpha)`` is finite at both ends."""
        return self.steps - 2 if self.zero_snr else self.steps - 1

    def _log_ratio(self, t: Tensor) -> Tensor:
        table, at = self._table(t), t.double()
        low = at.detach().floor().clamp(0, self._intervals - 1).long()
        # not table[low], which takes a single number from the device to the host
        return torch.lerp(table.take(low), table.take(low + 1), at - low)

    def _last_alpha(self, table: Tensor) -> Tensor:
        """The smallest discrete alpha that is not 0."""
        return torch.sigmoid(-2 * table[self._intervals]).sqrt()

    def _falling(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a time lies in the last interval of a schedule that ends without signal, and alpha there."""
        return t.double() > self._intervals, self._last_alpha(self._table(t)) * (self.t_max - t.double()).clamp(max=1)

    def alpha(self, t: Tensor) -> Tensor:
        if self.zero_snr:
            falls, alpha = self._falling(t)
            early = torch.sigmoid(-2 * self._log_ratio(t.clamp(max=self._intervals))).sqrt()
            return _like(torch.where(falls, alpha, early), t)
        return _like(torch.sigmoid(-2 * self._log_ratio(t)).sqrt(), t)

    def sigma(self, t: Tensor) -> Tensor:
        if self.zero_snr:
            falls, alpha = self._falling(t)
            early = torch.sigmoid(2 * self._log_ratio(t.clamp(max=self._intervals))).sqrt()
            return _like(torch.where(falls, (1 - alpha**2).sqrt(), early), t)
        return _like(torch.sigmoid(2 * self._log_ratio(t)).sqrt(), t)

    def velocity_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -self.sigma(t), self.alpha(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha64 = alpha.double()
        ratio = sigma.double().log() - alpha64.log()
        table = self._table(ratio)
        rate, last, falls = alpha64 / torch.hypot(alpha64, sigma.double()), self._last_alpha(table), None
        if self.zero_snr:
            falls = rate < last
            ratio = torch.where(falls, table[self._intervals], ratio)
        low = (torch.searchsorted(table, ratio.detach().contiguous()) - 1).clamp(0, self._intervals - 1)
        below, above = table.take(low), table.take(low + 1)
        position = low + (ratio - below) / (above - below)
        if falls is not None:
            position = torch.where(falls, self.t_max - rate / last, position)
        return position.clamp(0, self.t_max).to(alpha)


PROCESSES: dict[str, type[Process]] = {p.name: p for p in (RectifiedFlow, TrigFlow, EDM, VP)}


def process_from_dict(values: dict[str, Any]) -> Process:
    """The process that ``to_dict`` described. Raises UserError for a name or a setting that is not known."""
    values = dict(values)
    name = values.pop("name", "")
    if name not in PROCESSES:
        raise UserError(f"unknown process {name!r}{nearest(name, PROCESSES)}", cure=f"known: {', '.join(PROCESSES)}")
    try:
        return PROCESSES[name](**values)
    except (TypeError, ValueError) as error:
        known = ", ".join(f.name for f in fields(PROCESSES[name])) or "none"
        raise UserError(f"process {name!r}: {error}", cure=f"its settings: {known}") from None


def last_time(process: Process, view: Process) -> float:
    """Time of ``view`` with the signal-to-noise ratio of the last time of ``process``, beyond which nothing answers."""
    last = torch.tensor(process.t_max, dtype=torch.float64)
    return float(view.time_of(process.alpha(last), process.sigma(last)))


def match_snr(t: Tensor, of: Process, to: Process) -> tuple[Tensor, Tensor]:
    """Time ``s`` and scale such that ``scale * x_t`` of process ``of`` is a sample ``x_s`` of process ``to``.

    The two have the same signal-to-noise ratio, so a denoiser of ``to`` answers for ``of``; exact, differentiable in
    ``t`` (arXiv 2503.09641, prop. 1, does this for flow teachers under TrigFlow)."""
    alpha, sigma = of.alpha(t), of.sigma(t)
    s = to.time_of(alpha, sigma)
    return s, torch.hypot(to.alpha(s), to.sigma(s)) / torch.hypot(alpha, sigma)
