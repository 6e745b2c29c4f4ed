"""SwiftBrush: image-free variational score distillation; the fake score is a LoRA on the teacher (arXiv 2312.05239)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import expand
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.diffusion.times import TimeLaw
from stillroom.losses.score import HEALTH, denoising_loss, score_difference_loss
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.surgery.lora import lora_role


@register(
    "swiftbrush",
    Paper(
        title="SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
        arxiv="2312.05239",
        year=2023,
        venue="CVPR 2024",
        code="VinAIResearch/SwiftBrush",
    ),
)
class SwiftBrush(Method):
    """A one-step student from conditions only, no images. The student's samples are pulled along the difference of the
    teacher's and a LoRA teacher's noise predictions, both guided alike; the LoRA teacher (adapters on the teacher's own
    weights) learns to denoise the student's samples.

    With z unit noise, T the first time, x_t = alpha x0 + sigma eps, ``e_psi`` and ``e_phi`` the guided noise
    predictions of teacher and LoRA teacher, and ``D`` the x0-predictions that they stand for:

        x0        = (x_T - sigma_T eps_theta(x_T, T, c)) / alpha_T,   x_T = sigma_T z
        dL/dtheta = sigma^2 (e_psi - e_phi) dx0/dtheta = alpha sigma (D_phi - D_psi) dx0/dtheta    VSD, arXiv 2305.16213
        L_LoRA    = alpha^2 |eps_phi(x_t, t, c) - eps|^2

    Neither prediction of the first loss carries a gradient; the second sees the sample that the student had before its
    update, as it is.

    Departures: the student is asked at ``sigma_T z``, as at every other time, where the paper's code feeds z itself
    (sigma_T is 0.998 there); a gradient that is not finite stops the run instead of being set to 0.
    """

    health = HEALTH | {
        "fake_error": "L_LoRA, the mean of alpha^2 (eps_phi - eps)^2 on the student's samples: how well the LoRA "
        "teacher follows the student"
    }

    @dataclass
    class Options:
        fake: Literal["lora", "full"] = "lora"  # "full": an own copy of all weights, the usual fake score
        rank: int = 64
        lora_alpha: float = 108.0
        targets: tuple[str, ...] = ("to_q", "to_v")
        guidance: float = 4.5  # on the teacher
        fake_guidance: float = 4.5  # on the LoRA teacher; the paper keeps the two equal
        score: Literal["vsd", "sds"] = "vsd"  # "sds": the fake score is replaced by the noise that was added
        reparametrise: bool = True  # False: the network's raw output is taken as x0 (the paper's ablation)
        condition_drop: float = 0.1  # LoRA turn only, one coin per batch
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})
        student_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        fake_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)  # 0 itself has no eps to predict

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        self.student = self.clone(
            student or teacher, "student"
        )  # copied before adapters are put into the teacher's network
        if o.fake == "lora":
            self.fake = lora_role(teacher, "fake", o.rank, o.lora_alpha, o.targets)
        else:
            self.fake = self.clone(teacher, "fake")
        self.teacher = frozen(teacher)
        if not o.reparametrise and self.student.prediction in ("eps", "v"):
            self.student.prediction = "x0"  # by whoever asks it, the finished student's sampler too

    def one_step(self, batch: Batch) -> Tensor:
        """The student's sample: its noise prediction read as ``x0 = (x_T - sigma_T eps) / alpha_T``, which is
        the teacher's own one-step guess at the start."""
        process = self.student.process
        z = self.draw.normal(self.draw.local, *self.student.shape).to(next(self.student.parameters()))
        t = z.new_full((), self.options.t_init * process.t_max)
        return self.student(process.sigma(t) * z, t, batch["cond"]).x0

    @turn(trains="student", optim=Optim(lr=1e-6, name="adam", clip_norm=1.0))
    def generator(self, batch: Batch) -> Terms:
        """VSD: ``dL/dx0 = sg[alpha sigma (D_phi - D_psi)] / numel``. SDS, its ablation: x0 in the place of D_phi."""
        o, cond, process = self.options, batch["cond"], self.teacher.process
        x0 = self.one_step(batch)
        self.shared["x0"] = x0.detach()
        t, eps = o.student_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        with torch.no_grad():
            x_t = process.add_noise(x0, eps, t)
            real = self.teacher(x_t, t, cond, o.guidance).x0
            fake = self.fake(x_t, t, cond, o.fake_guidance).x0 if o.score == "vsd" else x0.detach()
            weight = process.alpha(t) * process.sigma(t) / x0[0].numel()
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x0.std())
        return {"vsd": score_difference_loss(x0, fake, real, di=1.0, weight=weight)}

    @turn(trains="fake", optim=Optim(lr=1e-3, name="adam", clip_norm=1.0))
    def critic(self, batch: Batch) -> Terms:
        """``L_LoRA`` on the sample that the student's turn of this step made; one coin drops the condition of the whole
        batch."""
        o, cond, process, x0 = self.options, batch["cond"], self.teacher.process, self.shared["x0"]
        t, eps = o.fake_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        if self.draw.index(1_000_000) < o.condition_drop * 1_000_000:
            cond = self.fake.null_cond(cond)
        x_t = process.add_noise(x0, eps, t)
        p = self.fake(x_t, t, cond)
        loss = denoising_loss(expand(process.alpha(t), x0) * p.eps, expand(process.alpha(t), x0) * eps)
        self.note("fake_error", loss)
        return {"denoise": loss}

    def sampler(self) -> FewStepSampler:
        return FewStepSampler((self.options.t_init,))
