"""Progressive distillation: each round a student learns two of its teacher's steps in one (arXiv 2202.00512)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.process import expand
from stillroom.diffusion.sampling import FewStepSampler, ddim_step
from stillroom.errors import UserError
from stillroom.losses.score import denoising_loss
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn


@register(
    "progressive",
    Paper(
        title="Progressive Distillation for Fast Sampling of Diffusion Models",
        arxiv="2202.00512",
        year=2022,
        venue="ICLR 2022",
        code="google-research/google-research",
    ),
)
class Progressive(Method):
    """Halves the number of steps again and again. In a round of n steps a student says in one of them where two DDIM
    steps of the last round's network lead; then it takes that network's place.

        t, t', t'' follow each other on the grid of 2 n steps, t one of that of n                  alg. 2
        z' = DDIM from z_t to t', z'' = DDIM from z' to t'', of the last round's network
        x~ = (z'' - (sigma'' / sigma_t) z_t) / (alpha'' - (sigma'' / sigma_t) alpha_t)
        L  = max(SNR, 1) |f(z_t, t) - x~|^2                                                        sec. 4

    z_t is noised data. Guidance acts in the first round, on the teacher (arXiv 2210.03142 distils it in a stage of its
    own). Departures: the paper's fixed number of updates a round is an equal share of the run's.
    """

    health = {"gap": "mean squared difference between the student's x0 and the two steps' x~, before its weight"}

    @dataclass
    class Options:
        begin: int = field(default=16, metadata={"min": 2})  # steps of the teacher; halved until ``end``
        end: int = field(default=1, metadata={"min": 1})  # steps of the finished student
        guidance: float = 1.0  # on the teacher
        weight: Literal["truncated", "none"] = "truncated"  # "truncated": max(SNR, 1)

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o, steps = self.options, self.rounds()
        if not steps or o.begin != o.end * 2 ** len(steps):
            raise UserError(
                f"{o.begin} steps do not become {o.end} by halving", cure="for example options.begin=16 options.end=1"
            )
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.last = self.clone(teacher, "last").requires_grad_(False)

    def rounds(self) -> list[int]:
        """How many steps the student has in each round."""
        steps, o = [], self.options
        while (steps[-1] if steps else o.begin) // 2 >= o.end:
            steps.append((steps[-1] if steps else o.begin) // 2)
        return steps

    def stages(self) -> tuple[Stage, ...]:
        own: dict[str, Any] = {"kind": "halve", "own_schedule": True, "fresh_optimizer": True}
        return tuple(Stage(f"{n} steps", round=k, **own) for k, n in enumerate(self.rounds(), 1))

    @torch.no_grad()
    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        """The student of the last round becomes what is learnt from."""
        if stage.round > 1 and not resumed:
            for theirs, mine in zip(self.last.parameters(), self.student.parameters(), strict=True):
                theirs.copy_(mine)

    def times(self, n: int) -> Tensor:
        """The ``n + 1`` times of a round, decreasing, all on the teacher's own grid."""
        return self.teacher.process.grid(self.options.begin)[:: self.options.begin // n]

    @torch.no_grad()
    def target(self, z: Tensor, times: Sequence[Tensor], cond: Cond) -> Tensor:
        """``x~`` from ``z [B, ...]``; t, t' and t'', ``[B]`` each."""
        process, (t, middle, after) = self.teacher.process, times
        first = self.stage.round == 1
        asked, guidance = (self.teacher, self.options.guidance) if first else (self.last, 1.0)
        half = ddim_step(asked(z, t, cond, guidance), process, expand(middle, z))
        whole = ddim_step(asked(half, middle, cond, guidance), process, expand(after, z))
        share = process.sigma(after) / process.sigma(t)
        rest = process.alpha(after) - share * process.alpha(t)
        return (whole - expand(share, z) * z) / expand(rest, z)

    @turn(trains="student", optim=Optim(lr=1e-4))
    def halve(self, batch: Batch) -> Terms:
        """``L = max(SNR, 1) |f(z_t, t) - x~|^2``."""
        process, x0, n = self.teacher.process, batch["x"], self.rounds()[self.stage.round - 1]
        k = 2 * self.draw.integers(n).cpu()
        grid = self.times(2 * n)
        times = [grid[k + ahead].to(x0) for ahead in range(3)]
        z = process.add_noise(x0, self.draw.normal_like(x0), times[0])
        target, said = self.target(z, times, batch["cond"]), self.student(z, times[0], batch["cond"]).x0
        self.note("gap", (said - target).square().mean())
        snr = (process.alpha(times[0]) / process.sigma(times[0])).square()
        weight = snr.clamp_min(1) if self.options.weight == "truncated" else 1.0
        return {"halving": denoising_loss(said, target, weight)}

    def sampler(self) -> FewStepSampler:
        shares = self.times(self.options.end)[:-1] / self.teacher.process.t_max
        return FewStepSampler(tuple(shares.tolist()), renoise="ddim")
