"""Parallel decoding distillation: heads that say in one call the mean velocities of all intervals of the teacher's path
that lie ahead (arXiv 2607.26004)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Cond, Denoiser, Reparametrised
from stillroom.diffusion.process import Process, RectifiedFlow, expand
from stillroom.diffusion.sampling import FlowMapSampler, Sampler, by_steps
from stillroom.errors import UserError
from stillroom.losses.score import denoising_loss
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.networks.parallel_heads import ParallelHeads, with_heads

FLOW = RectifiedFlow()


@register(
    "pdd",
    Paper(
        title="Parallel Decoding Distillation for Fast Image and Video Generation",
        arxiv="2607.26004",
        year=2026,
        code="NVlabs/FastGen",
    ),
)
class PDD(Method):
    """A student with N heads on its last layer, one for each interval of the path. Asked at ``x_n``, head k says the
    mean velocity of interval k, k >= n; a step over many intervals is their sum. With u the flow's time and v the
    teacher's (guided) velocity:

        x_k  = x_n + sum_{n <= i < k} (u_{i+1} - u_i) F_i(x_n, u_n)                        no gradient, sec. 3.2
        L    = mean |F_k(x_n, u_n) - v_k|^2,    v_k the mean velocity of a Runge-Kutta step of the teacher from x_k
                                                                                           sec. 3.3
    n is a multiple of ``shortest``, k < n + ``longest``; x_n is where the student itself comes to from noise, or noised
    data. Departures: the heads are differences from one last layer, which is trained as well; x_k costs a second call,
    without gradient; where the student is to begin at its own states, it comes there anew each time.
    """

    health = {"gap": "mean squared difference between a head's velocity and the teacher's at the state it leads to"}

    @dataclass
    class Options:
        steps: int = field(default=1, metadata={"min": 1})  # of the finished student's sampler, of equally many heads
        heads: int = field(default=32, metadata={"min": 1})  # N
        shortest: int = field(default=8, metadata={"min": 1})  # L_min, heads of a step
        longest: int = field(default=32, metadata={"min": 1})  # L_max, heads of a step
        begin: Literal["own", "data"] = "own"  # "own": no images are read
        solver: Literal["midpoint", "euler"] = "midpoint"  # of the teacher's step
        guidance: float = 1.0  # on the teacher

        @property
        def lengths(self) -> range:
            """Heads that a step may have."""
            return range(self.shortest, min(self.longest, self.heads) + 1, self.shortest)

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        if self.lora:
            raise UserError("pdd trains all weights, with heads that the network has not", cure="leave lora away")
        if o.heads % o.shortest or o.heads / o.steps not in o.lengths:
            raise UserError(
                f"{o.heads} heads do not make {o.steps} steps of {o.shortest} to {o.longest} heads",
                cure="make heads and heads / steps multiples of options.shortest, the latter at most options.longest",
            )
        self.teacher = frozen(teacher)
        self.student = with_heads(self.clone(student or teacher, "student"), o.heads)

    @property
    def heads(self) -> ParallelHeads:
        assert isinstance(self.student.attachment, ParallelHeads)
        return self.student.attachment

    # --- on the path ------------------------------------------------------------------------------------------------
    def velocity(self, x: Tensor, n: Tensor, spans: tuple[Tensor, Tensor], cond: Cond) -> Tensor:
        """The student's mean velocity of ``spans`` from one interval's beginning to another's, ``[B]`` each, at states
        ``x`` at the beginnings of intervals ``n``."""
        flow, (since, r) = self.heads.flow, spans
        return Reparametrised(self.student, FLOW)(x, flow[n], {**cond, "since": flow[since], "r": flow[r]}).v

    @torch.no_grad()
    def decode(self, x: Tensor, n: Tensor, k: Tensor, cond: Cond) -> Tensor:
        """``x_k`` from ``x_n``, in one call."""
        flow = self.heads.flow
        return x + expand(flow[k] - flow[n], x) * self.velocity(x, n, (n, k), cond)

    @torch.no_grad()
    def target(self, x: Tensor, k: Tensor, cond: Cond) -> Tensor:
        """``v_k`` at states ``x`` at the beginnings of intervals ``k``."""
        o, teacher = self.options, Reparametrised(self.teacher, FLOW)
        u, after = self.heads.flow[k], self.heads.flow[k + 1]
        first = teacher(x, u, cond, o.guidance).v
        if o.solver == "euler":
            return first
        middle = (u + after) / 2
        return teacher(x + expand(middle - u, x) * first, middle, cond, o.guidance).v

    def states(self, n: Tensor, batch: Batch) -> Tensor:
        """``x_n``."""
        o, flow = self.options, self.heads.flow
        noise = self.draw.normal(self.draw.local, *self.teacher.shape).to(flow.device)
        if o.begin == "data":
            return FLOW.add_noise(batch["x"], noise, flow[n])
        at, x = torch.zeros_like(n), flow[0] * noise
        for _ in range(math.ceil((o.heads - o.shortest) / o.longest)):
            to = torch.minimum(at + o.longest, n)
            x, at = self.decode(x, at, to, batch["cond"]), to
        return x

    @turn(trains="student", optim=Optim(lr=1e-4))
    def regress(self, batch: Batch) -> Terms:
        """``L = mean |F_k(x_n, u_n) - v_k|^2``."""
        o, cond, device = self.options, batch["cond"], self.heads.flow.device
        n = o.shortest * self.draw.integers(o.heads // o.shortest).to(device)
        ahead = (self.draw.uniform(self.draw.local).to(device) * (o.heads - n).clamp(max=o.longest)).long()
        k = (n + ahead).clamp(max=o.heads - 1)
        x = self.states(n, batch)
        loss = denoising_loss(self.velocity(x, n, (k, k + 1), cond), self.target(self.decode(x, n, k, cond), k, cond))
        self.note("gap", loss)
        return {"heads": loss}

    def sampler(self) -> FlowMapSampler:
        return self.taking(self.options.steps, self.options, self.teacher.process)

    @staticmethod
    def taking(steps: int, options: Options, process: Process) -> FlowMapSampler:
        """A sampler of so many steps."""
        shares = process.grid(options.heads)[: -1 : options.heads // steps] / process.t_max
        return FlowMapSampler(tuple(shares.tolist()), to="end" if steps == 1 else "next")

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        """Of one, two and four steps those of as many heads as are learnt together."""
        fits = [steps for steps in (1, 2, 4) if options.heads / steps in options.lengths]
        return by_steps(options.steps, fits, lambda steps: cls.taking(steps, options, process))
