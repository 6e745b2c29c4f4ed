"""ECT: consistency between two times that come nearer and nearer, begun from a diffusion model (arXiv 2406.14548)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import Process
from stillroom.diffusion.sampling import FewStepSampler, Sampler, by_steps, share_at
from stillroom.diffusion.times import TimeLaw
from stillroom.losses.flow_map import earlier, huber, noise_ratio, pulled, reached
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn


@register(
    "ect",
    Paper(
        title="Consistency Models Made Easy",
        arxiv="2406.14548",
        year=2024,
        venue="ICLR 2025",
        code="locuslab/ect",
    ),
)
class ECT(Method):
    """A student whose x0-predictions f agree at two times of one path, r below t, which begin as far apart as noise and
    data (where it is the diffusion model that it starts from) and come nearer. In ratios s of noise to signal:

        r = s (1 - q^-a n(s)),  n(s) = 1 + k / (1 + exp(b s)),  a = 1 + whole part of steps / d       eq. 10, sec. 3.2
        L = mean[ (sqrt(|f(x_t, t) - sg f(x_r, r)|^2 + c^2) - c) / (s - r) ]                          sec. 3.2

    f(x, 0) = x. The two share data and noise (tuning), or x_r is reached from x_t by a Heun step of the guided teacher
    (distillation, arXiv 2303.01469, alg. 2), the default here. Departures: the network's own dropout; any process, by
    its ratio.
    """

    health = {
        "gap": "mean distance of f(x_t, t) and f(x_r, r) over the root of the number of elements: 0 where consistent",
        "nearness": "q^-a: how far apart the two times are, 1 as noise and data",
    }

    @dataclass
    class Options:
        steps: int = field(default=1, metadata={"min": 1, "max": 2})  # of the finished student's sampler
        middle: float = field(default=0.821, metadata={"above": 0})  # the second one's ratio of noise to signal
        path: Literal["teacher", "data"] = "teacher"
        guidance: float = 1.0  # on the teacher
        times: TimeLaw = TimeLaw("log-normal", 0.001, 0.999, mean=-1.1, std=2.0)  # of log s
        q: float = field(default=2.0, metadata={"above": 1})
        stages: int = field(default=8, metadata={"min": 1})  # times that the two come nearer: a = 1 .. stages
        k: float = 8.0
        b: float = 1.0
        c: float = field(default=0.0, metadata={"min": 0})  # of the distance

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")

    @turn(trains="student", optim=Optim(lr=1e-4, name="adam"))
    def agree(self, batch: Batch) -> Terms:
        """``L``."""
        o, x0, cond, process = self.options, batch["x"], batch["cond"], self.student.process
        near = o.q ** -(1 + math.floor(min(self.progress, 1 - 1e-9) * o.stages))
        t, eps = o.times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        r = earlier(process, t, near, o.k, o.b)
        x_t = process.add_noise(x0, eps, t)
        with torch.no_grad():
            teacher = self.teacher if o.path == "teacher" else None
            target = pulled(self.student, reached(process, teacher, x0, eps, x_t, t, r, cond, o.guidance), r, cond)
        distance = huber(self.student(x_t, t, cond).x0, target, o.c)
        self.note("gap", distance.mean() / x0[0].numel() ** 0.5)
        self.note("nearness", torch.tensor(near))
        return {"agree": (distance / (noise_ratio(process, t) - noise_ratio(process, r))).mean()}

    def sampler(self) -> FewStepSampler:
        return self.taking(self.options.steps, self.options, self.teacher.process)

    @staticmethod
    def taking(steps: int, options: Options, process: Process) -> FewStepSampler:
        """A sampler of so many steps."""
        return FewStepSampler((1.0, share_at(process, 1.0, options.middle))[:steps])

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        return by_steps(options.steps, (1, 2), lambda steps: cls.taking(steps, options, process))
