"""Uni-Instruct: one-step distillation by a diffusion-expanded f-divergence, f of your choice (arXiv 2505.20755)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.sampling import FewStepSampler, rollout
from stillroom.diffusion.times import TimeLaw
from stillroom.losses import adversarial, score
from stillroom.losses.divergence import density_ratio, get_divergence
from stillroom.losses.score import (
    FakeLoss,
    fake_score_loss,
    mean_abs_normaliser,
    score_difference_loss,
    snr_weight,
    square,
)
from stillroom.method import Batch, Method, Optim, Paper, Parted, Stage, Terms, frozen, register, turn
from stillroom.networks.discriminators import Discriminator

OPTIM = Optim(lr=1e-5, name="adam", betas=(0.0, 0.999), nan_to_num=1e5)


@register(
    "uni-instruct",
    Paper(
        title="Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
        arxiv="2505.20755",
        year=2025,
        venue="NeurIPS 2025",
        code="a-little-hoof/Uni_Instruct",
    ),
)
class UniInstruct(Method):
    """A one-step student from a frozen teacher and real images. One loss covers the field: a divergence f sets the
    weights of a score-implicit part (SiD, SIM), a score-Fisher part and a Diff-Instruct part (DMD, VSD) through the
    density ratio r = q / p that a discriminator on the fake score's features gives; f chooses between covering
    (forward_kl) and mode seeking (reverse_kl).

    The divergence is expanded over noise levels (the paper's diffusion expansion), p being the student and q the data:

        D_f(q || p) = integral g^2/2 E_p[ C(r) |s_p - s_q|^2 ] dt,    C(r) = r^2 f''(r)

    Its gradient, in x0-predictions, with d = D_f - D_r (fake score minus teacher), e = D_f - x0, k = alpha / sigma^2,
    w = sg mean |x0 - D_r|, over a factor 2 k^2:

        L = { -C(r) <d, e>  +  sg[(C - r C')/2] |d|^2  +  alpha k sg[r^2 C''/2 |d|^2 d] . x0 } / w
        r = exp(logit),   L_adv = w_G numel softplus(-logit) / w

    which for f = -log r (C = 1) is SiD's loss. Everything but w and what stands under sg keeps its graph through x_t,
    C(r) too. The second part is left out by default, as in the published method.

    Departures: the ratio is exp(logit), not the scaled adversarial loss of the released code (which is about +-1), and
    its gradient is kept by default, since detaching it makes all but reverse_kl wrong. The GAN's weight of 0.01 stands
    against a score loss of weight 1 (in the released code against 100); the critic's GAN term stands beside a mean over
    elements and has no weight over times (there a sum, and EDM's weight: ``critic_gan_weight`` of 1 / numel and
    ``gan_time_weight: edm``); gradients are not clipped by value unless the recipe says so (there the critic's,
    at 1 beside that sum).
    """

    @dataclass
    class Options:
        divergence: Literal["reverse_kl", "forward_kl", "jeffreys", "js", "chi2", "hellinger"] = "jeffreys"
        ratio_grad: bool = True  # False: C(r) is detached, as in the released code
        fgm: bool = False  # True: the exact gradient; the published method drops this part
        normalise_ratio: bool = False  # divide r by its batch mean; costs a pass more where the batch is split
        gan_weight: float = 0.01
        critic_gan_weight: float = 1.0  # beside a mean over elements; the released code's 1, beside a sum: 1 / numel
        # Of the critic's GAN term over times: 1, or EDM's weight as in the released code ("edm").
        gan_time_weight: Literal["one", "edm"] = field(default="one", metadata={"later": True})
        gan_head: Literal["mean", "mlp"] = "mean"
        gan_block: str = ""
        guidance: float = 1.0
        t_init: float = field(default=0.714, metadata={"above": 0, "max": 1})  # sigma_init 2.5 on a rectified flow
        critic_share: float = 0.02  # of the steps: the student waits while the critics learn
        warmup_share: float = 0.1  # of the steps: reverse_kl without GAN, before r can be trusted
        generator_times: TimeLaw = TimeLaw("karras", 0.0, 0.8)
        critic_times: TimeLaw = TimeLaw("log-normal", mean=-1.2, std=1.2)
        fake_loss: FakeLoss = "snr"

    options: Options
    discriminator: Any
    health = {
        **score.HEALTH,
        **adversarial.HEALTH,
        "ratio": "mean of r = exp(logit) over the batch: 1 where p = q, and while r is unused (reverse_kl; before the "
        "last stage)",
    }

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.fake = self.clone(teacher, "fake")
        self.discriminator = Discriminator(self.fake, o.gan_block, o.gan_head) if self.needs_ratio else nn.Identity()

    def stages(self) -> tuple[Stage, ...]:
        o = self.options
        plan = (
            Stage("critics", ("critic",), o.critic_share),
            Stage("warm-up", None, o.warmup_share),
            Stage("divergence", None, 1 - o.critic_share - o.warmup_share),
        )
        return tuple(stage for stage in plan if stage.share > 0)

    def ask_fake(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        """Fake score and logits from one forward pass; logits of 0 (r = 1) where nothing needs a discriminator."""
        if self.needs_ratio:
            return self.discriminator(self.fake, x_t, t, cond)
        return self.fake(x_t, t, cond), x_t.new_zeros(len(x_t))

    @property
    def needs_ratio(self) -> bool:
        return self.options.gan_weight > 0 or self.options.divergence != "reverse_kl"

    @turn(trains=("fake", "discriminator"), optim=OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """``|D_f - x0|^2`` under EDM's weights and half the discriminator's binary cross-entropy, from one forward pass
        each; real and generated share time and noise."""
        o, process, cond = self.options, self.teacher.process, batch["cond"]
        x0 = rollout(self.student, self.draw, cond, (o.t_init,), grad=False)
        t, eps = o.critic_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        p, fake_logits = self.ask_fake(process.add_noise(x0, eps, t), t, cond)
        loss = fake_score_loss(p, x0, eps, o.fake_loss)
        self.note("fake_error", loss)
        if not self.needs_ratio:
            return {"denoise": loss}
        weight = snr_weight(process, t) if o.gan_time_weight == "edm" else None

        def gan(logits: Tensor, real: bool) -> Tensor:
            self.note("real_logit" if real else "fake_logit", logits.mean())
            return o.critic_gan_weight * adversarial.told(logits, real, weight) / 2

        def of_real() -> Tensor:  # a pass of its own, so it can wait until the first one's backward is done
            real_t = process.add_noise(batch["x"], eps, t)
            return gan(self.discriminator.logits(self.fake, real_t, t, cond), real=True)

        return {"denoise": loss, "gan": Parted(gan(fake_logits, real=False), of_real)}

    def noised_sample(self, cond: Cond, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The student's sample ``x0``, a time ``t`` of the generator's law, ``x_t``: the first draws of its turn."""
        process = self.teacher.process
        x0 = rollout(self.student, self.draw, cond, (self.options.t_init,), grad=grad)
        t, eps = self.options.generator_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        return x0, t, process.add_noise(x0, eps, t)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The ratios' sum, of which the mean over the whole batch is made; in thousandths, the least that r can be."""
        o = self.options
        if not o.normalise_ratio or o.divergence == "reverse_kl" or self.stage.kind != "divergence":
            return {}
        with torch.no_grad():
            _, t, x_t = self.noised_sample(batch["cond"], grad=False)
            return {"ratio": 1000 * density_ratio(self.ask_fake(x_t, t, batch["cond"])[1]).sum()}

    @turn(trains="student", optim=OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """``L``, and ``L_adv`` once the divergence itself is minimised; until then L of the reverse KL, with r = 1."""
        o, process, cond = self.options, self.teacher.process, batch["cond"]
        full = self.stage.kind == "divergence"
        f = get_divergence(o.divergence if full else "reverse_kl")
        x0, t, x_t = self.noised_sample(cond, grad=True)
        real = self.teacher(x_t, t, cond, o.guidance).x0
        p, logits = self.ask_fake(x_t, t, cond)
        fake = p.x0
        r = self.ratio(logits) if full and o.divergence != "reverse_kl" else torch.ones(len(x0)).to(x0)
        k = process.alpha(t) / process.sigma(t) ** 2
        weight, r_fixed = mean_abs_normaliser(x0, real), r.detach()
        direct = f.direct(r_fixed)
        terms = {
            "score": score_difference_loss(
                x0,
                fake,
                real,
                sim=f.c(r if o.ratio_grad else r_fixed),
                fgm=f.fisher(r_fixed) if o.fgm else 0.0,
                di=process.alpha(t) * k * direct * square(fake - real).detach() if f.curved else 0.0,
                weight=weight,
            )
        }
        if o.gan_weight and full:
            per_sample = adversarial.generator_loss(logits.clamp(-10, 10)) * x0[0].numel() * weight
            terms["gan"] = o.gan_weight * per_sample.mean()
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x0.std())
        self.note("ratio", r.mean())
        return terms

    def ratio(self, logits: Tensor) -> Tensor:
        """``r [B]``, by the mean of a sample's logits; normalised, of mean 1 over the whole batch."""
        r = density_ratio(logits)
        return self.over("ratio", r / r.detach().mean()) if self.options.normalise_ratio else r

    def sampler(self) -> FewStepSampler:
        return FewStepSampler((self.options.t_init,))
