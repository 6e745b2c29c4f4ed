"""TCM: a consistency model that forgets small times, held by the one that it was (arXiv 2410.14895)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import Process, expand
from stillroom.diffusion.sampling import FewStepSampler, Sampler, by_steps, share_at
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.losses.flow_map import earlier, huber, noise_ratio, pulled, reached
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn


@register(
    "tcm",
    Paper(
        title="Truncated Consistency Models",
        arxiv="2410.14895",
        year=2024,
        venue="ICLR 2025",
    ),
)
class TCM(Method):
    """Two stages: a consistency model f_0 of all times, then one of times above s' alone, which need not denoise any
    more. Below s' the frozen f_0 answers for it, so that it is held where its times end. In ratios s of noise to
    signal, r below s as in ECT (arXiv 2406.14548), d the pseudo-Huber distance:

        L_0 = mean[ d(f(x_s, s), sg f(x_r, r)) / (s - r) ]                                  all s
        L   = mean_C[ d(f(x_s, s), sg f(x_r, r)) / (s - r) ] + b mean_B[ d(f(x_s, s), f_0(x_r, r)) / (s - r) ]   eq. 9
        C: r > s',   B: r <= s' <= s

    A share of the rows has its s just above s', so that B is not empty. Departures: s is log-normal in both stages, of
    which the second takes what is above s' (the paper's tail there is heavier, and the share is at s' itself); any
    process, by its ratio; the network's own dropout.
    """

    health = {
        "gap": "mean of the distance over the root of the number of elements: 0 where consistent",
        "boundary": "the same over rows that f_0 holds",
    }

    @dataclass
    class Options:
        steps: int = field(default=1, metadata={"min": 1, "max": 2})  # of the finished student's sampler
        middle: float = field(default=1.5, metadata={"above": 0})  # the second one's ratio of noise to signal
        path: Literal["teacher", "data"] = "teacher"
        guidance: float = 1.0  # on the teacher
        first_share: float = field(default=0.5, metadata={"above": 0, "below": 1})  # of the steps, for f_0
        cut: float = field(default=1.0, metadata={"above": 0})  # s'
        times: TimeLaw = TimeLaw("log-normal", 0.001, 0.999, mean=-1.1, std=2.0)  # of log s
        late_times: TimeLaw = TimeLaw("log-normal", 0.001, 0.999, mean=1.0, std=1.5)  # in the second stage
        held: float = field(default=0.25, metadata={"min": 0, "max": 1})  # share of rows just above s'
        boundary: float = field(default=0.1, metadata={"min": 0})  # b
        q: float = field(default=2.0, metadata={"above": 1})
        stages: int = field(default=8, metadata={"min": 1})  # times that s and r come nearer, in the first stage
        c: float = field(default=0.0, metadata={"min": 0})  # of the distance

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        if (law := self.options.late_times.law) != "log-normal":
            raise UserError(f"options.late_times is {law}", cure="a log-normal law, which is cut at options.cut")
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.first = copy.deepcopy(self.student).requires_grad_(False).eval()

    def stages(self) -> tuple[Stage, ...]:
        share = self.options.first_share
        return Stage("consistency", ("agree",), share), Stage("truncated", ("agree",), 1 - share)

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        """The student as it stands is f_0."""
        if stage.kind == "truncated" and not resumed:
            self.first.load_state_dict(self.student.state_dict())

    def drawn_times(self, like: Tensor, late: bool) -> tuple[Tensor, Tensor]:
        """``t`` and ``r`` ``[B]``."""
        o, process = self.options, self.student.process
        done = 1.0 if late else min(1.0, self.progress / o.first_share)
        near = o.q ** -(1 + math.floor(min(done, 1 - 1e-9) * o.stages))
        if not late:
            t = o.times.sample(self.draw, process).to(like)
            return t, earlier(process, t, near)
        cut = process.time_of(like.new_ones(1), like.new_full((1,), o.cut))
        below = NormalDist(o.late_times.mean, o.late_times.std).cdf(math.log(o.cut))
        t = o.late_times.sample(self.draw, process, below).to(like).maximum(cut)
        width = near * (1 + 8 / (1 + math.exp(o.cut)))  # of s - r, as a share of s
        ratio = o.cut * (1 + self.draw.uniform(len(like)).to(like) * width)
        just = process.time_of(torch.ones_like(ratio), ratio)
        t = torch.where(self.draw.uniform(len(like)).to(like) < o.held, just, t)
        return t, earlier(process, t, near)

    @turn(trains="student", optim=Optim(lr=1e-4, name="adam"))
    def agree(self, batch: Batch) -> Terms:
        """``L_0``, then ``L``."""
        o, x0, cond, process = self.options, batch["x"], batch["cond"], self.student.process
        late = self.stage.kind == "truncated"
        t, r = self.drawn_times(x0, late)
        eps = self.draw.normal_like(x0)
        x_t = process.add_noise(x0, eps, t)
        teacher = self.teacher if o.path == "teacher" else None
        held = (noise_ratio(process, r) <= o.cut) & torch.tensor(late, device=x0.device)
        with torch.no_grad():
            x_r = reached(process, teacher, x0, eps, x_t, t, r, cond, o.guidance)
            target = pulled(self.student, x_r, r, cond)
            if late:
                target = torch.where(expand(held, x0), pulled(self.first, x_r, r, cond), target)
        distance = huber(self.student(x_t, t, cond).x0, target, o.c)
        each = distance / (noise_ratio(process, t) - noise_ratio(process, r))
        self.note("gap", distance.mean() / x0[0].numel() ** 0.5)
        self.note("boundary", (distance * held).sum() / held.sum().clamp_min(1) / x0[0].numel() ** 0.5)
        return {"agree": (torch.where(held, o.boundary, 1.0).to(each) * each).mean()}

    def sampler(self) -> FewStepSampler:
        return self.taking(self.options.steps, self.options, self.teacher.process)

    @staticmethod
    def taking(steps: int, options: Options, process: Process) -> FewStepSampler:
        """A sampler of so many steps."""
        return FewStepSampler((1.0, share_at(process, 1.0, options.middle))[:steps])

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        return by_steps(options.steps, (1, 2), lambda steps: cls.taking(steps, options, process))
