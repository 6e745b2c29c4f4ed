"""Align Your Flow: flow maps by consistency of any jump along the teacher's path, in continuous time (arXiv
2506.14603)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stillroom.diffusion.denoiser import Denoiser, Reparametrised
from stillroom.diffusion.derivatives import How
from stillroom.diffusion.process import Process, RectifiedFlow, last_time
from stillroom.diffusion.sampling import FlowMapSampler, Sampler, by_steps, flow_map_steps
from stillroom.errors import UserError
from stillroom.losses.flow_map import Norm, map_change, normalised, towards
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.networks.extra_inputs import with_inputs

FLOW = RectifiedFlow()


@register(
    "ayf",
    Paper(
        title="Align Your Flow: Scaling Continuous-Time Flow Map Distillation",
        arxiv="2506.14603",
        year=2025,
        venue="NeurIPS 2025",
    ),
)
class AYF(Method):
    """A student ``f(x, t, s) = x + (s - t) F(x, t, s)`` that jumps between any two times of the teacher's path; s = 0
    is a consistency model, s = t the teacher (AYF-EMD). With v the teacher's (guided) velocity at x:

        g       = v - F + q (s - t) (v dF/dx + dF/dt),    g <- g / (|g| + c)               df/dt, sec. 3.2, 3.3
        grad L  = -grad mean <F, g>                                                        the weight |t - s| f leaves

    q grows from 0 to 1. Departures: autoguidance and the adversarial end are left out; jumps have a length whose logit
    is normal and lie anywhere; norms are over the mean of squares; the second time is an input beside the embedding of
    the first, which says nothing at the start.
    """

    health = {"residual": "root mean square of the elements of g before it is normalised: 0 for flow maps of the path"}

    @dataclass
    class Options:
        steps: int = field(default=1, metadata={"min": 1})  # of the finished student's sampler, each to the next time
        guidance: float = 1.0  # on the teacher
        length_mean: float = -0.8  # of the logit of t - s
        length_std: float = field(default=1.0, metadata={"above": 0})
        tangent_warmup: float = field(default=0.1, metadata={"min": 0, "max": 1})  # share of the steps in which q grows
        tangent_c: float = field(default=0.1, metadata={"min": 0})  # c
        tangent_norm: Norm = "rms"
        width: int = field(default=64, metadata={"min": 2})  # of the embedding of s
        derivative: How = "exact"

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        if self.lora:
            raise UserError("ayf trains all weights, with an input that the network has not", cure="leave lora away")
        self.teacher, self.end = frozen(teacher), last_time(teacher.process, FLOW)
        self.student = with_inputs(self.clone(student or teacher, "student"), "r", width=self.options.width)

    @turn(trains="student", optim=Optim(lr=1e-4))
    def align(self, batch: Batch) -> Terms:
        """``L``, whose gradient is that of ``|F - sg(F) - g|^2 / 2``."""
        o, x0, cond = self.options, batch["x"], batch["cond"]
        length = torch.sigmoid(o.length_mean + o.length_std * self.draw.normal(len(x0))).to(x0)
        s = self.draw.uniform(len(x0)).to(x0) * (1 - length)
        t = (s + length).clamp(max=self.end)
        x_t = FLOW.add_noise(x0, self.draw.normal_like(x0), t)
        teacher, student = Reparametrised(self.teacher, FLOW), Reparametrised(self.student, FLOW)
        with torch.no_grad():
            v = teacher(x_t, t, cond, o.guidance).v
        warm = min(1.0, self.progress / o.tangent_warmup) if o.tangent_warmup else 1.0
        own, change = map_change(lambda x, t, r: student(x, t, {**cond, "r": r}).v, v, x_t, t, s, warm, o.derivative)
        self.note("residual", change.square().mean().sqrt())
        return {"align": 0.5 * towards(own, normalised(change, o.tangent_c, o.tangent_norm))}

    def sampler(self) -> FlowMapSampler:
        return flow_map_steps(self.options.steps)

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        return by_steps(options.steps, (1, 2, 4), flow_map_steps)
