"""Adapter guidance distillation: guided sampling in one pass instead of two (arXiv 2503.07274)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.data.trajectories import Paths, Trajectories, paths_for
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler, ScaleSampler
from stillroom.errors import UserError
from stillroom.losses.score import denoising_loss
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.networks.extra_inputs import SCALE, with_inputs
from stillroom.networks.guidance_adapters import GuidanceAdapters, Kind, guidance_adapters
from stillroom.surgery.attached import AttachedDenoiser
from stillroom.surgery.modules import device_of, evaluating

ROWS = 256
"""Of paths to measure on, at a time."""


@register(
    "agd",
    Paper(
        title="Efficient Distillation of Classifier-Free Guidance using Adapters",
        arxiv="2503.07274",
        year=2025,
        venue="TMLR 2025",
        code="cristianpjensen/agd",
    ),
)
class AGD(Method):
    """The frozen teacher with small adapters, which answers for any guidance scale w of a range in one pass as it does
    in two. Steps and sampler stay the teacher's. No images are read: the states are those that the guided sampler
    itself visits. Without a scale the adapters are silent, and the teacher's own answers, guided ones too, come back
    bit for bit.

        g   = u + w (k - u)                u, k: without and with the condition; w = 1: no guidance
        L   = mean |f(x_t, t, c; w) - g|^2     in the network's own output space, all steps alike
        A'(h) = A(h) + a(h; w, t, c)       on attention modules, a = 0 at the start

    The pairs (x_t, g) are stored: for each condition w ~ U(low, high) and x_T ~ N(0, I), then every step of the
    sampler. Steps of a path are alike, so a batch takes states of all paths at random.

    Departures: scales go to the encoder as they are (``scale_factor`` 1; the code multiplies them by 1000 for offset
    adapters, where neighbouring scales have nothing in common); times and conditions are read by default; the last
    projection always begins at zero.
    """

    blank_stores = True
    health = {
        "gap": "mean squared difference between the student's and the guided teacher's answers, in the network's own "
        "output space: 0 where the adapters do all that guidance does",
        "held_out_gap": "the same on states of other guided paths, of scales from held_out_low on, within those learnt",
        "end_gap": "mean squared difference between the student's samples and the guided teacher's from the same "
        "noise, over these paths; where paths are deterministic (eta 0) alone",
    }

    @dataclass
    class Options:
        adapter: Kind = "auto"  # attention where modules read texts, else offset
        modules: tuple[str, ...] = ()  # endings of module paths; none: each cross-attention, or attention, or block
        width: int = field(default=256, metadata={"min": 2})  # of an adapter; 320 in the paper's attention adapters
        scale_factor: float = 1.0  # what a scale is multiplied by before it is encoded
        low: float = 1.0  # guidance scales that are learnt: from low ...
        high: float = 6.0  # ... to high
        paths: int = field(default=4000, metadata={"min": 1})  # that are stored; the paper: 4 for each of 1000 classes
        path_steps: int = field(default=1000, metadata={"min": 1})  # of each
        eta: float = field(default=1.0, metadata={"min": 0, "max": 1})  # 1: ancestral paths, 0: deterministic ones
        path_seed: int = field(default=0, metadata={"min": 0})
        stored: str = ""  # folder that keeps the paths; written where it is not there; none: they are held in memory
        stored_precision: Literal["float16", "float32"] = "float16"
        # Ablations: states of noised data, which reads images; all weights, no adapters; answers without guidance.
        states: Literal["guided", "noised"] = "guided"
        tune: Literal["adapters", "all"] = "adapters"
        taught: Literal["guided", "plain"] = "guided"
        held_out: int = field(default=0, metadata={"min": 0})  # paths that are not learnt from, to measure on; 0: none
        held_out_low: float = 4.0  # their scales are from here to high, within those that are learnt
        measure_every: int = field(default=100, metadata={"min": 1})  # steps
        steps: int = field(default=50, metadata={"min": 1})  # of the finished student's sampler ...
        solver: Literal["euler", "heun", "dpm++"] = "euler"
        scale: float = 2.0  # ... and its scale, which may be changed at each call

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        if not teacher.null:
            raise UserError(
                "agd learns guidance, and this teacher has no unconditional value",
                cure="give a teacher that was trained with conditions left out, and say what stands for none",
            )
        if o.high < o.low:
            raise UserError(f"options.low={o.low:g} is above options.high={o.high:g}", cure="exchange them")
        self.teacher = frozen(teacher)
        given = student.attachment if isinstance(student, AttachedDenoiser) else None
        if o.tune == "all":
            own = self.clone(student or teacher, "student")
            self.student: AttachedDenoiser = with_inputs(own, SCALE, width=o.width)
        elif student is None or student is teacher:  # tasks hand the teacher over where no student is named
            self.student = AttachedDenoiser(
                self.teacher, guidance_adapters(teacher, o.adapter, o.modules, o.width, o.scale_factor)
            )
        elif isinstance(given, GuidanceAdapters):  # they go on; the base is the teacher in any case
            self.student = AttachedDenoiser(self.teacher, copy.deepcopy(given))
        else:
            raise UserError(
                "the student that is given has no guidance adapters to go on with",
                cure="give one that agd has made, none, or options.tune=all",
            )

    def prepare(self, data: Any) -> None:
        """The teacher's guided paths, for conditions of the data; its images are not looked at."""
        o = self.options
        self.others: Trajectories | None = None
        self._measured = -1  # the last step that was
        if o.states == "guided":
            self.found = self._paths(data, o.stored, o.paths, o.low, o.path_seed)
        if o.held_out:
            low = min(max(o.low, o.held_out_low), o.high)
            self.others = self._paths(data, "", o.held_out, low, o.path_seed + 1)

    def _paths(self, data: Any, folder: str, count: int, low: float, seed: int) -> Trajectories:
        o = self.options
        paths = Paths(count, o.path_steps, o.eta, low, o.high, seed, "all", o.stored_precision)
        return paths_for(data, self.teacher, paths, folder)

    @torch.no_grad()
    def measure(self, others: Trajectories) -> None:
        """The student on paths that it does not learn from: at their states, and from their noise to their end."""
        device, steps = device_of(self.teacher), self.options.path_steps
        assert others.states is not None
        assert others.answers is not None
        assert others.times is not None
        gaps, ends = [], []
        with evaluating(self.student):
            for rows in torch.arange(others.n).split(ROWS):
                cond = {name: value[rows].to(device) for name, value in others.cond.items()}
                cond |= {SCALE: others.scale[rows].to(device)}
                for k in range(0, steps, max(steps // 10, 1)):
                    x_t, answer = (part[rows, k].float().to(device) for part in (others.states, others.answers))
                    said = self.student(x_t, others.times[rows, k].to(device), cond).value
                    gaps.append((said - answer).square().flatten(1).mean(1))
                if not self.options.eta:
                    end = ODESampler("euler", steps).sample(self.student, others.noise[rows].float().to(device), cond)
                    ends.append((end - others.end[rows].to(device).float()).square().flatten(1).mean(1))
        self.note("held_out_gap", torch.cat(gaps).mean())
        if ends:
            self.note("end_gap", torch.cat(ends).mean())

    def stored_states(self) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """``x_t``, ``t``, conditions with the scale, and the guided answer, of states at random."""
        device = device_of(self.teacher)
        row = self.found.read(self.draw.integers(self.found.size).cpu())
        cond = {name: value.to(device) for name, value in row["cond"].items()}
        x_t, t, answer, w = (row[name].to(device) for name in ("x_t", "t", "answer", "scale"))
        return x_t, t, cond | {SCALE: w}, answer

    def noised_states(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """The same of noised data, which the ablation learns from."""
        o, process, x0 = self.options, self.teacher.process, batch["x"]
        grid = process.grid(o.path_steps)[:-1].to(x0)
        t = grid[self.draw.integers(len(grid))]
        w = o.low + (o.high - o.low) * self.draw.uniform(len(x0)).to(x0)
        x_t = process.add_noise(x0, self.draw.normal_like(x0), t)
        with torch.no_grad():
            answer = self.teacher(x_t, t, batch["cond"], w).value
        return x_t, t, {**batch["cond"], SCALE: w}, answer

    @turn(trains="student", optim=Optim(lr=1e-4))
    def imitate(self, batch: Batch) -> Terms:
        """``L = mean |f(x_t, t, c; w) - g|^2``."""
        noised = self.options.states == "noised"
        x_t, t, cond, answer = self.noised_states(batch) if noised else self.stored_states()
        if self.options.taught == "plain":
            with torch.no_grad():
                answer = self.teacher(x_t, t, {name: value for name, value in cond.items() if name != SCALE}).value
        loss = denoising_loss(self.student(x_t, t, cond).value, answer)
        self.note("gap", loss)
        due = (self.step + 1) % self.options.measure_every == 0 and self.step != self._measured
        if self.others is not None and due:  # once in a step
            self._measured = self.step
            self.measure(self.others)
        return {"guidance": loss}

    def sampler(self) -> ODESampler:
        o = self.options
        return ScaleSampler(o.solver, o.steps, scale=o.scale)
