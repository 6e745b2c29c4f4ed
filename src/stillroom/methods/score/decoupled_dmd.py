"""Decoupled DMD: the guidance's push and the matching of distributions as two terms, each at noise levels of its own
(arXiv 2511.22677)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import NAME_NULL, Denoiser
from stillroom.diffusion.process import match_snr
from stillroom.diffusion.sampling import FewStepSampler, Renoise, few_step_times, rollout
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.losses import adversarial, score
from stillroom.losses.score import (
    FakeLoss,
    fake_score_loss,
    mean_abs_normaliser,
    moment_loss,
    score_difference_loss,
)
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.networks.discriminators import Discriminator

OPTIM = Optim(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01, clip_norm=10.0)
FLOOR = 1e-4  # of mean |x0 - D|: near the data a teacher returns what it is shown
BATCHES = 8  # of the data, for their own moments


@register(
    "decoupled-dmd",
    Paper(
        title="Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
        arxiv="2511.22677",
        year=2025,
        venue="ICLR 2026",
    ),
)
class DecoupledDMD(Method):
    """DMD2's student of one to eight steps, by another gradient. With guidance ``D_w = D_u + w (D_c - D_u)`` in the
    teacher, D_c and D_u its conditional and unconditional x0-predictions, DMD's direction falls into two parts:

        D_w - D_f = (D_c - D_f) + (w - 1) (D_c - D_u)                                                   eq. 6

    The first is distribution matching (DM) as the theory has it, the second, guidance augmentation (CA), never asks the
    fake score: it turns many steps into few, and alone it runs away. Each gets a noise level, a noise and a normaliser
    of its own, at the same sample x0 of the student, asked at its level s_k:

        L_G = < (D_f - D_c)(x_DM) / mean |x0 - D_c(x_DM)|, x0 > / numel
              - (w - 1) < (D_c - D_u)(x_CA) / mean |x0 - D_c(x_CA)|, x0 > / numel                       eq. 8
        s_DM ~ U(0, 1),   s_CA ~ U(0, s_k)                  schedule "decoupled-hybrid": nothing that is cleaner than
                                                            what the student was shown need be augmented
        L_F = |error of D_f on F(x0)|^2                     as DMD2's, every step; algorithm 1

    Times are drawn, and s_k is counted, before a flow's shift. With one time, one noise and the normaliser
    ``mean |x0 - D_w|`` for both, L_G is DMD2's (``schedule: coupled-shared``, ``normaliser: guided``).

    Departures: DMD2's factor of a half is left to the learning rate; times begin at .02 and end at .98; the
    discriminator is a head on a middle block; the fake score's loss is taken in the teacher's own velocity space by
    default (the paper's algorithm 1: in that of x0).
    """

    health = {
        **score.HEALTH,
        "augmentation": "mean of (D_c - D_u)^2 over elements and batch, at the times of the guidance's push",
        **adversarial.HEALTH,
        "sample_mean": "mean of all elements of a batch of the student's samples",
    }

    @dataclass
    class Options:
        student_steps: int = field(default=4, metadata={"min": 1})  # N network calls at inference
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})  # of the first call
        # Of the N times towards noise, s u / (1 + (s - 1) u): a flow's own shift; 1: evenly spaced
        step_shift: float = field(default=1.0, metadata={"above": 0})
        guidance: float = 3.0  # w
        # hybrid: CA below s_k, DM everywhere; constrained: both below; full: both everywhere; shared: at one time
        schedule: Literal["decoupled-hybrid", "decoupled-constrained", "decoupled-full", "coupled-shared"] = (
            "decoupled-hybrid"
        )
        normaliser: Literal["own", "guided"] = "own"  # guided: mean |x0 - D_w(x_CA)| for both terms, as DMD's
        augmentation: float = 1.0  # weight of CA; 0 is the "distribution matching alone" ablation
        regulariser: Literal["dm", "moments", "gan", "none"] = "dm"  # what keeps CA from running away
        regulariser_weight: float = field(default=1.0, metadata={"min": 0})  # of dm or moments
        mean: float | None = None  # of moments; null, as below: the data's own. SDXL's latents: 0.075 ...
        variance: float | None = field(default=None, metadata={"above": 0})  # ... and 0.81
        gan_weight: float = field(default=0.0, metadata={"min": 0})  # > 0 needs real data; of regulariser "gan" too
        critic_gan_weight: float = 1e-2
        gan_block: str = ""  # module path of the tapped block; empty: the middle one
        critic_turns: int = field(default=5, metadata={"min": 1})  # critic updates per student update (TTUR)
        augmentation_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        generator_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)  # of matching
        critic_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)  # 0 itself has no eps to predict
        fake_loss: FakeLoss = "v"
        renoise: Renoise = "fresh"

        @property
        def augments(self) -> bool:
            """Whether there is a push of the guidance."""
            return bool(self.augmentation) and self.guidance != 1

        @property
        def matches(self) -> bool:
            """Whether distributions are matched."""
            return self.regulariser == "dm" and self.regulariser_weight > 0

        @property
        def learning(self) -> bool:
            """Whether there is a second network to train: a fake score, or a discriminator."""
            return self.matches or self.gan_weight > 0

    options: Options
    discriminator: Any
    fake: Any

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        if o.regulariser == "gan" and not o.gan_weight:
            raise UserError("options.regulariser=gan has no weight", cure="set options.gan_weight, for example to 1e-3")
        if o.augments and not teacher.null:
            raise UserError("the teacher has no unconditional answer, which guidance is made of", cure=NAME_NULL)
        if not o.augments and not o.learning and o.regulariser != "moments":
            raise UserError("nothing moves the student", cure="set options.augmentation=1 or options.regulariser=dm")
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.fake, self.discriminator = None, nn.Identity()
        if o.learning:
            self.fake = fake = self.clone(teacher, "fake")
            if o.gan_weight:
                self.discriminator = Discriminator(fake, o.gan_block)
        self.times = few_step_times(o.student_steps, o.t_init, o.step_shift)
        self.moments = (o.mean, o.variance)

    def prepare(self, data: Any) -> None:
        """The moments of the data's own samples, where they are asked for and not given."""
        if self.options.regulariser != "moments" or None not in self.moments:
            return
        if type(next(self.teacher.parameters()).detach()) is not Tensor:  # a plan's, which have no values
            self.moments = tuple(1.0 if own is None else own for own in self.moments)
            return
        x = torch.cat([data.batch(0, step, 64)["x"] for step in range(BATCHES)]).float().flatten(1)
        found = (float(x.mean()), float(x.var(1, unbiased=False).mean()))
        self.moments = tuple(f if own is None else own for own, f in zip(self.moments, found, strict=True))

    def sample_student(self, batch: Batch, grad: bool) -> tuple[Tensor, float]:
        """``x0 = G(x_(s_k), s_k, c)`` for one step k of the schedule, the same for the whole batch, reached as at
        inference; and s_k, as a time of the teacher's process."""
        k = self.draw.index(len(self.times)) if len(self.times) > 1 else 0
        renoise = self.options.renoise
        x0 = rollout(self.student, self.draw, batch["cond"], self.times, grad=grad, last=k, renoise=renoise)
        mine, theirs = self.student.process, self.teacher.process
        level = self.times[k] * mine.t_max
        if mine != theirs:
            level = float(match_snr(torch.tensor(level, dtype=torch.float64), of=mine, to=theirs)[0])
        return x0, level

    def noised(self, x: Tensor, law: TimeLaw, until: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(F(x), t, eps)``: ``alpha x + sigma eps`` with fresh noise and a time of this law, no later than
        ``until``."""
        process = self.teacher.process
        t, eps = law.sample(self.draw, process, until=until).to(x), self.draw.normal_like(x)
        return process.add_noise(x, eps, t), t, eps

    @torch.no_grad()
    def directions(self, x0: Tensor, level: float, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By the names of their terms: from where to where x0 is to go, and the normaliser ``[B]``. From ``D_u`` to
        ``D_c`` at x_CA, and from ``D_f`` to ``D_c`` at x_DM."""
        o, cond, found = self.options, batch["cond"], {}
        together = o.schedule == "coupled-shared"
        x_dm, t_dm, _ = self.noised(x0, o.generator_times, level if o.schedule == "decoupled-constrained" else None)
        x_ca, t_ca, plain = x_dm, t_dm, None
        if o.augments:
            if not together:
                until = None if o.schedule == "decoupled-full" else level
                x_ca, t_ca, _ = self.noised(x0, o.augmentation_times, until)
            plain, without = (p.x0 for p in self.teacher.apart(x_ca, t_ca, cond))
            aim = plain if o.normaliser == "own" else without + o.guidance * (plain - without)
            found["augment"] = without, plain, mean_abs_normaliser(x0, aim, FLOOR)
            self.note("augmentation", (plain - without).square().mean())
        if o.matches:
            real = plain if plain is not None and together else self.teacher(x_dm, t_dm, cond).x0
            fake = self.fake(x_dm, t_dm, cond).x0
            own = o.normaliser == "own" or not o.augments
            scale = mean_abs_normaliser(x0, real, FLOOR) if own else found["augment"][2]
            found["dm"] = fake, real, scale
            self.note("score_gap", (fake - real).square().mean())
        return found

    @turn(trains="student", every="critic_turns", optim=OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """``L_G``: distribution matching, or another regulariser, and guidance augmentation."""
        o = self.options
        x0, level = self.sample_student(batch, grad=True)
        self.shared["x0"] = x0.detach()  # the critic of this step learns from this very sample
        weights = {"augment": o.augmentation * (o.guidance - 1), "dm": o.regulariser_weight}
        terms = {
            name: score_difference_loss(x0, start, end, di=weights[name], weight=scale / x0[0].numel())
            for name, (start, end, scale) in self.directions(x0.detach(), level, batch).items()
        }
        if o.regulariser == "moments":
            mean, variance = self.moments
            assert mean is not None
            assert variance is not None
            terms["moments"] = o.regulariser_weight * moment_loss(x0, mean, variance)
        if o.gan_weight:
            x_t, t, _ = self.noised(x0, o.critic_times)
            logits = self.discriminator.logits(self.fake, x_t, t, batch["cond"])
            terms["gan"] = o.gan_weight * adversarial.generator_loss(logits).mean()
        self.note("sample_std", x0.std())
        self.note("sample_mean", x0.mean())
        return terms

    @turn(trains=("fake", "discriminator"), when="learning", optim=OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """``L_F``, every step: denoise the student's samples and, with a discriminator, tell them from real ones, each
        under noise of its own."""
        o, cond = self.options, batch["cond"]
        x0 = self.shared.get("x0")
        if x0 is None:
            x0 = self.sample_student(batch, grad=False)[0]
        terms: dict[str, Any] = {}
        if o.matches:
            x_t, t, eps = self.noised(x0, o.critic_times)
            terms["denoise"] = fake_score_loss(self.fake(x_t, t, cond), x0, eps, o.fake_loss)
            self.note("fake_error", terms["denoise"])
        if o.gan_weight:
            seen = {name: self.noised(x, o.critic_times)[:2] for name, x in (("fake", x0), ("real", batch["x"]))}

            def judged(name: str) -> Tensor:
                logits = self.discriminator.logits(self.fake, *seen[name], cond)
                self.note(f"{name}_logit", logits.mean())
                return o.critic_gan_weight * adversarial.told(logits, name == "real")

            terms["gan"] = lambda: judged("fake") + judged("real")
        return terms

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.times, self.options.renoise)
