"""Few-step score identity distillation with Zero-CFG, Anti-CFG and LSG guidance (arXiv 2505.12674, 2406.01561)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.sampling import FewStepSampler, Renoise, few_step_times, rollout
from stillroom.diffusion.times import TimeLaw
from stillroom.losses import adversarial, score
from stillroom.losses.score import (
    FakeLoss,
    fake_score_loss,
    mean_abs_normaliser,
    score_difference_loss,
    snr_weight,
)
from stillroom.method import Batch, Method, Optim, Paper, Parted, Terms, frozen, register, turn
from stillroom.networks.discriminators import Discriminator

OPTIM = Optim(lr=1e-6, name="adam", betas=(0.0, 0.999), nan_to_num=1e5)

# (kappa_1, kappa_2, kappa_4): fake score while it trains, fake score and teacher in the generator's loss.
PRESETS = {"none": (1.0, 1.0, 1.0), "zero-cfg": (0.0, 0.0, 1.0), "anti-cfg": (1.0, -1.0, 1.0)}


@register(
    "sid-lsg",
    Paper(
        title="Few-Step Diffusion via Score identity Distillation",
        arxiv="2505.12674",
        year=2025,
        code="mingyuanzhou/SiD-LSG",
    ),
)
class SiDLSG(Method):
    """One- to few-step students from a frozen, class- or text-conditional teacher. The loss is a score identity (no
    derivative of the student's own score by its weights is needed); all K steps share one student and one fake score,
    and each update returns one uniformly drawn step. Guidance can sit in the teacher (long), in both nets (LSG) or,
    with the least loss of diversity, in the fake score alone (Zero-CFG, Anti-CFG). An optional GAN reads its
    features.

    With ``D^k(x_t, c) = D(x_t, null) + k (D(x_t, c) - D(x_t, null))``, and Y_f = D_f^(k2), Y_r = D_r^(k4) the fake
    score's and the teacher's x0-predictions at x_t, k3 = k2 unless ``kappa_3`` says otherwise:

        L_G = <Y_r - Y_f, (Y_r - x0) - alpha (Y_r - Y_f)> / w,    w = sg mean |x0 - Y_r|     SiD, arXiv 2404.04057
            = (-<d, e> + (1 - alpha) |d|^2) / w,                  d = Y_f - Y_r, e = D_f^(k3) - x0
        L_F = |eps_f^(k1)(x_t, c) - eps|^2                        guided while it learns: LSG, arXiv 2406.01561
        tau_k = t_init (1 - k / K), k uniform in 0 .. K - 1       one output of the K-step student, arXiv 2505.12674

    The graph of L_G goes through Y_f, Y_r and x0 to the student, whose inputs are detached between steps. With the GAN
    (SiDA, arXiv 2410.14919) ``w_adv numel softplus(-disc(x_t)) / w`` joins L_G and half the binary cross-entropy of the
    fake score's features joins L_F, real and generated at the same time and noise.

    Departures: the numbers of Anti-CFG and the schedule of the few-step version are reconstructed (its code was not
    released). Anti-CFG trains the fake score plainly and asks it at -1: trained at -1 as well, the regressed
    combination would learn the conditional mean itself and guide nothing. Asked at -1 in e too, as the preset does, the
    first part is no score identity (which holds at k3 = k1) and widens the student; ``kappa_3: 1`` mends that. The
    loss's overall factor (lsg, 100 for EDM teachers) is left to the learning rate, so ``gan_weight`` is relative to a
    score loss of weight 1; the critic's GAN term stands beside a mean over elements and has no weight over times
    (SiDA's code: a sum, and EDM's weight); a sample that is not finite stops the run instead of being dropped.
    """

    health = score.HEALTH | adversarial.HEALTH

    @dataclass
    class Options:
        student_steps: int = field(default=1, metadata={"min": 1})  # K
        t_init: float = field(default=0.625, metadata={"above": 0, "max": 1})
        alpha: float = 1.0  # 0.5: exact Fisher gradient; 1: score identity alone; 1.2: over-corrected
        guidance: Literal["none", "lsg", "long", "short", "zero-cfg", "anti-cfg"] = "none"
        guidance_scale: float = 1.5  # kappa of lsg, long (> 1) and short (< 1)
        # kappa_3: the fake score's scale inside Y_f - x0; null: kappa_2, as in the papers. 1 is what Anti-CFG needs.
        kappa_3: float | None = field(default=None, metadata={"later": True})
        condition_drop: float = 0.1  # per sample, in the fake score's turn, only where kappa_1 or kappa_2 is not 1
        step_choice: Literal["uniform", "last"] = "uniform"  # "last": train only the K-th output (ablation)
        gan_weight: float = 0.0  # lambda_adv; > 0 needs real images
        critic_gan_weight: float = 1.0  # beside a mean over elements; the released code's 1, beside a sum: 1 / numel
        # Of the critic's GAN term over times: 1, or EDM's weight as in the released code ("edm").
        gan_time_weight: Literal["one", "edm"] = field(default="one", metadata={"later": True})
        gan_head: Literal["mean", "mlp"] = "mean"
        gan_block: str = ""
        generator_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        critic_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        fake_loss: FakeLoss = "eps"
        renoise: Renoise = "fresh"

    options: Options
    discriminator: Any

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.fake = self.clone(teacher, "fake")
        self.discriminator = Discriminator(self.fake, o.gan_block, o.gan_head) if o.gan_weight else nn.Identity()
        self.times = few_step_times(o.student_steps, o.t_init)
        k = o.guidance_scale
        own = {"lsg": (k, k, k), "long": (1.0, 1.0, k), "short": (k, 1.0, 1.0)}
        self.k_train, self.k_fake, self.k_real = {**PRESETS, **own}[o.guidance]
        self.k_own = self.k_fake if o.kappa_3 is None else o.kappa_3

    def sample_student(self, batch: Batch, grad: bool) -> Tensor:
        """``x0`` after a uniformly drawn one of the K steps, or after the last."""
        last = len(self.times) - 1 if self.options.step_choice == "last" else None
        return rollout(
            self.student, self.draw, batch["cond"], self.times, grad=grad, last=last, renoise=self.options.renoise
        )

    def dropped(self, cond: Cond) -> Cond:
        """Some conditions become null while a guided fake score trains."""
        if not self.options.condition_drop or not cond or (self.k_train == 1 and self.k_fake == 1):
            return cond
        return self.fake.without(cond, self.draw.uniform(self.draw.local) < self.options.condition_drop)

    def ask_fake(self, x_t: Tensor, t: Tensor, cond: Cond, full: Cond, guidance: float) -> tuple[Prediction, Tensor]:
        """The fake score under ``cond`` and ``guidance``, and its logits under the ``full`` condition (kept under
        Zero-CFG too): one forward pass where both are the same question; no logits without a GAN."""
        if not self.options.gan_weight:
            return self.fake(x_t, t, cond, guidance), x_t.new_zeros(len(x_t))
        if guidance == 1 and cond is full:
            return self.discriminator(self.fake, x_t, t, full)
        logits = self.discriminator.logits(self.fake, x_t, t, full)
        return self.fake(x_t, t, cond, guidance), logits

    @turn(trains=("fake", "discriminator"), optim=OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """``L_F``: the guided combination itself is regressed, with gradient through both branches."""
        o, process = self.options, self.teacher.process
        x0 = self.sample_student(batch, grad=False)
        t, eps = o.critic_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        x_t = process.add_noise(x0, eps, t)
        p, fake_logits = self.ask_fake(x_t, t, self.dropped(batch["cond"]), batch["cond"], self.k_train)
        loss = fake_score_loss(p, x0, eps, o.fake_loss)
        self.note("fake_error", loss)
        if not o.gan_weight:
            return {"denoise": loss}
        weight = snr_weight(process, t) if o.gan_time_weight == "edm" else None

        def gan(logits: Tensor, real: bool) -> Tensor:
            self.note("real_logit" if real else "fake_logit", logits.mean())
            return o.critic_gan_weight * adversarial.told(logits, real, weight) / 2

        def of_real() -> Tensor:  # at the same time and noise; a pass of its own, so it can wait
            real_t = process.add_noise(batch["x"], eps, t)
            return gan(self.discriminator.logits(self.fake, real_t, t, batch["cond"]), real=True)

        return {"denoise": loss, "gan": Parted(gan(fake_logits, real=False), of_real)}

    @turn(trains="student", optim=OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """``L_G = (-<d, e> + (1 - alpha) |d|^2) / w``."""
        o, cond, process = self.options, batch["cond"], self.teacher.process
        x0 = self.sample_student(batch, grad=True)
        t, eps = o.generator_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        x_t = process.add_noise(x0, eps, t)
        real = self.teacher(x_t, t, cond, self.k_real).x0
        p, logits = self.ask_fake(x_t, t, cond, cond, self.k_fake)
        fake = p.x0
        own = fake if self.k_own == self.k_fake else self.fake(x_t, t, cond, self.k_own).x0
        weight = mean_abs_normaliser(x0, real)
        terms = {"sid": score_difference_loss(x0, fake, real, sim=1.0, fgm=1 - o.alpha, own=own, weight=weight)}
        if o.gan_weight:
            per_sample = adversarial.generator_loss(logits.clamp(-10, 10)) * x0[0].numel() * weight
            terms["gan"] = o.gan_weight * per_sample.mean()
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x0.std())
        return terms

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.times, self.options.renoise)
