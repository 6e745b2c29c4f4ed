"""A denoiser: a network, a process and a prediction kind. Its answer is readable as ``.x0 .eps .v .score``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stillroom.checks import require
from stillroom.diffusion.process import EDM, Process, expand, match_snr
from stillroom.errors import UserError

Kind = Literal["x0", "eps", "v", "edm"]
KINDS: tuple[str, ...] = get_args(Kind)
Cond = Mapping[str, Tensor]
NetworkCall = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
Guide = Callable[[Tensor, Tensor, Any], Tensor]
"""``(conditional, unconditional, w)`` to the guided output, all ``[B, ...]`` in the network's own output space; w is a
number, or one for each sample ``[B, 1, ...]``."""


NAME_NULL = (
    'say which class means "unconditional", {"null": {"label": N}} in stillroom.json in the model\'s folder, or do '
    "without guidance (options.guidance=1.0)"
)
"""The cure where a network's folder does not name what stands for no condition."""


class Prediction:
    """What a denoiser says about ``x_t`` at time ``t``; all conversions between parametrisations live here.

    Every view has the shape of ``x_t``. A view that the time makes undefined (``eps`` of an x0-prediction at sigma = 0,
    ``x0`` of an eps-prediction at alpha = 0) raises ``ValueError``; in a training step, when the step is done.
    """

    def __init__(self, process: Process, kind: str, value: Tensor, x_t: Tensor, t: Tensor) -> None:
        if kind not in ("x0", "eps", "v"):
            raise ValueError(f"a prediction is of kind x0, eps or v, not {kind!r}")
        self.process, self.kind, self.value, self.x_t, self.t = process, kind, value, x_t, t

    @functools.cached_property
    def _rates(self) -> tuple[Tensor, Tensor]:
        return expand(self.process.alpha(self.t), self.x_t), expand(self.process.sigma(self.t), self.x_t)

    @functools.cached_property
    def _velocity(self) -> tuple[Tensor, Tensor]:
        p, q = self.process.velocity_weights(self.t)
        return expand(p, self.x_t), expand(q, self.x_t)

    @staticmethod
    def _positive(rate: Tensor, what: str) -> Tensor:
        problem = f"{what} is undefined here: the rate it is divided by is 0 at this end of the process"
        require((rate > 0).all(), ValueError(problem))
        return rate

    @functools.cached_property
    def x0(self) -> Tensor:
        alpha, sigma = self._rates
        if self.kind == "x0":
            return self.value
        if self.kind == "eps":
            return (self.x_t - sigma * self.value) / self._positive(alpha, "x0 of an eps-prediction")
        p, q = self._velocity
        return (q * self.x_t - sigma * self.value) / (alpha * q - sigma * p)

    @functools.cached_property
    def eps(self) -> Tensor:
        alpha, sigma = self._rates
        if self.kind == "eps":
            return self.value
        if self.kind == "x0":
            return (self.x_t - alpha * self.value) / self._positive(sigma, "eps of an x0-prediction")
        p, q = self._velocity
        return (alpha * self.value - p * self.x_t) / (alpha * q - sigma * p)

    @functools.cached_property
    def v(self) -> Tensor:
        if self.kind == "v":
            return self.value
        p, q = self._velocity
        return p * self.x0 + q * self.eps

    @functools.cached_property
    def score(self) -> Tensor:
        """Gradient of the log density of ``x_t``: ``(alpha x0 - x_t) / sigma^2 = -eps / sigma``."""
        return -self.eps / self._positive(self._rates[1], "the score")


def plain_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Networks written as ``network(x, time, cond)``."""
    return network(x, time, cond)


_ASKED: ContextVar[Tensor | None] = ContextVar("asked", default=None)


@contextmanager
def asking_for(rows: Tensor | None) -> Iterator[None]:
    """Around a network's call for some rows of a batch, int64 ``[R]``, for what is told of the whole batch."""
    token = _ASKED.set(rows)
    try:
        yield
    finally:
        _ASKED.reset(token)


def asked_rows() -> Tensor | None:
    """The rows that the network is asked for; None: all."""
    return _ASKED.get()


def plain_guide(conditional: Tensor, unconditional: Tensor, w: Tensor | float) -> Tensor:
    return unconditional + w * (conditional - unconditional)


