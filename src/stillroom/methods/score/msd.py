"""MSD: several students, each for a part of the conditions, each by distribution matching (arXiv 2410.23274)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.data.source import LABELS
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.routed import ByCondition, RoutedDenoiser
from stillroom.diffusion.sampling import FewStepSampler, few_step_times, rollout
from stillroom.diffusion.times import TimeLaw
from stillroom.draws import mix
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import label_count
from stillroom.losses import adversarial, score
from stillroom.losses.score import (
    FakeLoss,
    denoising_loss,
    fake_score_loss,
    mean_abs_normaliser,
    score_difference_loss,
    snr_weight,
)
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn
from stillroom.networks.discriminators import Discriminator
from stillroom.surgery.initial import overwrite
from stillroom.surgery.lora import take_over

OPTIM = Optim(lr=2e-6, betas=(0.9, 0.999), weight_decay=0.01, clip_norm=10.0)
MATCHING, DISTILLING, ADVERSARIAL = "matching", "distilling", "adversarial"


@register(
    "msd",
    Paper(
        title="Multi-student Diffusion Distillation for Better One-step Generators",
        arxiv="2410.23274",
        year=2024,
        venue="ICML 2025",
    ),
)
class MSD(Method):
    """K students, each for its own part of the classes and never asked about another. One runs for a sample, so the
    student as a whole has K times the weights at the cost of one.

    Each is trained by itself, on the classes and pictures of its part alone, with a fake score that begins as the
    teacher, in up to three stages:

        matching (TSM):  E lambda_t |f(x_t, t, c) - D_r(x_t, t, c)|^2, x_t noised data                    sec. 4.3
        distilling (DM): dL/dx0 = (D_f - D_r) / mean |x0 - D_r|, D_f following x0 as in DMD2              sec. 4.2
        adversarial:     to that w_G softplus(-disc(x_t)) on the fake score's features                    sec. 4.2

    Matching is for students that are not the teacher's copies: smaller ones, whose weights are new. The fake score has
    the teacher's network whatever the student's. ``only`` trains one of the students, so that K machines can share the
    work; ``stillroom join`` puts their students into one folder.

    Departures: no regression on stored pairs of noise and teacher's sample, which the paper has on ImageNet beside the
    many updates of the fake score that it relies on elsewhere.
    """

    health = {
        **score.HEALTH,
        **adversarial.HEALTH,
        "matching": "mean squared difference between the student's and the teacher's x0-predictions on noised data, "
        "weighted as EDM weighs",
    }

    @dataclass
    class Options:
        students: int = field(default=4, metadata={"min": 1})  # K
        # Of the classes: runs of consecutive ones, or any
        partition: Literal["consecutive", "random"] = "consecutive"
        partition_seed: int = field(default=0, metadata={"min": 0})  # of the random one
        only: int = field(default=0, metadata={"min": 0})  # the student to train, counted from 1; 0: all of them
        matching_share: float = field(default=0.0, metadata={"min": 0})  # of a student's steps, for TSM
        distilling_share: float = field(default=1.0, metadata={"min": 0})
        adversarial_share: float = field(default=0.0, metadata={"min": 0})  # with the discriminator, on real data
        student_steps: int = field(default=1, metadata={"min": 1})
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})  # of the first call
        guidance: float = 1.0  # on the teacher only
        critic_turns: int = 5  # fake-score updates per student update
        gan_weight: float = 3e-3  # in the adversarial stage
        critic_gan_weight: float = 1e-2
        gan_block: str = ""  # module path of the tapped block; empty: the middle one
        matching_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)
        generator_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        critic_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)
        fake_loss: FakeLoss = "v"

        @property
        def judged(self) -> bool:
            """Whether there is a discriminator."""
            return self.adversarial_share > 0

    options: Options
    discriminator: Any

    def build(self, teacher: Denoiser, student: Denoiser | None = None, classes: Sequence[str] = ()) -> None:
        o = self.options
        known = teacher.null.get(LABELS)
        count = len(classes) or (known if isinstance(known, int) else label_count(teacher.network))
        self.parts = partition(count, o.students, o.partition, o.partition_seed)
        if o.only > o.students:
            raise UserError(f"options.only={o.only} of {o.students} students", cure=f"choose 1 to {o.students}")
        if not o.matching_share + o.distilling_share + o.adversarial_share:
            raise UserError("every stage of msd has share 0", cure="set options.distilling_share to 1")
        self.times = few_step_times(o.student_steps, o.t_init)
        self.teacher = frozen(teacher)
        self.fake = self.clone(teacher, "fake")
        self.discriminator = Discriminator(self.fake, o.gan_block) if o.judged else nn.Identity()
        self.head = copy.deepcopy(self.discriminator.state_dict())
        start, numbers = student or teacher, range(1, o.students + 1)
        # those that are trained elsewhere are here as they begin, all in one network
        other = frozen(self.clone(start, "other")) if o.only else start
        experts = {name_of(k): self.clone(start, "student", str(k)) if o.only in (0, k) else other for k in numbers}
        route, own = ByCondition(LABELS, self.parts), name_of(o.only) if o.only else ""
        self.student = self.clone(start, "student") if o.students == 1 else RoutedDenoiser(experts, route, own)

    def prepare(self, data: Any) -> None:
        """Each student's part of the data (``F(D, V_k)``)."""
        if self.options.students == 1:
            return
        table = torch.tensor(self.parts)
        for k in range(self.options.students):
            rows = (table[data.labels] == k).nonzero()[:, 0]
            if not len(rows):
                raise UserError(
                    f"the data hold nothing of the classes of student {k + 1}", cure="give data with all classes"
                )
            data.parts[name_of(k + 1)] = data.take(rows)

    # --- stages ---------------------------------------------------------------------------------------------------
    def stages(self) -> tuple[Stage, ...]:
        o, found = self.options, []
        shares = {MATCHING: o.matching_share, DISTILLING: o.distilling_share, ADVERSARIAL: o.adversarial_share}
        turns = {MATCHING: ("match",), DISTILLING: ("generator", "critic"), ADVERSARIAL: ("generator", "critic")}
        for k in [o.only] if o.only else range(1, o.students + 1):
            for kind, share in shares.items():
                if share:
                    found.append(
                        Stage(
                            f"student {k}, {kind}", turns[kind], share, name_of(k) if o.students > 1 else "",
                            own_schedule=True, fresh_optimizer=True, kind=kind, round=k,
                        )
                    )  # fmt: skip
        return tuple(found)

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        """Each student has a fake score and a discriminator of its own: they begin anew before its first sample."""
        first = DISTILLING if self.options.distilling_share else ADVERSARIAL
        if resumed or stage.kind != first:
            return
        take_over(self.fake, self.teacher)
        if self.options.judged:
            overwrite(self.discriminator, self.head)

    @property
    def own(self) -> Denoiser:
        """The student whose turn it is."""
        if not isinstance(self.student, RoutedDenoiser):
            return self.student
        return self.student.experts[name_of(self.stage.round)]

    # --- turns ----------------------------------------------------------------------------------------------------
    def noised(self, x: Tensor, law: TimeLaw) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_t, t, eps)`` with fresh noise and a time of this law."""
        t, eps = law.sample(self.draw, self.teacher.process).to(x), self.draw.normal_like(x)
        return self.teacher.process.add_noise(x, eps, t), t, eps

    @turn(trains="student", when="matching_share", optim=Optim(lr=1e-4))
    def match(self, batch: Batch) -> Terms:
        """Teacher-score matching: the teacher's answer on noised data of the student's part, at all noise levels."""
        cond = batch["cond"]
        x_t, t, _ = self.noised(batch["x"], self.options.matching_times)
        with torch.no_grad():
            target = self.teacher(x_t, t, cond, self.options.guidance).x0
        loss = denoising_loss(self.own(x_t, t, cond).x0, target, snr_weight(self.teacher.process, t))
        self.note("matching", loss)
        return {"tsm": loss}

    @turn(trains="student", every="critic_turns", optim=OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """Distribution matching and, in the last stage, the generator's part of the GAN."""
        o, cond = self.options, batch["cond"]
        x0 = rollout(self.own, self.draw, cond, self.times, grad=True)
        self.shared["x0"] = x0.detach()
        x_t, t, _ = self.noised(x0.detach(), o.generator_times)
        with torch.no_grad():
            real, fake = self.teacher(x_t, t, cond, o.guidance).x0, self.fake(x_t, t, cond).x0
        weight = mean_abs_normaliser(x0, real) / x0[0].numel()
        terms: dict[str, Tensor] = {"dm": score_difference_loss(x0, fake, real, di=1.0, weight=weight)}
        if self.stage.kind == ADVERSARIAL:
            x_t, t, _ = self.noised(x0, o.critic_times)
            logits = self.discriminator.logits(self.fake, x_t, t, cond)
            terms["gan"] = o.gan_weight * adversarial.generator_loss(logits).mean()
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x0.std())
        return terms

    @turn(trains=("fake", "discriminator"), optim=OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """The fake score learns to denoise the student's samples, every step; the discriminator to tell them from real
        ones of the same part."""
        o, cond = self.options, batch["cond"]
        x0 = self.shared.get("x0")
        if x0 is None:
            x0 = rollout(self.own, self.draw, cond, self.times, grad=False)
        x_t, t, eps = self.noised(x0, o.critic_times)
        loss = fake_score_loss(self.fake(x_t, t, cond), x0, eps, o.fake_loss)
        self.note("fake_error", loss)
        if self.stage.kind != ADVERSARIAL:
            return {"denoise": loss}
        fake_t, t_fake, _ = self.noised(x0, o.critic_times)
        real_t, t_real, _ = self.noised(batch["x"], o.critic_times)

        def told(x: Tensor, t: Tensor, real: bool) -> Tensor:
            logits = self.discriminator.logits(self.fake, x, t, cond)
            self.note("real_logit" if real else "fake_logit", logits.mean())
            return o.critic_gan_weight * adversarial.told(logits, real)

        return {"denoise": loss, "gan": lambda: told(fake_t, t_fake, real=False) + told(real_t, t_real, real=True)}

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.times)


def name_of(number: int) -> str:
    """Of the student of this number, counted from 1; and of its part of the data."""
    return f"student-{number}"


def partition(classes: int, students: int, how: str = "consecutive", seed: int = 0) -> tuple[int, ...]:
    """The student, counted from 0, of each class: ``students`` parts, as equal as can be. how: ``consecutive`` runs, or
    ``random`` by a seed. Raises UserError for fewer classes than students."""
    if classes < students:
        raise UserError(
            f"msd shares classes among its students: {classes} among {students} leave some without",
            cure=f"options.students={max(classes, 1)}" if classes else "give a teacher and data with classes",
        )
    runs = [k * students // classes for k in range(classes)]
    if how == "random":
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(mix("partition", seed)))
        runs = [runs[int(place)] for place in order]
    return tuple(runs)
