"""Hyper-SD: consistency within ever longer segments, human feedback, one-step score distillation (arXiv 2404.13686)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.process import EDM, Process
from stillroom.diffusion.sampling import (
    FewStepSampler,
    ODESampler,
    Sampler,
    TCDSampler,
    by_steps,
    ddim_step,
    few_step_times,
    jump,
)
from stillroom.diffusion.times import Segments, TimeLaw
from stillroom.errors import UserError
from stillroom.evaluation.agreement import agreement_for, trained_agreement
from stillroom.losses import adversarial, score
from stillroom.losses.rewards import Reward, hinge, named_reward
from stillroom.losses.score import FakeLoss, denoising_loss, fake_score_loss, mean_abs_normaliser, score_difference_loss
from stillroom.method import Batch, Method, Optim, Paper, Stage, Target, Terms, frozen, register, turn, unfrozen
from stillroom.networks.discriminators import Discriminator
from stillroom.surgery.lora import KEPT, LoraDenoiser, lora_role, take_over

AGREEMENT = "agreement"
LATEST = "latest"
FEEDBACK = "feedback"
OPTIM = Optim(lr=1e-6)


@register(
    "hyper-sd",
    Paper(
        title="Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        arxiv="2404.13686",
        year=2024,
        venue="NeurIPS 2024",
    ),
)
class HyperSD(Method):
    """A student for few steps in three parts, each of which may be left out. One student serves every number of steps;
    with LoRA, the adapter after each number of segments is kept as well.

    Segments (TSCD; stages of k = 8, 4, 2, 1 of them). On a grid 0 = t_0 < ... < t_N of 8 k steps, n uniform in 1 .. N,
    s uniform in the grid times from the start of t_n's segment to t_(n-1), w uniform in the range of guidance, Psi(x,
    f, s) = alpha_s x0 + sigma_s eps the deterministic step with the network's answer f held fixed:

        nearer = Psi(x_n, f_teacher(x_n, t_n, c; w), t_(n-1))
        target = sg Psi(nearer, f_target(nearer, t_(n-1), c), s)          f_target: an average of the student
        L      = a_k |Psi(x_n, f(x_n, t_n, c), s) - target|^2  -  b_k log D(Psi(...), s, c)

    In later stages the teacher is the student of the stage before (``stage_teacher``), which is asked without guidance:
    it has learnt jumps as long as the steps of the coarser grids.

    Feedback (ReFL): the few-step student is run to a random one of its steps, whose prediction x0 alone has a
    gradient, L = mean ReLU(margin - reward(x0, c)). An adapter of its own learns it; without that the student is as
    before.

    One step: x = f(z, t_init).x0, noised at a random time, descends x along D_fake - D_real over
    mean |x - D_real|; D_real is the student of the first part (``real``). To that come the distance to what that
    student makes of z in eight steps, and the feedback. D_fake learns to denoise x.

    Departures: the discriminator is a head on a middle block of the frozen teacher; rewards are agreement with class or
    text, or the user's own, in place of the paper's models of aesthetics, and there is none of instances' shapes.
    """

    health = {
        "consistency": "mean squared difference of student and target at the times where they must agree",
        "real_logit": "mean logit of the discriminator on the targets: log odds of being one, 0 where it cannot tell",
        "fake_logit": "the same on what the student says in their place",
        "reward": "mean score of the student's predictions that feedback looks at",
        "fake_error": score.HEALTH["fake_error"],
        "score_gap": score.HEALTH["score_gap"],
        "sample_std": "standard deviation of all elements of a batch of the student's one-step samples",
        **{
            f"gap_{k}": f"mean squared difference between the student's samples in {k} step{'s' * (k > 1)} and the end "
            "of the teacher's path of 64 from the same noise, at the end of the training (options.measured)"
            for k in (1, 2, 4, 8)
        },
    }

    @dataclass
    class Options:
        segments: tuple[int, ...] = (8, 4, 2, 1)  # of the path from noise to data, one stage each
        consistency_share: float = field(default=1.0, metadata={"min": 0})  # of the steps, equal for each of these
        grids: tuple[int, ...] = (64, 32, 16, 8)  # steps of the whole grid, for each number of segments: 8 in each. R
        target_decay: float = field(default=0.95, metadata={"min": 0, "max": 1})  # of the average that is the target. R
        stage_teacher: Literal["previous", "original"] = "previous"  # of later stages: the student before it
        guidance_low: float = 1.0  # scales of the teacher's guidance: from low ...
        guidance_high: float = 1.0  # ... to high
        mse: tuple[float, ...] = (1.0, 1.0, 0.5, 0.1)  # a_k, for each number of segments. R
        adversarial: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)  # b_k; all 0: no discriminator. R
        gan_block: str = ""  # module path of the block that the discriminator reads; empty: the middle one
        offset_noise: float = field(default=0.1, metadata={"min": 0})  # the same at all places of a channel. R
        feedback_share: float = field(default=0.0, metadata={"min": 0})  # of the steps, for the adapter of feedback
        reward: str = AGREEMENT  # with class or text, learnt from the data; or package.module:function of your own
        reward_margin: float = -0.05  # what a reward must reach; agreement is a log probability. R
        reward_steps: int = field(default=600, metadata={"min": 1})  # of the network that judges agreement
        feedback_steps: int = field(default=4, metadata={"min": 1})  # of the student that feedback looks at
        feedback_start: Literal["noise", "data"] = "noise"  # where its path begins: noise, or noised data
        feedback_rank: int = field(default=8, metadata={"min": 1})  # of the adapter ...
        feedback_targets: tuple[str, ...] = ("to_q", "to_v")  # ... and the modules that it changes
        one_step_share: float = field(default=0.0, metadata={"min": 0})  # of the steps, for one-step score distillation
        real: Literal["consistent", "teacher"] = "consistent"  # who is D_real
        real_guidance: float = 1.0  # of the teacher as D_real
        one_step_mse: float = field(default=0.25, metadata={"min": 0})  # R
        one_step_feedback: float = field(default=1.0, metadata={"min": 0})  # weight of feedback there, if there is any
        critic_turns: int = field(default=1, metadata={"min": 1})  # updates of D_fake for one of the student
        generator_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        critic_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)
        fake_loss: FakeLoss = "v"
        student_steps: int = field(default=1, metadata={"min": 1})  # of the finished student's sampler
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})  # of the first call; one-step U-Net: 0.8
        scheduler: Literal["tcd", "ddim"] = "tcd"  # tcd for all numbers of steps, ddim as in the papers' 2, 4 and 8
        eta: float = field(default=0.0, metadata={"min": 0, "max": 1})  # of tcd: noise added afresh between steps
        measured: int = field(default=0, metadata={"min": 0})  # batches that are measured in the last step

        @property
        def judged(self) -> bool:
            """Whether there is a discriminator."""
            return self.consistency_share > 0 and any(self.adversarial)

    options: Options
    discriminator: Any
    feedback: Any
    fake: Any

    def build(
        self,
        teacher: Denoiser,
        student: Denoiser | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        o = self.options
        self._check()
        self.decode, self.asks = decode, named_reward(o.reward) if o.reward != AGREEMENT else None
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        names = [f"{KEPT}{k}" for k in o.segments] if "student" in self.lora else [LATEST]
        kept = o.one_step_share > 0 or (len(o.segments) > 1 and (o.stage_teacher == "previous" or len(names) > 1))
        self.target = self._copy("target")
        self.kept = nn.ModuleDict({name: self._copy(name) for name in names} if kept else {})
        self.fake = self.clone(teacher, "fake") if o.one_step_share else None
        self.discriminator = Discriminator(self.teacher, o.gan_block) if o.judged else nn.Identity()
        self.feedback = None
        if o.feedback_share:
            role = "student" if "student" in self.lora else ""
            lora_role(self.student, FEEDBACK, o.feedback_rank, targets=o.feedback_targets)
            base = self.student
            self.student = LoraDenoiser(base, role, beside=(FEEDBACK,))
            self.feedback = LoraDenoiser(base, FEEDBACK, beside=(role,))
        self.times = few_step_times(o.student_steps, o.t_init)

    def _check(self) -> None:
        o = self.options
        each = {name: getattr(o, name) for name in ("grids", "mse", "adversarial")}
        for name, found in each.items():
            if o.consistency_share and len(found) != len(o.segments):
                raise UserError(
                    f"options.segments has {len(o.segments)} stages, options.{name} {len(found)}",
                    cure="give one number for each",
                )
        for steps, count in zip(o.grids, o.segments, strict=False):
            if count < 1 or steps % count:
                raise UserError(
                    f"options.grids: {steps} steps cannot be cut into {count} equal segments",
                    cure=f"choose a multiple of {count}",
                )
        if any(after >= before for before, after in itertools.pairwise(o.segments)):
            raise UserError(
                f"options.segments are fewer at each stage, not {list(o.segments)}",
                cure=f"options.segments={sorted(set(o.segments), reverse=True)}".replace(" ", ""),
            )
        if o.guidance_high < o.guidance_low:
            raise UserError(
                f"options.guidance_low={o.guidance_low:g} is above options.guidance_high={o.guidance_high:g}",
                cure="exchange them",
            )
        if o.one_step_share and "fake" in self.lora and self.lora["fake"] != self.lora.get("student"):
            raise UserError(
                "lora.fake differs from lora.student, whose weights it takes over", cure="give both the same settings"
            )
        if not o.consistency_share + o.feedback_share + o.one_step_share:
            raise UserError("every part of hyper-sd has share 0", cure="set options.consistency_share to 1")

    def _copy(self, role: str) -> Denoiser:
        """A network that begins as the student and that no turn trains: an adapter where the student is one."""
        if "student" in self.lora:
            made: Denoiser = lora_role(self.teacher, role, **self.lora["student"])
            take_over(made, self.student)
            return made
        return unfrozen(copy.deepcopy(self.student)).eval()

    def prepare(self, data: Any) -> None:
        """The judge of agreement, where feedback asks for it, learns from the data's own pairs."""
        o, teacher = self.options, self.teacher
        if not o.feedback_share or self.asks is not None:
            return
        weight = next(teacher.parameters()).detach()
        if type(weight) is not Tensor:  # a plan's, which have no values
            judge = agreement_for(data, data.batch(0, 0, 2)["cond"], tuple(teacher.shape))
        else:
            judge = trained_agreement(data, tuple(teacher.shape), o.reward_steps)
        self.agreement = frozen(judge.to(weight.device))

    def teachers(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def followers(self) -> Mapping[str, Target]:
        return {"target": Target("student", self.options.target_decay)}

    # --- stages ---------------------------------------------------------------------------------------------------
    def stages(self) -> tuple[Stage, ...]:
        o, each = self.options, self.options.consistency_share / max(len(self.options.segments), 1)
        own = {"own_schedule": True, "fresh_optimizer": True}
        found = [
            Stage(
                f"{count} segment{'s' if count > 1 else ''}", ("consistency", "judge") if b else ("consistency",),
                each, kind="segments", round=i, **own,
            )
            for i, (count, b) in enumerate(zip(o.segments, o.adversarial, strict=False))
        ]  # fmt: skip
        found.append(Stage(FEEDBACK, ("refl",), o.feedback_share, **own))
        found.append(Stage("one step", ("generate", "follow"), o.one_step_share, **own))
        return tuple(stage for stage in found if stage.share > 0)

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        """The student of the stage before is kept: the next one's teacher, D_real, or one of the adapters."""
        if resumed or not self.kept:
            return
        number = stage.round if stage.kind == "segments" else len(self.options.segments)
        if number and self.options.consistency_share:
            take_over(self._after(number - 1), self.student)
        elif stage.kind == "one step":
            take_over(self.consistent, self.student)
        if stage.kind == "one step" and self.options.real == "consistent":
            take_over(self.fake, self.consistent)

    def _after(self, number: int) -> Denoiser:
        """Where the student after the stage of this number is kept."""
        found: Any = self.kept[LATEST] if LATEST in self.kept else self.kept[f"{KEPT}{self.options.segments[number]}"]
        return found

    @property
    def consistent(self) -> Denoiser:
        """The student after the last stage of segments."""
        return self._after(len(self.options.segments) - 1)

    # --- segments -------------------------------------------------------------------------------------------------
    def nearer(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """One step of the teacher along the path, from t to s."""
        o = self.options
        if self.stage.round and o.stage_teacher == "previous":
            return jump(self._after(self.stage.round - 1)(x_t, t, cond), s)
        if o.guidance_low == o.guidance_high:
            return jump(self.teacher(x_t, t, cond, o.guidance_low), s)
        w = o.guidance_low + (o.guidance_high - o.guidance_low) * self.draw.uniform(len(x_t)).to(x_t)
        return jump(self.teacher(x_t, t, cond, w), s)

    def noise_like(self, x: Tensor) -> Tensor:
        """Standard normal, and for pictures an offset of each channel."""
        eps = self.draw.normal_like(x)
        if x.ndim < 4 or not self.options.offset_noise:
            return eps
        offset = self.draw.normal(*x.shape[:2]).to(x).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        return eps + self.options.offset_noise * offset

    @turn(trains="student", optim=OPTIM)
    def consistency(self, batch: Batch) -> Terms:
        """``L``, for one n and one s of each sample."""
        o, x0, cond, number = self.options, batch["x"], batch["cond"], self.stage.round
        steps = o.grids[number]
        times = even_grid(self.teacher.process, steps).to(x0)
        n = 1 + (self.draw.uniform(len(x0)) * steps).long().clamp(max=steps - 1)
        end = Segments(steps, o.segments[number]).end(n, self.draw.uniform(len(x0)))
        t, s, before = times[n], times[end], times[n - 1]
        x_t = self.teacher.process.add_noise(x0, self.noise_like(x0), t)
        with torch.no_grad():
            nearer = self.nearer(x_t, t, before, cond)
            target = jump(self.target(nearer, before, cond), s)
        said = jump(self.student(x_t, t, cond), s)
        distance = denoising_loss(said, target)
        self.note("consistency", distance)
        terms = {"mse": o.mse[number] * distance}
        if o.adversarial[number]:
            logits = self.discriminator.logits(self.teacher, said, s, cond)
            terms["gan"] = o.adversarial[number] * adversarial.generator_loss(logits).mean()
            self.shared["judged"] = (said.detach(), target, s)
        self.measure(cond)
        return terms

    @turn(trains="discriminator", when="judged", optim=Optim(lr=1e-4))
    def judge(self, batch: Batch) -> Terms:
        """``-log D(target) - log(1 - D(said))``, both at the time that they stand at."""
        said, target, s = self.shared["judged"]
        twice = {name: torch.cat([value, value]) for name, value in batch["cond"].items()}
        logits = self.discriminator.logits(self.teacher, torch.cat([said, target]), torch.cat([s, s]), twice)
        fake, real = logits.chunk(2)
        self.note("real_logit", real.mean())
        self.note("fake_logit", fake.mean())
        return {"gan": adversarial.discriminator_loss(real, fake)}

    # --- feedback -------------------------------------------------------------------------------------------------
    @property
    def reward(self) -> Reward:
        return self.agreement if self.asks is None else self.asks

    def predicted(self, batch: Batch) -> Tensor:
        """``x0`` at a random step of the few-step student, the same for the whole batch; the graph is that of its
        last call."""
        o, student, process, cond = self.options, self.student, self.teacher.process, batch["cond"]
        steps = o.feedback_steps
        first = self.draw.index(steps) if o.feedback_start == "data" and steps > 1 else 0
        last = first + (self.draw.index(steps - first) if steps - first > 1 else 0)
        weight = next(student.parameters())
        eps = self.draw.normal(self.draw.local, *student.shape).to(weight.device)
        times = [torch.full((), f * process.t_max, device=eps.device) for f in few_step_times(steps, o.t_init)]
        x = process.sigma(times[first]) * eps
        if o.feedback_start == "data":
            x = process.add_noise(batch["x"], eps, times[first])
        with torch.no_grad():
            for t, s in itertools.pairwise(times[first : last + 1]):
                x = ddim_step(student(x, t, cond), process, s)
        return student(x, times[last], cond).x0

    def rewarded(self, x0: Tensor, cond: Cond) -> Tensor:
        """``mean ReLU(margin - reward)``."""
        seen = self.decode(x0) if self.asks is not None and self.decode is not None else x0
        scores = self.reward(seen, cond)
        self.note("reward", scores.mean())
        return hinge(scores, self.options.reward_margin)

    @turn(trains="feedback", when="feedback_share", optim=OPTIM)
    def refl(self, batch: Batch) -> Terms:
        """The reward of the last prediction (ReFL), for the adapter alone."""
        loss = self.rewarded(self.predicted(batch), batch["cond"])
        self.measure(batch["cond"])
        return {"reward": loss}

    # --- one step -------------------------------------------------------------------------------------------------
    def path_end(self, eps: Tensor, cond: Cond, steps: int = 8) -> Tensor:
        """What the student of the first part makes of a noise in so many steps. No gradient."""
        return FewStepSampler(few_step_times(steps), "ddim").sample(self.consistent, eps, cond)

    def noised(self, x: Tensor, law: TimeLaw) -> tuple[Tensor, Tensor, Tensor]:
        process, eps = self.teacher.process, self.draw.normal_like(x)
        t = law.sample(self.draw, process).to(x)
        return process.add_noise(x, eps, t), t, eps

    @turn(trains="student", every="critic_turns", when="one_step_share", optim=OPTIM)
    def generate(self, batch: Batch) -> Terms:
        """Score distillation of the one-step student (eq. 8), the distance to its own eight steps, and feedback."""
        o, cond = self.options, batch["cond"]
        x0, eps = self.sample_student(cond)
        self.shared["x0"] = x0.detach()
        x_t, t, _ = self.noised(x0.detach(), o.generator_times)
        with torch.no_grad():
            of_teacher = o.real == "teacher"
            real = (self.teacher(x_t, t, cond, o.real_guidance) if of_teacher else self.consistent(x_t, t, cond)).x0
            fake = self.fake(x_t, t, cond).x0
        weight = mean_abs_normaliser(x0, real) / x0[0].numel()
        terms = {"dm": score_difference_loss(x0, fake, real, di=1.0, weight=weight)}
        if o.one_step_mse:
            terms["mse"] = o.one_step_mse * denoising_loss(x0, self.path_end(eps, cond))
        if o.feedback_share and o.one_step_feedback:
            terms["reward"] = o.one_step_feedback * self.rewarded(x0, cond)
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x0.std())
        self.measure(cond)
        return terms

    def sample_student(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """``x = f(z, t_init).x0`` and z."""
        process, weight = self.teacher.process, next(self.student.parameters())
        eps = self.draw.normal(self.draw.local, *self.student.shape).to(weight.device)
        t = torch.full((), self.options.t_init * process.t_max, device=eps.device)
        return self.student(process.sigma(t) * eps, t, cond).x0, eps

    @turn(trains="fake", when="one_step_share", optim=OPTIM)
    def follow(self, batch: Batch) -> Terms:
        """D_fake learns to denoise the student's samples."""
        x0 = self.shared.get("x0")
        if x0 is None:
            with torch.no_grad():
                x0 = self.sample_student(batch["cond"])[0]
        x_t, t, eps = self.noised(x0, self.options.critic_times)
        loss = fake_score_loss(self.fake(x_t, t, batch["cond"]), x0, eps, self.options.fake_loss)
        self.note("fake_error", loss)
        return {"denoise": loss}

    # --- measuring ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def measure(self, cond: Cond) -> None:
        """In the last step of the run, where that is asked for: how far from the teacher's path its student ends."""
        o = self.options
        if not o.measured or not self.progress or self.step + 1 < round(self.step / self.progress):
            return
        gaps: dict[int, list[Tensor]] = {1: [], 2: [], 4: [], 8: []}
        for _ in range(o.measured):
            eps = self.draw.normal(self.draw.local, *self.student.shape).to(next(self.teacher.parameters()))
            end = ODESampler("euler", 64, o.guidance_low).sample(self.teacher, eps, cond)
            for k, found in gaps.items():
                found.append((FewStepSampler(few_step_times(k), "ddim").sample(self.student, eps, cond) - end).square())
        for k, found in gaps.items():
            self.note(f"gap_{k}", torch.cat(found).mean())

    def sampler(self) -> FewStepSampler:
        if self.options.scheduler == "ddim":
            return FewStepSampler(self.times, "ddim")
        return TCDSampler(self.times, eta=self.options.eta)

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        """The numbers of segments, with the scheduler that is for all of them."""
        o, steps = options, sorted({1, *options.segments}) if options.scheduler == "tcd" else ()
        return by_steps(o.student_steps, steps, lambda n: TCDSampler(few_step_times(n, o.t_init), eta=o.eta))


def even_grid(process: Process, steps: int) -> Tensor:
    """``steps + 1`` times from 0 to ``t_max``, evenly spaced as the few-step samplers ask (float64); EDM's own grid,
    whose even spacing would see nothing but noise."""
    if isinstance(process, EDM):
        return process.grid(steps).flip(0)
    return torch.linspace(0.0, process.t_max, steps + 1, dtype=torch.float64)
