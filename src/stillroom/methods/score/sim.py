"""SIM, score implicit matching: one step by any distance of scores, Pseudo-Huber above all (arXiv 2410.16794)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import FewStepSampler, rollout
from stillroom.diffusion.times import TimeLaw
from stillroom.losses.score import (
    HEALTH,
    SQUARED,
    Distance,
    FakeLoss,
    fake_score_loss,
    mean_abs_normaliser,
    power,
    pseudo_huber,
    score_difference_loss,
)
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn

OPTIM = Optim(lr=1e-5, name="adam", betas=(0.0, 0.999))


@register(
    "sim",
    Paper(
        title="One-Step Diffusion Distillation through Score Implicit Matching",
        arxiv="2410.16794",
        year=2024,
        venue="NeurIPS 2024",
        code="maple-research-lab/SIM",
    ),
)
class SIM(Method):
    """A one-step student from a frozen teacher, no images. Minimises ``E d(s_p - s_q)`` for a distance ``d`` of the
    scores of student and teacher through an identity that needs no derivative of the student's own score; Pseudo-Huber
    bounds the step that a sample can ask for, so larger learning rates stay stable.

    With y = s_p(x_t) - s_q(x_t) the difference of student's and teacher's scores, and x_t ~ q(x_t | x0) drawn under the
    student as it stands, the score-divergence gradient theorem (sec. 3) gives

        grad E d(y) = grad E[ -d'(y) . (s_p(x_t) - grad log q(x_t | x0)) ]

    where on the right theta acts through x0 and x_t alone. With the fake score for s_p, ``d = D_f - D_r`` the
    difference of x0-predictions and ``psi`` the derivative of the distance, in x0 units:

        L   = -w <psi(d), D_f - x0>
        psi = d / sqrt(|d|^2 + c^2)  Pseudo-Huber;    d  squared;    beta |d|^(beta - 2) d  power

    That is the distance of x0-predictions with w = 1. The distance of the scores themselves (``score_space``) is the
    same with y = k d, k = alpha / sigma^2, and s_p - grad log q = k (D_f - x0), hence with

        w = k  and c / k in the place of c, Pseudo-Huber;    w = k^2  squared;    w = k^beta  power

    Nothing is detached but the weights of both networks: y keeps its dependence on x_t.

    Departures: the constant ``c`` (0.01 sqrt(dim) in x0 units) and the unit time weight, where the paper is silent.
    """

    experts = True
    health = HEALTH

    @dataclass
    class Options:
        distance: Literal["pseudo_huber", "l2", "power", "sid"] = "pseudo_huber"  # "sid": l2 over mean|x0 - D_r|
        # Pseudo-Huber constant over all elements, in units of x0, with score_space of scores; 0 takes 0.01 * sqrt(dim).
        c: float = field(default=0.0, metadata={"min": 0})
        beta: float = 1.5  # exponent of the power family
        score_space: bool = False  # True: the distance is one of scores, as in the raw theorem, not of x0-predictions
        fgm: float = 0.0  # > 0 adds the sampling-law term that SIM leaves out; with 1/2 the gradient is the exact one
        guidance: float = 1.0  # on the teacher
        t_init: float = field(default=0.714, metadata={"above": 0, "max": 1})  # sigma_init 2.5: 2.5 / 3.5 on a flow
        generator_times: TimeLaw = TimeLaw("karras", 0.0, 0.8)
        critic_times: TimeLaw = TimeLaw("log-normal", mean=-1.2, std=1.2)
        fake_loss: FakeLoss = "snr"

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.fake = self.clone(teacher, "fake")

    def distance(self, k: Tensor | None = None) -> tuple[Distance, Tensor | float]:
        """The distance of x0-predictions, and its weight. With k = alpha / sigma^2 ``[B]``: that of scores, k d."""
        o = self.options
        if o.distance == "pseudo_huber":
            c = o.c or 0.01 * torch.Size(self.student.shape).numel() ** 0.5
            return (pseudo_huber(c), 1.0) if k is None else (pseudo_huber(c / k), k)
        if o.distance == "power":
            return power(o.beta), 1.0 if k is None else k**o.beta
        return SQUARED, 1.0 if k is None else k**2

    @turn(trains="fake", optim=OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """The fake score denoises fresh samples of the student."""
        x0 = rollout(self.student, self.draw, batch["cond"], (self.options.t_init,), grad=False)
        process, eps = self.teacher.process, self.draw.normal_like(x0)
        t = self.options.critic_times.sample(self.draw, process).to(x0)
        loss = fake_score_loss(
            self.fake(process.add_noise(x0, eps, t), t, batch["cond"]), x0, eps, self.options.fake_loss
        )
        self.note("fake_error", loss)
        return {"denoise": loss}

    @turn(trains="student", optim=OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """``-w <psi(D_f - D_r), D_f - x0>``, with the graph through x_t in everything."""
        o, cond, process = self.options, batch["cond"], self.teacher.process
        x0 = rollout(self.student, self.draw, cond, (o.t_init,), grad=True)
        t, eps = o.generator_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        x_t = process.add_noise(x0, eps, t)
        real, fake = self.teacher(x_t, t, cond, o.guidance).x0, self.fake(x_t, t, cond).x0
        distance, weight = self.distance(process.alpha(t) / process.sigma(t) ** 2 if o.score_space else None)
        if o.distance == "sid":
            weight = weight * mean_abs_normaliser(x0, real)
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x0.std())
        loss = score_difference_loss(x0, fake, real, sim=1.0, fgm=o.fgm, distance=distance, weight=weight)
        return {"sim": loss}

    def sampler(self) -> FewStepSampler:
        return FewStepSampler((self.options.t_init,))
