"""Knowledge distillation: regression on the ends of a teacher's stored deterministic paths (arXiv 2101.02388)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from stillroom.data.trajectories import Paths, Trajectories, paths_for
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.errors import UserError
from stillroom.losses.score import denoising_loss
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.surgery.modules import device_of


@register(
    "kd",
    Paper(
        title="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        arxiv="2101.02388",
        year=2021,
        code="tcl9876/Denoising_Student",
    ),
)
class KD(Method):
    """A student that says, at the states of its teacher's stored paths that its own steps would visit, where the path
    ends: the plain baseline of all that learns a teacher's paths.

        L = mean |f(x_t, t, c) - x_end|^2,    t one of the student's ``steps`` times, x_t on the path    eq. 6

    Only conditions are read. Paths are deterministic, stored once, guided by ``guidance``. For one step noise and end
    alone are kept. Departures: the paper's is one step; several are as in other collections of such methods.
    """

    blank_stores = True
    health = {"gap": "mean squared difference between the student's answer and the end of the path"}

    @dataclass
    class Options:
        steps: int = field(default=1, metadata={"min": 1})  # of the student
        paths: int = field(default=10_000, metadata={"min": 1})  # that are stored
        path_steps: int = field(default=50, metadata={"min": 1})  # of each
        guidance: float = 1.0  # on the teacher
        path_seed: int = field(default=0, metadata={"min": 0})
        stored: str = ""  # folder that keeps the paths; written where it is not there; none: they are held in memory
        stored_precision: Literal["float16", "float32"] = "float16"

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        if o.path_steps % o.steps:
            raise UserError(
                f"{o.steps} steps of the student do not lie on paths of {o.path_steps}",
                cure="make options.path_steps a multiple of options.steps",
            )
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")

    def prepare(self, data: Any) -> None:
        """The teacher's paths, for conditions of the data; its images are not looked at."""
        o = self.options
        keep: Literal["ends", "all"] = "ends" if o.steps == 1 else "all"
        paths = Paths(
            o.paths, o.path_steps, low=o.guidance, high=o.guidance, seed=o.path_seed, keep=keep,
            precision=o.stored_precision,
        )  # fmt: skip
        self.found: Trajectories = paths_for(data, self.teacher, paths, o.stored)

    def times(self) -> Tensor:
        """Of the student's steps, decreasing, float64: those of a path that they lie on."""
        o = self.options
        return self.teacher.process.grid(o.path_steps)[:-1][:: o.path_steps // o.steps]

    def states(self, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Cond, Tensor]:
        """``x_t``, ``t``, conditions and ends of paths ``rows [B]``, at the student's steps ``which [B]``."""
        found, device, process = self.found, device_of(self.teacher), self.teacher.process
        t = self.times()[which].to(device, found.scale.dtype)
        if self.options.steps == 1:
            x_t = process.sigma(t[0]) * found.noise[rows].float().to(device)
        else:
            assert found.states is not None
            x_t = found.states[rows, which * (self.options.path_steps // self.options.steps)].float().to(device)
        cond = {name: value[rows].to(device) for name, value in found.cond.items()}
        return x_t, t, cond, found.end[rows].float().to(device)

    @turn(trains="student", optim=Optim(lr=1e-4))
    def regress(self, batch: Batch) -> Terms:
        """``L = mean |f(x_t, t, c) - x_end|^2``."""
        rows, which = (self.draw.integers(high).cpu() for high in (self.found.n, self.options.steps))
        x_t, t, cond, end = self.states(rows, which)
        loss = denoising_loss(self.student(x_t, t, cond).x0, end)
        self.note("gap", loss)
        return {"regression": loss}

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(tuple((self.times() / self.teacher.process.t_max).tolist()), renoise="ddim")
