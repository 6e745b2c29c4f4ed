"""TwinFlow: one network as generator, real and fake score, told apart by the sign of the time (arXiv 2512.05150)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import Process, RectifiedFlow, expand
from stillroom.diffusion.sampling import FlowMapSampler, Sampler, by_steps
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.losses.jumps import barron, jump_residual
from stillroom.method import Batch, Method, Optim, Paper, Target, Terms, frozen, register, turn
from stillroom.networks.extra_inputs import with_inputs
from stillroom.surgery.modules import device_of

PARTS = ("end", "near", "any", "fake")
NEAR = 0.05  # of the time, that a near jump spans at most


@register(
    "twinflow",
    Paper(
        title="TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows",
        arxiv="2512.05150",
        year=2025,
        venue="ICLR 2026",
        code="inclusionAI/TwinFlow",
    ),
)
class TwinFlow(Method):
    """One network F(x, t, r), the mean velocity from t to r on the path ``x_t = t z + (1 - t) x``. At times below zero
    it is the velocity of its own samples' paths: with it the network is its own fake score, and needs neither a
    teacher beside it nor a discriminator.

    A batch has four parts, whose rows take turns, and every micro-batch has rows of all of them: ``end`` (t = 1,
    r = 0), ``near`` (r within 5% of t), ``any`` (r uniform below t) and ``fake``: own samples ``x = z' - F(z', 1, 0)``,
    t and r both negative. On the first three (RCGM of second order, as the code has it), with F' the average of the
    network:

        v = z - x + (w - 1) (F'(x_t, t, t, c) - F'(x_t, t, t, none))             guidance in the target
        I = integral of F' from t - d to r, in ``order`` equal steps from x_t - d v
        D = ((t - r) F - I - d v) / d,   L = wgt rho(F, sg F - clamp(D, -1, 1)),   wgt = 1 + tan(0.4 pi (1 - (t - r)))

    On ``fake`` ``L_adv = rho(F(x_t, -t, -t), z - x)``: the fake score. On ``end`` also the rectification, with
    ``x_f = z - F`` and noise and time t' of their own:

        G = clamp(F(x_t', -t', -t') - F(x_t', t', t'), -1, 1),   L_rect = rho(F, sg F - G)

    which is DMD's gradient as a difference of velocities. rho is about the root mean square error, its
    gradient halved (Barron's).

    Without images (``image_free``) every x is an own sample and v the frozen teacher's velocity.

    Departures: r, and the sign beside the negative time, are inputs of a network beside the embedding of the time,
    which says nothing at the start; parts take turns by row, so that micro-batches are alike; times begin at ``low``,
    since the velocity of a network that predicts x0 is divided by t; guidance acts at t = 1 too; dropout differs
    between the passes of a step; AdamW for RAdam; no LoRA.
    """

    health = {
        "residual": "mean square of D before it is clamped, over elements of the parts end, near and any: 0 where "
        "jumps agree with the paths",
        "fake_error": "mean squared error of the velocity at negative times on own samples: how well the network knows "
        "what it draws",
        "twin_gap": "mean square of the difference between the velocities at negative and at positive times on own "
        "samples, before it is clamped: 0 where what it draws is distributed as its data",
        "sample_std": "standard deviation of all elements of a batch's own samples: falls where they collapse",
    }

    @dataclass
    class Options:
        end_parts: int = field(default=1, metadata={"min": 0})  # shares of a batch, beside each other
        near_parts: int = field(default=1, metadata={"min": 0})
        any_parts: int = field(default=1, metadata={"min": 0})
        fake_parts: int = field(default=1, metadata={"min": 0})
        rectification: float = field(default=0.5, metadata={"min": 0})  # weight; 0.75 for OpenUni
        guidance: float = 1.8  # in the target, w: the paper's 0.8 added; 4 is advised with image_free
        guided_from: float = field(default=0.0, metadata={"min": 0, "max": 1})  # times of the target's guidance
        guided_to: float = field(default=1.0, metadata={"min": 0, "max": 1})
        order: int = field(default=2, metadata={"min": 1})  # steps of the target's integral
        delta: float = field(default=0.01, metadata={"above": 0, "below": 1})
        average: float = field(default=0.99, metadata={"min": 0, "below": 1})  # of the target network; 0: the student
        loss: Literal["barron", "l2"] = "barron"
        scale: float = field(default=1e-3, metadata={"above": 0})  # Barron's c
        times: TimeLaw = TimeLaw("uniform", 0.02, 1.0)
        rectification_times: TimeLaw = TimeLaw("uniform", 0.02, 1.0)
        image_free: bool = False
        width: int = field(default=64, metadata={"min": 2})  # of the embeddings of r and of the sign
        sample_times: tuple[float, ...] = (1.0,)  # of the finished student; two steps: 0.999, 0.6
        to: Literal["end", "next", "here"] = "end"  # each of its calls jumps to the end, or to the next time, or not

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        if not isinstance(teacher.process, RectifiedFlow):
            raise UserError(
                f"twinflow is of flows, and this teacher's process is {teacher.process.name}",
                cure="give a flow-matching model",
            )
        if self.lora:
            raise UserError("twinflow trains all weights, with inputs that the network has not", cure="leave lora away")
        falling = all(a > b for a, b in pairwise((*o.sample_times, 0.0)))
        if not o.sample_times or o.sample_times[0] > 1 or not falling:
            raise UserError(
                f"options.sample_times are shares of the last time, from 1 down, not {list(o.sample_times)}",
                cure="for example options.sample_times=[0.999,0.6]",
            )
        self.pattern = [name for name in PARTS for _ in range(getattr(o, f"{name}_parts"))]
        if not set(self.pattern) - {"fake"}:
            raise UserError("no part of a batch learns to jump", cure="options.end_parts=1")
        if o.rectification and not o.end_parts:
            raise UserError(
                "the rectification is of the part that jumps to the end", cure="options.end_parts=1, or rectification=0"
            )
        own = self.clone(student or teacher, "student")
        self.student: Denoiser = with_inputs(own, "r", "sign", width=o.width)
        self.teacher = frozen(teacher) if o.image_free else None
        follows = o.average and not o.image_free
        self.target = frozen(copy.deepcopy(self.student)) if follows else None

    def followers(self) -> Mapping[str, Target]:
        return {} if self.target is None else {"target": Target("student", self.options.average, warm_up=True)}

    # --- the network ------------------------------------------------------------------------------------------------
    def ask(self, network: Denoiser, x: Tensor, t: Tensor, r: Tensor, cond: Cond, guidance: float = 1.0) -> Prediction:
        """F(x, t, r); its ``v`` is the mean velocity. t ``[B]``: of either sign; r has the same."""
        return network(x, t.abs(), {**cond, "r": r, "sign": t.sign()}, guidance)

    @torch.no_grad()
    def drawn(self, z: Tensor, cond: Cond) -> Tensor:
        """Own samples of noise ``z``, in one jump."""
        one = z.new_ones(len(z))
        return self.ask(self.student, z, one, torch.zeros_like(one), cond).x0

    # --- a batch ----------------------------------------------------------------------------------------------------
    def rows(self) -> dict[str, list[int]]:
        """The rows of each part; they take turns in the whole batch (with ``engine.draws=per-rank``, in each
        micro-batch).

        Raises UserError for micro-batches without a row of each: processes would have other losses and other calls.
        """
        if self.draw.local < len(self.pattern):
            raise UserError(
                f"a micro-batch of {self.draw.local} rows does not hold the {len(self.pattern)} parts of a batch",
                cure=f"a larger engine.batch or a smaller engine.accumulate: {len(self.pattern)} rows at least",
            )
        rows = range(self.draw.rows.start, self.draw.rows.stop)
        roles = [self.pattern[row % len(self.pattern)] for row in rows]
        return {name: [i for i, role in enumerate(roles) if role == name] for name in PARTS}

    def jumps(self, rows: Mapping[str, list[int]], like: Tensor) -> tuple[Tensor, Tensor]:
        """Times t and r ``[B]``; those of ``fake`` are negative."""
        t = self.options.times.sample(self.draw, RectifiedFlow()).to(like)
        u = self.draw.uniform(self.draw.local).to(like)
        r = t - u * t
        t[rows["end"]], r[rows["end"]] = 1.0, 0.0
        r[rows["near"]] = (t - NEAR * u * t)[rows["near"]]
        t[rows["fake"]] = -t[rows["fake"]]
        r[rows["fake"]] = t[rows["fake"]]
        return t, r

    def velocity(self, x_t: Tensor, t: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """The target's velocity at ``x_t``, given that of the path, ``v``: guided, or the teacher's."""
        o = self.options
        inside = (t >= o.guided_from) & (t <= o.guided_to)
        if self.teacher is not None:  # outside of those times too the velocity is the teacher's, without guidance
            always = o.guided_from == 0.0 and o.guided_to == 1.0
            return self.teacher(x_t, t, cond, o.guidance if always else torch.where(inside, o.guidance, 1.0)).v
        if o.guidance == 1.0 or not cond:
            return v
        asked = self.target or self.student
        there = self.ask(asked, x_t, t, t, cond).v
        guided = v + (o.guidance - 1) * (there - self.ask(asked, x_t, t, t, cond, 0.0).v)
        return torch.where(expand(inside, v), guided, v)

    @turn(trains="student", optim=Optim(lr=1e-4, clip_norm=1.0, nan_to_num=1e5))
    def jump(self, batch: Batch) -> Terms:
        """``L + L_adv`` over the batch, and ``L_rect`` over its part ``end``."""
        o, cond, rows = self.options, batch["cond"], self.rows()
        z, fresh = (self.draw.normal(self.draw.local, *self.student.shape).to(device_of(self.student)) for _ in "ab")
        own = list(range(len(z))) if o.image_free else rows["fake"]
        x = torch.empty_like(z) if o.image_free else batch["x"].clone()
        if own:
            x[own] = self.drawn(fresh[own], _of(cond, own))
        t, r = self.jumps(rows, z)
        x_t, v = RectifiedFlow().add_noise(x, z, t.abs()), z - x
        said = self.ask(self.student, x_t, t, r, cond)
        real = sorted(rows["end"] + rows["near"] + rows["any"])
        target = v.clone()
        if real:
            target[real] = self.wanted(said.v.detach()[real], x_t[real], t[real], r[real], v[real], _of(cond, real))
        weight = 1 + torch.tan(0.4 * math.pi * (1 - (t - r).abs()))
        weight[rows["fake"]] = 1.0
        terms = {"jump": (weight * self.rho(said.v, target)).mean()}
        if rows["fake"]:
            fakes = rows["fake"]
            self.note("fake_error", (said.v[fakes] - v[fakes]).square().mean())
        if o.rectification and rows["end"]:
            ends = rows["end"]
            every = [self.pattern[row % len(self.pattern)] for row in range(self.draw.total)]
            share = every.count("end") / len(every)  # of all rows: the mean does not depend on micro-batches
            gap = self.gap(said.x0[ends].detach(), ends, _of(cond, ends))
            rectified = self.rho(said.v[ends], said.v[ends].detach() - gap.clamp(-1, 1))
            terms["rectify"] = o.rectification * rectified.sum() / (share * len(z))
        return terms

    @torch.no_grad()
    def wanted(self, said: Tensor, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """``F - clamp(D, -1, 1)``."""
        asked = self.target or self.student
        off = jump_residual(
            lambda x, at, to: self.ask(asked, x, at, to, cond).v, said, x_t, t, r, self.velocity(x_t, t, v, cond),
            self.options.delta, self.options.order,
        )  # fmt: skip
        self.note("residual", off.square().mean())
        return said - off.clamp(-1, 1)

    @torch.no_grad()
    def gap(self, x: Tensor, rows: list[int], cond: Cond) -> Tensor:
        """The fake less the real velocity at own samples ``x``, noised anew; before it is clamped."""
        t = self.options.rectification_times.sample(self.draw, RectifiedFlow()).to(x)[rows]
        z = self.draw.normal(self.draw.local, *x.shape[1:]).to(x)[rows]
        x_t = RectifiedFlow().add_noise(x, z, t)
        gap = self.ask(self.student, x_t, -t, -t, cond).v - self.ask(self.student, x_t, t, t, cond).v
        self.note("twin_gap", gap.square().mean())
        self.note("sample_std", x.std())
        return gap

    def rho(self, said: Tensor, target: Tensor) -> Tensor:
        """Per sample, ``[B]``."""
        if self.options.loss == "barron":
            return barron(said, target, self.options.scale)
        return (said - target).square().flatten(1).mean(1)

    def sampler(self) -> FlowMapSampler:
        return FlowMapSampler(self.options.sample_times, to=self.options.to)

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        """One or two jumps to the end (the paper's times of two)."""
        times = {1: (1.0,), 2: (0.999, 0.6)}
        return by_steps(len(options.sample_times), times, lambda steps: FlowMapSampler(times[steps], to="end"))


def _of(cond: Cond, rows: list[int]) -> dict[str, Any]:
    return {name: value[rows] for name, value in cond.items()}