def time_like(t: Tensor | float, x: Tensor) -> Tensor:
    """A time in the type of ``x``, where ``x`` lies."""
    if isinstance(t, Tensor):
        return t.to(x.device, x.dtype)
    return torch.full((), t, dtype=x.dtype, device=x.device)


class Denoiser(nn.Module):
    """``denoiser(x_t, t, cond, guidance)``.

    network: any module; ``call`` says how it is asked (models.families has the diffusers conventions).
    null: the value of each condition that means "unconditional" (a scalar, or a tensor without the batch dimension).
    shape: shape of one sample, ``(C, H, W)`` for images. guide: how guidance puts the two answers together.
    """

    adapter: str | None = None  # name of the LoRA role that this denoiser speaks with

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        prediction: Kind = "v",
        *,
        null: Mapping[str, Any] | None = None,
        shape: tuple[int, ...] = (),
        call: NetworkCall = plain_call,
        guide: Guide = plain_guide,
    ) -> None:
        super().__init__()
        if prediction not in KINDS:
            raise ValueError(f"prediction kind must be one of {', '.join(KINDS)}, got {prediction!r}")
        if prediction == "edm" and not isinstance(process, EDM):
            raise ValueError("the preconditioned 'edm' prediction needs the EDM process")
        self.network, self.process, self.prediction = network, process, prediction
        self.null, self.shape, self.call, self.guide = dict(null or {}), tuple(shape), call, guide
        self._nulls: dict[tuple[str, torch.dtype, torch.device], tuple[Any, Tensor]] = {}

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """``cond`` with every entry replaced by its "unconditional" value."""
        missing = [name for name in cond if name not in self.null]
        if missing:
            raise UserError(f"guidance needs an unconditional value for: {', '.join(missing)}", cure=NAME_NULL)
        return {k: self._null(k, v).expand_as(v).contiguous() for k, v in cond.items()}

    def without(self, cond: Cond, rows: Tensor) -> dict[str, Tensor]:
        """``cond``, "unconditional" in the chosen ``rows``, boolean ``[B]``."""
        null = self.null_cond(cond)
        return {k: torch.where(expand(rows.to(v.device), v), null[k], v) for k, v in cond.items()}

    def _null(self, name: str, like: Tensor) -> Tensor:
        """The unconditional value where ``like`` lies, in its type; kept, so that it goes there once."""
        value, key = self.null[name], (name, like.dtype, like.device)
        if (kept := self._nulls.get(key)) is not None and kept[0] is value:
            return kept[1]
        made = torch.as_tensor(value).to(like)
        if type(made) is Tensor:  # a plan's are fake
            self._nulls[key] = value, made
        return made

    def adapter_scope(self) -> AbstractContextManager[None]:
        """Which LoRA adapter speaks while this denoiser runs (none for the base). A network without adapters: no-op."""
        switch = getattr(self.network, "lora_switch", None)
        return switch.use(self.adapter) if switch is not None else nullcontext()

    def told(self, given: Cond) -> AbstractContextManager[None]:
        """Around calls of the network itself: conditions that a wrapper reads, by name. No wrapper: no-op."""
        return nullcontext()

    def native(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's own output in float32, without guidance; ``[B, ...]`` like ``x_t``."""
        time = self.process.network_time(t)
        time = time.expand(x_t.shape[0]) if time.ndim == 0 else time
        with self.adapter_scope():
            if self.prediction == "edm":
                assert isinstance(self.process, EDM)
                c_skip, c_out, c_in = (expand(c, x_t) for c in self.process.preconditioning(t))
                return c_skip * x_t + c_out * self.call(self.network, c_in * x_t, time, cond).float()
            return self.call(self.network, x_t, time, cond).float()

    def forward(
        self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None, guidance: Tensor | float = 1.0
    ) -> Prediction:
        """Prediction at ``x_t [B, ...]``, ``t [B]`` or scalar. ``guidance`` w: ``uncond + w (cond - uncond)``, or
        what ``guide`` makes of it, in the network's own output space; w = 1 and w = 0 cost one evaluation, other values
        two (in one batch), as do scales ``[B]``, one for each sample."""
        cond = cond or {}
        t = time_like(t, x_t)
        each = isinstance(guidance, Tensor)
        if not cond or (not each and guidance == 1.0):
            value = self.native(x_t, t, cond)
        elif not each and guidance == 0.0:
            value = self.native(x_t, t, self.null_cond(cond))
        else:
            return self.against(x_t, t, cond, self.null_cond(cond), guidance)
        return self._said(value, x_t, t)

    def against(self, x_t: Tensor, t: Tensor | float, cond: Cond, other: Cond, guidance: Tensor | float) -> Prediction:
        """As :meth:`forward` with ``guidance`` w, a number or ``[B]``, from another condition to ``cond`` and not from
        none: ``other + w (cond - other)``. Two evaluations in one batch."""
        t = time_like(t, x_t)
        if cond.keys() != other.keys() or any(cond[k].shape != v.shape for k, v in other.items()):
            shapes = [{k: list(v.shape) for k, v in one.items()} for one in (cond, other)]
            raise UserError(f"conditions {shapes[0]} and {shapes[1]} do not fit each other", cure="encode both alike")
        conditional, unconditional = self._both(x_t, t, cond, other)
        w = expand(guidance.to(conditional), conditional) if isinstance(guidance, Tensor) else guidance
        return self._said(self.guide(conditional, unconditional, w), x_t, t)

    def _both(self, x_t: Tensor, t: Tensor, cond: Cond, other: Cond | None = None) -> tuple[Tensor, Tensor]:
        other = self.null_cond(cond) if other is None else other
        both = {k: torch.cat([v, other[k].to(v)]) for k, v in cond.items()}
        times = torch.cat([t, t]) if t.ndim else t
        conditional, unconditional = self.native(torch.cat([x_t, x_t]), times, both).chunk(2)
        return conditional, unconditional

    def _said(self, value: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(self.process, "x0" if self.prediction == "edm" else self.prediction, value, x_t, t)

    def apart(self, x_t: Tensor, t: Tensor | float, cond: Cond) -> tuple[Prediction, Prediction]:
        """The conditional and the unconditional prediction, each by itself, from one batch of both. Raises UserError
        for conditions without an unconditional value."""
        t = time_like(t, x_t)
        conditional, unconditional = self._both(x_t, t, cond)
        return self._said(conditional, x_t, t), self._said(unconditional, x_t, t)

    def guided(self, given: Prediction, cond: Cond, guidance: float) -> Prediction:
        """What :meth:`forward` says with ``guidance`` where it has said ``given`` without, at the cost of the
        unconditional answer alone. No gradient."""
        if guidance == 1.0 or not cond:
            return given
        with torch.no_grad():
            null = self(given.x_t, given.t, cond, 0.0)
            value = null.value if guidance == 0.0 else self.guide(given.value, null.value, guidance)
        return Prediction(given.process, given.kind, value, given.x_t, given.t)


class Reparametrised(nn.Module):
    """``denoiser`` asked under another process, by matching the signal-to-noise ratio. Same call, same predictions.

    Under TrigFlow a flow's velocity v becomes ``cos(t) eps - sin(t) x0`` with ``x0 = x - tau v`` and ``eps = x + (1 -
    tau) v`` at ``tau = sin t / (sin t + cos t)``, exact at both ends and differentiable in x_t and t (arXiv 2503.09641,
    prop. 3.1): any teacher is read as TrigFlow's without training.
    """

    def __init__(self, denoiser: Denoiser, process: Process) -> None:
        super().__init__()
        self.denoiser, self.process, self.shape, self.null = denoiser, process, denoiser.shape, denoiser.null

    def forward(
        self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None, guidance: Tensor | float = 1.0
    ) -> Prediction:
        t = time_like(t, x_t)
        s, scale = match_snr(t, of=self.process, to=self.denoiser.process)
        answer = self.denoiser(expand(scale, x_t) * x_t, s, cond, guidance)
        if answer.kind == "eps":  # keep what the network said exactly; eps does not depend on the scale
            return Prediction(self.process, "eps", answer.value, x_t, t)
        if answer.kind == "v":  # as good at both ends as it was
            on_x0, on_eps = (expand(weight, x_t) for weight in self.process.velocity_weights(t))
            return Prediction(self.process, "v", on_x0 * answer.x0 + on_eps * answer.eps, x_t, t)
        return Prediction(self.process, "x0", answer.x0, x_t, t)
