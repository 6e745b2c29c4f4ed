"""DMD2: distribution matching with a fast fake score, a GAN on real data, backward simulation (arXiv 2405.14867)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import FewStepSampler, Renoise, few_step_times, rollout
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.losses import adversarial, score
from stillroom.losses.divergence import density_ratio, get_divergence
from stillroom.losses.score import FakeLoss, fake_score_loss, mean_abs_normaliser, score_difference_loss
from stillroom.method import Batch, Method, Optim, Paper, Parted, Terms, frozen, register, turn
from stillroom.networks.discriminators import Discriminator

OPTIM = Optim(lr=2e-6, betas=(0.9, 0.999), weight_decay=0.01, clip_norm=10.0)


@register(
    "dmd2",
    Paper(
        title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        arxiv="2405.14867",
        year=2024,
        venue="NeurIPS 2024",
        code="tianweiy/DMD2",
    ),
)
class DMD2(Method):
    """One- to few-step students from a frozen teacher. The student follows the difference between the teacher's and a
    fake score's denoisings of its own samples (a reverse KL over noise levels); the fake score is updated several times
    per student update (two time-scale rule, which replaces DMD's regression pairs); a discriminator on the fake score's
    features sees real data, which lets the student pass its teacher.

    With x0 the student's sample, x_t = alpha x0 + sigma eps, ``D_r`` and ``D_f`` the teacher's (guided) and the fake
    score's x0-predictions at x_t, F(.) a noising at a time of its own, and ``disc`` the discriminator's logit:

        L_G = <sg[(D_f - D_r) / mean |x0 - D_r|], x0> / numel  +  w_G softplus(-disc(F(x0)))           eq. 2, eq. 4
        L_F = |error of D_f on F(x0)|^2  +  w_D [softplus(disc(F(x0))) + softplus(-disc(F(real)))]     sec. 4.2, eq. 4

    For another divergence ``E_q[f(p / q)]`` of data p and samples q than the reverse KL the first term of L_G has the
    factor ``sg h(r)``, ``h(r) = r^2 f''(r)`` (f-distill, arXiv 2502.15681), with r = p / q = exp(disc(x_t)): 1 for the
    reverse KL, r for the forward one, r / (r + 1) for Jensen and Shannon's.

    The normaliser is DMD's (arXiv 2311.18828, eq. 8). L_G moves the student alone: nothing flows through D_f and D_r,
    and of the discriminator only the features' dependence on x0 counts. L_F moves the fake score and the head; there x0
    is fixed.

    Departures: the discriminator head is an MLP on the tokens of a middle block (a transformer has no 4x4 bottleneck to
    convolve); the fake score's loss is taken in the teacher's own velocity space by default; a sample that is not
    finite stops the run.
    """

    experts = True
    health = {
        **score.HEALTH,
        **adversarial.HEALTH,
        "ratio": "mean over the batch of r = exp(logit) at the noised samples whose scores are asked, where the "
        "divergence reads it: 1 where samples and data are alike",
        "sample_mean": "mean of all elements of a batch of the student's samples",
    }

    @dataclass
    class Options:
        student_steps: int = field(default=1, metadata={"min": 1})  # N network calls at inference
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})  # of the first call; one-step SDXL: 0.4
        guidance: float = 1.0  # on the teacher only
        critic_turns: int = 5  # R: critic updates per student update (TTUR); 1 is the ablation
        distribution_matching: float = 1.0  # weight of L_DM; 0 is the "GAN without distribution matching" ablation
        gan_weight: float = 3e-3  # w_G; 0 is the "no GAN" ablation, which needs no real data
        critic_gan_weight: float = 1e-2  # w_D
        gan_block: str = ""  # module path of the tapped block; empty: the middle one
        backward_simulation: bool = True  # False: few-step inputs are noised real data
        generator_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        critic_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)  # 0 itself has no eps to predict
        fake_loss: FakeLoss = "v"
        renoise: Renoise = "fresh"
        # Whose features the discriminator reads. "teacher": the frozen teacher's, which the critic's turn leaves alone
        gan_network: Literal["fake", "teacher"] = field(default="fake", metadata={"later": True})
        # "own": the samples that the discriminator sees have a noise of their own. "shared": they are those whose
        # scores are asked, so that generated samples cost no pass of their own through gan_network
        gan_pass: Literal["own", "shared"] = field(default="own", metadata={"later": True})
        # What is minimised over noise levels; all but DMD2's own weigh each sample by the discriminator's density ratio
        # (f-distill, arXiv 2502.15681)
        divergence: Literal["reverse_kl", "forward_kl", "jeffreys", "js", "chi2", "hellinger"] = field(
            default="reverse_kl", metadata={"later": True}
        )

    options: Options
    discriminator: Any

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        if self.weighs and not self.options.gan_weight:
            raise UserError(
                f"options.divergence={self.options.divergence} weighs samples by what a discriminator says of them",
                cure="set options.gan_weight above 0, or options.divergence=reverse_kl",
            )
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.fake = self.clone(teacher, "fake")
        self.discriminator = (
            Discriminator(self.fake, self.options.gan_block) if self.options.gan_weight else nn.Identity()
        )
        self.times = few_step_times(self.options.student_steps, self.options.t_init)

    def sample_student(self, batch: Batch, grad: bool) -> Tensor:
        """``x0 = G(x_(t_k), t_k, c)`` for one step k of the schedule (sec. 4.4), the same for the whole batch, reached
        as at inference (backward simulation, sec. 4.5) or from noised real data. The graph is that of the last call."""
        if self.options.backward_simulation or len(self.times) == 1:
            return rollout(self.student, self.draw, batch["cond"], self.times, grad=grad, renoise=self.options.renoise)
        k, real = self.draw.index(len(self.times)), batch["x"]
        if k == 0:
            return rollout(self.student, self.draw, batch["cond"], self.times, grad=grad, last=0)
        t = real.new_full((), self.times[k] * self.student.process.t_max)
        x_in = self.student.process.add_noise(real, self.draw.normal_like(real), t)
        with torch.set_grad_enabled(grad):
            return self.student(x_in, t, batch["cond"]).x0

    def noised(self, x: Tensor, law: TimeLaw) -> tuple[Tensor, Tensor, Tensor]:
        """``(F(x), t, eps)``: ``alpha x + sigma eps`` with fresh noise and a time of this law."""
        t, eps = law.sample(self.draw, self.teacher.process).to(x), self.draw.normal_like(x)
        return self.teacher.process.add_noise(x, eps, t), t, eps

    @property
    def weighs(self) -> bool:
        """Whether the divergence weighs samples otherwise than all alike."""
        return self.options.divergence != "reverse_kl"

    def weight(self, x_t: Tensor, t: Tensor, cond: Cond, logits: Tensor | None) -> Tensor:
        """``sg h(r)`` ``[B]``, by the logits at x_t, or a pass of their own where there are none."""
        with torch.no_grad():
            if logits is None:
                logits = self.discriminator.logits(self.tapped, x_t, t, cond)
            r = density_ratio(logits.detach())
        self.note("ratio", r.mean())
        return get_divergence(self.options.divergence).c(r)

    @property
    def tapped(self) -> Denoiser:
        """The network whose features the discriminator reads."""
        return self.teacher if self.options.gan_network == "teacher" else self.fake

    def scores(self, x_t: Tensor, t: Tensor, cond: Cond, judged: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """``sg D_r`` (guided) and ``sg D_f`` at x_t and, where it is ``judged`` too, the logits of the same pass."""
        fixed, w, logits = x_t.detach(), self.options.guidance, None
        if not judged:
            real, fake = self.teacher(fixed, t, cond, w), self.fake(fixed, t, cond)
        elif self.tapped is self.teacher:
            plain, logits = self.discriminator(self.teacher, x_t, t, cond)
            real, fake = self.teacher.guided(plain, cond, w), self.fake(fixed, t, cond)
        else:
            fake, logits = self.discriminator(self.fake, x_t, t, cond)
            real = self.teacher(fixed, t, cond, w)
        return real.x0.detach(), fake.x0.detach(), logits

    @turn(trains="student", every="critic_turns", optim=OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """``L_G``: distribution matching (eq. 2) and the generator's part of the GAN (sec. 4.3, eq. 4)."""
        o, cond = self.options, batch["cond"]
        x0 = self.sample_student(batch, grad=True)
        self.shared["x0"] = x0.detach()  # the critic of this step learns from this very sample
        terms: dict[str, Tensor] = {}
        logits = None
        if o.distribution_matching:
            judged = bool(o.gan_weight) and o.gan_pass == "shared"
            x_t, t, _ = self.noised(x0 if judged else x0.detach(), o.generator_times)
            real, fake, logits = self.scores(x_t, t, cond, judged)
            # g = (D_f - D_r) / mean|x0 - D_r|, and dL/dx0 = g / numel
            weight = mean_abs_normaliser(x0, real) / x0[0].numel()
            h = self.weight(x_t, t, cond, logits) if self.weighs else 1.0
            terms["dm"] = o.distribution_matching * score_difference_loss(x0, fake, real, di=h, weight=weight)
            self.note("score_gap", (fake - real).square().mean())
        if o.gan_weight:
            if logits is None:
                x_t, t, _ = self.noised(x0, o.critic_times)
                logits = self.discriminator.logits(self.tapped, x_t, t, cond)
            terms["gan"] = o.gan_weight * adversarial.generator_loss(logits).mean()
        self.note("sample_std", x0.std())
        self.note("sample_mean", x0.mean())
        return terms

    @turn(trains=("fake", "discriminator"), optim=OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """``L_F``, every step (sec. 4.2): denoise the student's samples, and tell them from real ones (sec. 4.3,
        eq. 4), each under noise of its own, or the student's under that of the denoising."""
        o, cond = self.options, batch["cond"]
        x0 = self.shared.get("x0")
        if x0 is None:
            x0 = self.sample_student(batch, grad=False)
        x_t, t, eps = self.noised(x0, o.critic_times)
        both = bool(o.gan_weight) and o.gan_pass == "shared" and o.gan_network == "fake"
        p, logits = self.discriminator(self.fake, x_t, t, cond) if both else (self.fake(x_t, t, cond), None)
        loss = fake_score_loss(p, x0, eps, o.fake_loss)
        self.note("fake_error", loss)
        if not o.gan_weight:
            return {"denoise": loss}
        fake_t, t_fake = (x_t, t) if o.gan_pass == "shared" else self.noised(x0, o.critic_times)[:2]
        real_t, t_real, _ = self.noised(batch["x"], o.critic_times)

        def gan(logits: Tensor, real: bool) -> Tensor:
            self.note("real_logit" if real else "fake_logit", logits.mean())
            return o.critic_gan_weight * adversarial.told(logits, real)

        def of_real() -> Tensor:
            return gan(self.discriminator.logits(self.fake, real_t, t_real, cond), real=True)

        def of_both() -> Tensor:
            if self.tapped is self.teacher:  # without a graph, so both fit into one pass
                twice = {key: torch.cat([value, value]) for key, value in cond.items()}
                x_both, t_both = torch.cat([fake_t, real_t]), torch.cat([t_fake, t_real])
                fake, real = self.discriminator.logits(self.teacher, x_both, t_both, twice).chunk(2)
                return gan(real, real=True) + gan(fake, real=False)
            return gan(self.discriminator.logits(self.fake, fake_t, t_fake, cond), real=False) + of_real()

        # what has passes of its own can wait until the denoising's is done with
        return {"denoise": loss, "gan": of_both if logits is None else Parted(gan(logits, real=False), of_real)}

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.times, self.options.renoise)
