"""Phased DMD: experts by noise interval, each matched where it ends, by scores of noised samples (arXiv 2510.27684)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stillroom.data.source import LABELS
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.routed import ByNoise, RoutedDenoiser
from stillroom.diffusion.sampling import FewStepSampler, ddim_step, few_step_times
from stillroom.diffusion.times import TimeLaw
from stillroom.diffusion.transitions import Transition
from stillroom.errors import UserError
from stillroom.evaluation.metrics import conditional_energy_distance
from stillroom.losses import score
from stillroom.losses.score import denoising_loss, mean_abs_normaliser, score_difference_loss
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn
from stillroom.surgery.lora import take_over

STUDENT_OPTIM = Optim(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip_norm=10.0)
FAKE_OPTIM = Optim(lr=4e-7, betas=(0.0, 0.999), weight_decay=0.01, clip_norm=10.0)


@register(
    "phased-dmd",
    Paper(
        title="Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
        arxiv="2510.27684",
        year=2025,
        venue="CVPR 2026",
        code="ModelTC/LightX2V",
    ),
)
class PhasedDMD(Method):
    """A few-step student of several experts, each for an interval of noise, trained one after the other from the noise
    on.

    The N steps are the K phases' in equal parts; phase k begins at ``t_(k-1)`` (1 at first) and ends at ``t_k`` (0 at
    last). In phase k the student runs its steps as it will be run, by Euler, through the finished experts of the phases
    before; of phase k's own steps a random one is the last, and jumps to ``s = t_k``. Only it has a graph. Its end x_s
    is noised further, ``x_t = a x_s + b eps`` with t in (s, 1], and

        x0 descends along  (D_f(x_t) - D_r(x_t)) / mean |x0 - D_r(x_t)|,      x0 the last call's prediction
        or x_s along       a alpha_t / sigma_t^2 (D_f(x_t) - D_r(x_t))        eq. 13, the divergence's own gradient
        L_F = mean min(1 / b^2, 10) |b v_f(x_t) - b target|^2                  eq. 11
        target = (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 b) eps - x_s / alpha_s

    D_r is the teacher's (guided) and D_f the fake score's x0-prediction. The target needs no clean sample: its mean is
    the velocity of the noised law of x_s. In the last phase s = 0, and this is distribution matching as ever. At the
    beginning of each phase the fake score is the teacher again.

    A teacher of two experts gives each phase the expert that answers where the phase begins.

    Departures: the paper's student and fake score are of hundreds of steps' training per phase on 64 samples; lengths
    and rates of the phases are the recipe's own.
    """

    experts = True
    health = {
        **score.HEALTH,
        "fake_error": "the fake score's weighted error against the unbiased velocity target: it does not reach 0, the "
        "target is noisy",
        "sample_std": "standard deviation of all elements of a batch of x_s, which each phase has its own of",
        **{
            f"end_gap_{k}": "energy distance, class by class, between where the student stands at the end of phase "
            f"{k} and where the teacher's path of 32 steps does, when the phase is over (options.measured)"
            for k in (1, 2)
        },
    }

    @dataclass
    class Options:
        student_steps: int = field(default=4, metadata={"min": 1})  # N network calls at inference
        phases: int = field(default=2, metadata={"min": 1})  # K; 1: distribution matching with a random last step
        # Of the student, for equal parts of the steps; 0: one for each phase
        experts: int = field(default=0, metadata={"min": 0})
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})  # of the first call
        shift: float = field(default=1.0, metadata={"above": 0})  # of the steps' times, s u / (1 + (s - 1) u); Wan: 7
        guidance: float = 1.0  # on the teacher only
        critic_turns: int = 5  # fake-score updates per student update
        gradient: Literal["normalised", "divergence"] = "normalised"  # normalised: as the authors' code
        # "biased" takes x_s for clean data, the ablation that fails
        target: Literal["unbiased", "biased"] = "unbiased"
        # Of the weight 1 / b^2; 0: squared errors of v as they are
        clamp: float = field(default=10.0, metadata={"min": 0})
        # True: noised up to noise alone; False: within the phase's own interval
        nested: bool = True
        restart: bool = True  # the fake score is the teacher again in each phase; False: it goes on
        # Laws of the share of the way from s up
        generator_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        critic_times: TimeLaw = TimeLaw("uniform", 0.02, 1.0)
        measured: int = field(default=0, metadata={"min": 0})  # batches, at the end of the first two phases

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        self._check()
        self.times = few_step_times(o.student_steps, o.t_init, o.shift)
        self.teacher = frozen(teacher)
        self.fake = self.clone(teacher, "fake")
        self.student = self._experts(student or teacher)

    def _check(self) -> None:
        o = self.options
        if o.student_steps % o.phases:
            raise UserError(
                f"options.student_steps={o.student_steps} cannot be shared by options.phases={o.phases} equally",
                cure="choose a multiple",
            )
        if o.experts and (o.student_steps % o.experts or o.experts % o.phases):
            raise UserError(
                f"options.experts={o.experts} for {o.phases} phases of {o.student_steps} steps in all: each phase must "
                "have as many of its own, and each of them as many steps",
                cure="options.experts=0 is one for each phase",
            )

    def _experts(self, start: Denoiser) -> Denoiser:
        """The student: a denoiser, or several by noise, each a copy of what answers where it begins."""
        count = self.options.experts or self.options.phases
        own = len(self.times) // count
        firsts = [self.times[k * own] for k in range(count)]
        begins = [start.expert_at(u) if isinstance(start, RoutedDenoiser) else start for u in firsts]
        if count == 1:
            return self.clone(begins[0], "student")
        made = {f"phase-{k}": self.clone(one, "student", str(k)) for k, one in enumerate(begins, 1)}
        # between the last call of one and the first of the next, so that no rounding takes a call across
        bounds = [(self.times[k * own - 1] + self.times[k * own]) / 2 for k in range(1, count)]
        return RoutedDenoiser(dict(reversed(made.items())), ByNoise(tuple(reversed(bounds))))

    # --- phases ---------------------------------------------------------------------------------------------------
    def stages(self) -> tuple[Stage, ...]:
        return tuple(
            Stage(f"phase {k + 1}", kind="phase", round=k, own_schedule=True, fresh_optimizer=True)
            for k in range(self.options.phases)
        )

    def enter(self, stage: Stage, data: object, resumed: bool) -> None:
        """The fake score begins as the teacher: what it has to learn is of another law than before."""
        if self.options.restart and stage.round and not resumed:
            take_over(self.fake, self.teacher)

    @property
    def own_steps(self) -> range:
        """The numbers of this phase's steps."""
        each = len(self.times) // self.options.phases
        return range(self.stage.round * each, (self.stage.round + 1) * each)

    @property
    def end(self) -> float:
        """``s = t_k`` of this phase, as a share of ``t_max``."""
        after = self.own_steps.stop
        return self.times[after] if after < len(self.times) else 0.0

    def reach(self, cond: Cond, grad: bool, whole: bool = False) -> tuple[Tensor, Tensor]:
        """``(x_s, x0)``: the end of this phase, as the student reaches it by a random one of its own steps (whole: by
        all of them), and what that step's call says. The graph, if ``grad``, is that call's alone."""
        process, steps = self.student.process, self.own_steps
        last = steps[-1] if whole or len(steps) == 1 else steps[self.draw.index(len(steps))]
        noise = self.draw.normal(self.draw.local, *self.student.shape).to(next(self.student.parameters()))
        ts = [torch.full((), u * process.t_max, dtype=noise.dtype, device=noise.device) for u in self.times[: last + 1]]
        x = process.sigma(ts[0]) * noise
        with torch.no_grad():
            for t, following in itertools.pairwise(ts):
                x = ddim_step(self.student(x, t, cond), process, following)
        with torch.set_grad_enabled(grad):
            p = self.student(x, ts[-1], cond)
            x_s = ddim_step(p, process, noise.new_full((), self.end * process.t_max)) if self.end else p.x0
        return x_s, p.x0

    def transition(self, x_s: Tensor, law: TimeLaw) -> Transition:
        """From s to times above it by ``law``, a share of the way to noise alone or to where the phase begins."""
        process = self.student.process
        top = process.t_max * (1.0 if self.options.nested else self.times[self.own_steps.start])
        low = self.end * process.t_max
        t = low + (top - low) / process.t_max * law.sample(self.draw, process).to(x_s)
        return Transition(process, x_s.new_full((), low) if self.end else None, t)

    @turn(trains="student", every="critic_turns", optim=STUDENT_OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """Distribution matching at the end of the phase."""
        o, cond = self.options, batch["cond"]
        x_s, x0 = self.reach(cond, grad=True)
        self.shared["x_s"] = x_s.detach()
        way = self.transition(x_s, o.generator_times)
        x_t = way.noised(x_s.detach(), self.draw.normal_like(x_s))
        with torch.no_grad():
            real, fake = self.teacher(x_t, way.t, cond, o.guidance).x0, self.fake(x_t, way.t, cond).x0
        if o.gradient == "normalised":
            moved, weight = x0, mean_abs_normaliser(x0, real)
        else:
            moved, weight = x_s, way.score_weight()
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x_s.std())
        return {"dm": score_difference_loss(moved, fake, real, di=1.0, weight=weight / x_s[0].numel())}

    @turn(trains="fake", optim=FAKE_OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """``L_F``, every step: the fake score learns the velocity of the noised law of x_s, from x_s alone."""
        o, cond = self.options, batch["cond"]
        x_s = self.shared.get("x_s")
        if x_s is None:
            x_s = self.reach(cond, grad=False)[0]
        way, eps = self.transition(x_s, o.critic_times), self.draw.normal_like(x_s)
        target = (way.velocity if o.target == "unbiased" else way.biased_velocity)(x_s, eps)
        loss = denoising_loss(self.fake(way.noised(x_s, eps), way.t, cond).v, target, way.weight(o.clamp))
        self.note("fake_error", loss)
        self.measure(batch)
        return {"denoise": loss}

    @torch.no_grad()
    def measure(self, batch: Batch) -> None:
        """In the last step of a phase, where that is asked for: how far from the teacher's path it ends."""
        o, number = self.options, self.stage.round + 1
        if not o.measured or not self.progress or number > 2:
            return
        if self.step + 1 < round(round(self.step / self.progress) * number / o.phases):
            return
        cond, labels = batch["cond"], batch["cond"][LABELS].repeat(o.measured)
        mine = torch.cat([self.reach(cond, grad=False, whole=True)[0] for _ in range(o.measured)]).flatten(1)
        real = torch.cat([self.teacher_end(cond, mine) for _ in range(o.measured)]).flatten(1)
        gap = conditional_energy_distance(mine.double(), labels, real.double(), labels)
        self.note(f"end_gap_{number}", mine.new_tensor(gap))

    def teacher_end(self, cond: Cond, like: Tensor, steps: int = 32) -> Tensor:
        """Where the teacher's path stands at the end of this phase."""
        process = self.teacher.process
        noise = self.draw.normal(self.draw.local, *self.teacher.shape).to(like)
        times = torch.linspace(self.times[0], self.end, steps + 1).to(like) * process.t_max
        x = process.sigma(times[0]) * noise
        for t, following in itertools.pairwise(times):
            p = self.teacher(x, t, cond, self.options.guidance)
            x = ddim_step(p, process, following) if following > 0 else p.x0
        return x

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.times, "ddim")
