"""MeanFlow: a network of mean velocities, by the identity that they obey (arXiv 2505.13447)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from stillroom.diffusion.denoiser import Denoiser, Reparametrised
from stillroom.diffusion.derivatives import How
from stillroom.diffusion.process import Process, RectifiedFlow, last_time
from stillroom.diffusion.sampling import FlowMapSampler, Sampler, by_steps, flow_map_steps
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.losses.flow_map import adaptive, map_change, towards
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.networks.extra_inputs import with_inputs

FLOW = RectifiedFlow()


@register(
    "meanflow",
    Paper(
        title="Mean Flows for One-step Generative Modeling",
        arxiv="2505.13447",
        year=2025,
        venue="NeurIPS 2025",
    ),
)
class MeanFlow(Method):
    """A student ``F(x, t, r)`` that says the mean velocity of the path from t to r, so that one call leads from noise
    to data. With ``x = (1 - t) x0 + t eps`` and v the teacher's velocity there, or ``eps - x0``:

        g = v - F - (t - r) (v dF/dx + dF/dt)                     0 for mean velocities: eq. 6, eq. 9
        L = mean[ |g|^2 / sg(|g|^2 + c)^p ]                       through F alone: alg. 1, sec. 4.3

    For some of the rows r = t, where L is flow matching. Departures: norms are over the mean of squares; the paper
    trains without a teacher (``path: data``), here its velocity is the default, with its guidance; the second time is
    an input beside the embedding of the first, which says nothing at the start.
    """

    health = {"residual": "root mean square of the elements of g: 0 where F is the mean velocity of the path"}

    @dataclass
    class Options:
        steps: int = field(default=1, metadata={"min": 1})  # of the finished student's sampler, each to the next time
        path: Literal["teacher", "data"] = "teacher"
        guidance: float = 1.0  # on the teacher
        times: TimeLaw = TimeLaw("logit-normal", mean=-0.4, std=1.0, shift=1.0)  # of both times
        apart: float = field(default=0.25, metadata={"min": 0, "max": 1})  # share of rows with r below t
        power: float = field(default=1.0, metadata={"min": 0})  # p
        c: float = field(default=1e-3, metadata={"above": 0})
        width: int = field(default=64, metadata={"min": 2})  # of the embedding of r
        derivative: How = "exact"

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        if self.lora:
            raise UserError(
                "meanflow trains all weights, with an input that the network has not", cure="leave lora away"
            )
        self.teacher, self.end = frozen(teacher), last_time(teacher.process, FLOW)
        self.student = with_inputs(self.clone(student or teacher, "student"), "r", width=self.options.width)

    @turn(trains="student", optim=Optim(lr=1e-4, betas=(0.9, 0.95)))
    def jump(self, batch: Batch) -> Terms:
        """``L``."""
        o, x0, cond = self.options, batch["x"], batch["cond"]
        one, two = (o.times.sample(self.draw, FLOW).to(x0) for _ in "tr")
        t, r = (time.clamp(max=self.end) for time in (torch.maximum(one, two), torch.minimum(one, two)))
        r = torch.where(self.draw.uniform(len(x0)).to(x0) < o.apart, r, t)
        eps = self.draw.normal_like(x0)
        x_t = FLOW.add_noise(x0, eps, t)
        teacher, student = Reparametrised(self.teacher, FLOW), Reparametrised(self.student, FLOW)
        with torch.no_grad():
            v = eps - x0 if o.path == "data" else teacher(x_t, t, cond, o.guidance).v
        own, change = map_change(lambda x, t, r: student(x, t, {**cond, "r": r}).v, v, x_t, t, r, how=o.derivative)
        self.note("residual", change.square().mean().sqrt())
        return {"jump": towards(own, change, adaptive(change, o.power, o.c))}

    def sampler(self) -> FlowMapSampler:
        return flow_map_steps(self.options.steps)

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        return by_steps(options.steps, (1, 2, 4), flow_map_steps)
