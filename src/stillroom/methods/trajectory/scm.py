"""sCM: consistency in continuous time alone, from a teacher or from data (arXiv 2410.11081)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from stillroom.diffusion.denoiser import Denoiser, Reparametrised
from stillroom.diffusion.derivatives import How
from stillroom.diffusion.process import Process, TrigFlow
from stillroom.diffusion.sampling import FewStepSampler, Sampler, by_steps, share_at
from stillroom.diffusion.times import TimeLaw
from stillroom.losses.flow_map import Norm, bound, normalised, scm_change, towards, trig_times
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.networks.scalars import LogVariance

TRIG = TrigFlow()


@register(
    "scm",
    Paper(
        title="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        arxiv="2410.11081",
        year=2024,
        venue="ICLR 2025",
    ),
)
class SCM(Method):
    """A student that jumps from any noise level to data, consistent along the teacher's path (sCD) or along lines to
    data (sCT). With ``u = cos(t) x0 + sin(t) z``, F the velocity there, J its derivative along ``cos t sin t (du/dt,
    1)`` and du/dt the teacher's F, or ``cos(t) z - sin(t) x0``:

        g = -cos^2(t) (F - du/dt) - r (cos t sin t u + J),   g <- g / (|g| + c / sd)           alg. 1, sec. 4.2
        L = mean[ exp(-w(t)) / (sd tan t) |F - sg(F) - sg(g)|^2 + w(t) ]                        eq. 8

    r grows from 0 to 1, w is learnt. Departures: norms are over the mean of squares; any teacher is read as TrigFlow's,
    where the paper trains one; its network's time embedding is the teacher's; r may be 0 at little noise (``bound``).
    """

    health = {"tangent": "root mean square of the elements of g before it is normalised: 0 for a consistent student"}

    @dataclass
    class Options:
        steps: int = field(default=1, metadata={"min": 1, "max": 2})  # of the finished student's sampler
        middle: float = 1.1  # TrigFlow's time of the second
        path: Literal["teacher", "data"] = "teacher"
        guidance: float = 1.0  # on the teacher
        times: TimeLaw = TimeLaw("log-normal", 0.0007, 0.9993, mean=-1.0, std=1.4)  # of log(sd tan t)
        data_std: float = field(default=0.5, metadata={"above": 0})  # sd
        tangent_warmup: float = field(default=0.1, metadata={"min": 0, "max": 1})  # share of the steps in which r grows
        tangent_c: float = field(default=0.1, metadata={"min": 0})  # c
        tangent_norm: Norm = "rms"
        # of noise to signal, below which r is 0: for networks that predict x0
        bound: float = field(default=0.0, metadata={"min": 0, "later": True})
        derivative: How = "exact"

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.variance = LogVariance()

    @turn(trains=("student", "variance"), optim=Optim(lr=1e-4))
    def consistency(self, batch: Batch) -> Terms:
        """``L``."""
        o, x0, cond = self.options, batch["x"], batch["cond"]
        t, z = trig_times(o.times, self.draw, o.data_std, self.teacher.process, x0), self.draw.normal_like(x0)
        u = TRIG.add_noise(x0, z, t)
        teacher, student = Reparametrised(self.teacher, TRIG), Reparametrised(self.student, TRIG)
        with torch.no_grad():
            on_x0, on_eps = (rate.reshape(-1, *(1,) * (x0.ndim - 1)) for rate in TRIG.velocity_weights(t))
            along = on_x0 * x0 + on_eps * z if o.path == "data" else teacher(u, t, cond, o.guidance).v
        warm = min(1.0, self.progress / o.tangent_warmup) if o.tangent_warmup else 1.0
        r = bound(t, o.bound, warm)
        own, tangent = scm_change(lambda u, t: student(u, t, cond).v, along, u, t, r, o.derivative)
        self.note("tangent", tangent.square().mean().sqrt())
        step = normalised(tangent, o.tangent_c / o.data_std, o.tangent_norm)
        return {"consistency": towards(own, step, 1 / (o.data_std * t.tan()), self.variance(t))}

    def sampler(self) -> FewStepSampler:
        return self.taking(self.options.steps, self.options, self.teacher.process)

    @staticmethod
    def taking(steps: int, options: Options, process: Process) -> FewStepSampler:
        """A sampler of so many steps."""
        middle = share_at(process, math.cos(options.middle), math.sin(options.middle))
        return FewStepSampler((1.0, middle)[:steps])

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        return by_steps(options.steps, (1, 2), lambda steps: cls.taking(steps, options, process))
