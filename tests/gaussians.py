"""Worlds of known scores: mixtures of Gaussians as exact denoisers, quadrature, a turn as the engine runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import EDM, VP, Process, RectifiedFlow, TrigFlow
from stillroom.draws import Draws
from stillroom.engine.distributed import finished
from stillroom.method import Batch, Method

PROCESSES: dict[str, Process] = {"flow": RectifiedFlow(), "trig": TrigFlow(), "edm": EDM(), "vp": VP()}
KINDS = {"flow": "v", "trig": "v", "edm": "edm", "vp": "eps"}  # what networks of each process usually predict


def column(values: Any, like: Tensor) -> Tensor:
    """Rates ``[B]`` or a scalar beside points ``[B, D]``."""
    values = torch.as_tensor(values, dtype=like.dtype)
    return values[:, None] if values.ndim else values


class ExactNet(nn.Module):
    """The ideal network for a mixture of isotropic Gaussians, in the outputs of its process; trainable, for students.

    A label adds ``offsets[label]`` to all means; the last row is the null label. Blocks are there to be tapped: they
    show the network's input.
    """

    def __init__(
        self, process: Process, kind: str, means: Any, stds: Any, weights: Any = (1.0,), offsets: Any = None
    ) -> None:
        super().__init__()
        self.process, self.kind = process, kind
        double = {"dtype": torch.float64}
        self.means = nn.Parameter(torch.tensor(means, **double))  # [K, D]
        self.log_stds = nn.Parameter(torch.tensor(stds, **double).log())  # [K]
        self.log_weights = nn.Parameter(torch.tensor(weights, **double).log())
        self.offsets = None if offsets is None else nn.Parameter(torch.tensor(offsets, **double))
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))
        self.calls = 0
        self.rows = 0

    def parts(self, x: Tensor, a: Any, s: Any, label: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log joint densities ``[B, K]``, and per component the posterior means of x0 and of eps ``[B, K, D]``."""
        a, s = (column(v, x)[..., None] for v in (a, s))
        means = self.means if label is None or self.offsets is None else self.means + self.offsets[label][:, None]
        variance = self.log_stds.exp()[:, None] ** 2
        total = a**2 * variance + s**2
        away = x[:, None] - a * means
        log = -0.5 * (away**2 / total + torch.log(2 * math.pi * total)).sum(-1) + self.log_weights
        return log, means + a * variance / total * away, s / total * away

    def log_density(self, x: Tensor, a: Any, s: Any, label: Tensor | None = None) -> Tensor:
        return torch.logsumexp(self.parts(x, a, s, label)[0], -1)

    def posterior(self, x: Tensor, a: Any, s: Any, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``E[x0 | x_t]`` and ``E[eps | x_t]``."""
        log, x0, eps = self.parts(x, a, s, label)
        share = torch.softmax(log, -1)[..., None]
        return (share * x0).sum(1), (share * eps).sum(1)

    def forward(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        x, time, process = x.double(), time.double(), self.process
        t = (
            time / 1000
            if isinstance(process, RectifiedFlow)
            else (4 * time).exp()
            if isinstance(process, EDM)
            else time
        )
        for block in self.blocks:
            x = block(x)
        if self.kind == "edm":
            assert isinstance(process, EDM)
            x = x * column((t**2 + process.sigma_data**2).sqrt(), x)
        x0, eps = self.posterior(x, process.alpha(t), process.sigma(t), cond.get("label"))
        if self.kind == "x0":
            return x0
        if self.kind == "eps":
            return eps
        if self.kind == "edm":
            sd = process.sigma_data  # type: ignore[attr-defined]
            total = t**2 + sd**2
            return (x0 - column(sd**2 / total, x) * x) / column(t * sd / total.sqrt(), x)
        p, q = process.velocity_weights(t)
        return column(p, x) * x0 + column(q, x) * eps


def exact(
    process: Process, kind: str = "v", means: Any = ((0.0, 0.0),), stds: Any = (1.0,), weights: Any = (1.0,),
    offsets: Any = None,
) -> Denoiser:  # fmt: skip
    """The exact denoiser of a mixture."""
    null = {} if offsets is None else {"label": len(offsets) - 1}
    net = ExactNet(process, kind, means, stds, weights, offsets)
    return Denoiser(net, process, kind, null=null, shape=(len(means[0]),))  # type: ignore[arg-type]


class Law:
    """A 1-D mixture in float64 whose parameters may carry a graph: densities, scores, denoisers by hand."""

    def __init__(self, means: Any, stds: Any, weights: Any = (1.0,)) -> None:
        self.means, self.stds, self.weights = (_vector(v) for v in (means, stds, weights))

    def log_density(self, x: Tensor, a: Any = 1.0, s: Any = 0.0) -> Tensor:
        x, a, s = x[..., None], torch.as_tensor(a)[..., None], torch.as_tensor(s)[..., None]
        v = (a * self.stds) ** 2 + s**2
        parts = -0.5 * ((x - a * self.means) ** 2 / v + torch.log(2 * math.pi * v))
        return torch.logsumexp(parts + self.weights.log(), -1)

    def score(self, x: Tensor, a: Any = 1.0, s: Any = 0.0) -> Tensor:
        x, a, s = x[..., None], torch.as_tensor(a)[..., None], torch.as_tensor(s)[..., None]
        v = (a * self.stds) ** 2 + s**2
        parts = -0.5 * ((x - a * self.means) ** 2 / v + torch.log(v)) + self.weights.log()
        return (torch.softmax(parts, -1) * (a * self.means - x) / v).sum(-1)

    def x0(self, x: Tensor, a: Any, s: Any) -> Tensor:
        """Tweedie: ``(x + s^2 score) / a``."""
        return (x + s**2 * self.score(x, a, s)) / a


def _vector(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.reshape(-1)
    return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])


def normal_pair(n: int, reach: float = 8.0) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes ``(z, eps)`` and weights ``[n * n]`` of two independent standard normals: the trapezoid rule, which
    converges faster than any power of n for smooth functions that decay."""
    nodes = torch.linspace(-reach, reach, n, dtype=torch.float64)
    weights = torch.exp(-(nodes**2) / 2)
    weights = weights / weights.sum()
    z, eps = (m.reshape(-1) for m in torch.meshgrid(nodes, nodes, indexing="ij"))
    return z, eps, torch.outer(weights, weights).reshape(-1)


def central(f: Any, at: tuple[float, ...], h: float = 1e-4) -> Tensor:
    """Gradient of ``f(*at)`` by central differences of fourth order."""
    out = []
    for i in range(len(at)):
        moved = [[v + k * h * (j == i) for j, v in enumerate(at)] for k in (-2, -1, 1, 2)]
        a, b, c, d = (float(f(*m)) for m in moved)
        out.append((a - 8 * b + 8 * c - d) / (12 * h))
    return torch.tensor(out, dtype=torch.float64)


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), slice(0, n), n)


def play(method: Method, name: str, batch: Batch, seed: int = 0, train_all: bool = False) -> dict[str, Tensor]:
    """One turn as the engine plays it, with its backward pass; gradients lie on the parameters afterwards.

    train_all: let every parameter ask for a gradient, to see what the turn itself cuts.
    """
    method.eval()
    method.requires_grad_(train_all)
    turn = next(t for t in method.turns() if t.name == name)
    for role in turn.trains:
        for parameter in method.trained_parameters(role).values():
            parameter.requires_grad_(True)
    method.zero_grad(set_to_none=True)
    sizes = [len(v) for v in batch["cond"].values()] or [len(batch["x"])]
    method.draw = draws(sizes[0], seed)
    terms = finished(getattr(method, name)(batch))
    sum(terms.values()).backward()  # type: ignore[union-attr]
    return terms


def moved(method: Method) -> set[str]:
    """Names of the method's networks of which some parameter has a gradient that is not zero."""
    found = set()
    for role, network in method.named_children():
        own = method.trained_parameters(role)
        if any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in own.values()):
            found.add(role)
        del network
    return found
