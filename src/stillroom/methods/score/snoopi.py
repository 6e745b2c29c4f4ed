"""SNOOPI: variational score distillation at random guidance scales, and students that heed negative prompts (arXiv
2412.02687)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.data.source import LABELS
from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import expand
from stillroom.diffusion.sampling import FewStepSampler, SteeredSampler
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.evaluation.metrics import conditional_energy_distance
from stillroom.losses.rewards import Reward, hinge, named_reward
from stillroom.losses.score import HEALTH, denoising_loss, score_difference_loss
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn
from stillroom.surgery.attached import AttachedDenoiser
from stillroom.surgery.lora import lora_role
from stillroom.surgery.modules import device_of, evaluating
from stillroom.surgery.negatives import negative_conditions, with_negatives


@register(
    "snoopi",
    Paper(
        title="SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance",
        arxiv="2412.02687",
        year=2024,
        venue="ICCV 2025",
    ),
)
class Snoopi(Method):
    """A one-step student from conditions only, as SwiftBrush's, with another guidance scale for every sample: the same
    in the teacher and in the LoRA teacher that learns the student's samples (PG-SB). Where negative prompts are given,
    the student learns to heed them in its one pass (NASA-T).

    Equations are those of version 3. With z unit noise, T the first time, x_t = alpha x0 + sigma eps, k ~ U(k_low,
    k_high) and ``e^(k)(y) = (1 - k) e(none) + k e(y)`` (eq. 4), that is k = 1 without guidance:

        x0        = (x_T - sigma_T eps_theta(x_T, T, y)) / alpha_T,   x_T = sigma_T z
        dL/dtheta = sigma^2 (e_psi^(k) - e_phi^(k)) dx0/dtheta = alpha sigma (D_phi^(k) - D_psi^(k)) dx0/dtheta    eq. 6
        L_LoRA    = alpha^2 |eps_phi(x_t, t, y) - eps|^2
        L_reward  = weight (1 - progress) mean max(0, margin - reward(x0, y))                        SwiftBrush v2's

    With a negative prompt y- the teacher's ``e(none)`` is ``e(y-)`` (eq. 5), and each cross-attention of the student
    gives ``Z+ - a Z-`` (eq. 9), a ~ U(0, 1), with Z- what the same queries read in y-
    (:mod:`stillroom.surgery.negatives`); the LoRA teacher does not see y-.

    Departures: k and a are drawn for each sample (whether for each or for a batch is not said); the student is asked at
    ``sigma_T z``, and is a copy of the teacher unless the recipe names another start (the paper's SD 2.1 begins as
    SD-Turbo); the reward's weight, which the paper reduces "gradually to zero", falls evenly.
    """

    health = HEALTH | {
        "fake_error": "L_LoRA, the mean of alpha^2 (eps_phi - eps)^2 on the student's samples: how well the LoRA "
        "teacher follows the student",
        "reward": "mean reward of the student's samples; those above reward_margin are left alone",
        "distance": "conditional energy distance between samples of the student as it stands, no average of it, and "
        "real ones: always from the same noises, so that it moves with the student alone",
        "fluctuation": "how much that distance has changed since it was last measured, without sign",
    }

    @dataclass
    class Options:
        k_low: float = 0.5  # guidance scales, one for each sample, from here ...
        k_high: float = 4.0  # ... to here; 1 is no guidance
        # Which of the two networks has the random scales; the other has k_fixed (Table 2 of version 1).
        random: Literal["both", "teacher", "fake", "none"] = "both"
        k_fixed: float = 4.5
        fake: Literal["lora", "full"] = "lora"  # "full": an own copy of all weights, the usual fake score
        rank: int = field(default=64, metadata={"min": 1})
        lora_alpha: float = 128.0
        targets: tuple[str, ...] = ("to_q", "to_v")
        condition_drop: float = field(default=0.1, metadata={"min": 0, "max": 1})  # LoRA turn only, one coin per batch
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})
        student_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        fake_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)  # 0 itself has no eps to predict
        negatives: tuple[str, ...] = ()  # negative prompts, or files of them: NASA-T, one for each sample; none: PG-SB
        # Who sees them: the student in its cross-attention, teachers in the place of no condition (version 3, Table 5).
        heeded_by: tuple[Literal["student", "teacher", "fake"], ...] = ("student", "teacher")
        away_low: float = field(default=0.0, metadata={"min": 0})  # a in training, from here ...
        away_high: float = field(default=1.0, metadata={"min": 0})  # ... to here
        negative_scale: float = field(default=0.5, metadata={"min": 0})  # a of the finished student, by default
        reward: str = ""  # package.module:function of images (or latents) and conditions; the paper: cosines of CLIP
        reward_weight: float = field(default=0.1, metadata={"min": 0})  # at first; it falls to 0 by the end
        reward_margin: float = 0.37
        measured: int = field(default=0, metadata={"min": 0})  # labelled rows to compare the student with; 0: none
        measure_every: int = field(default=50, metadata={"min": 1})  # steps

    options: Options

    def build(
        self,
        teacher: Denoiser,
        student: Denoiser | None = None,
        prompts: Callable[[Sequence[str]], Any] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        o = self.options
        if o.k_high < o.k_low:
            raise UserError(f"options.k_low={o.k_low:g} is above options.k_high={o.k_high:g}", cure="exchange them")
        if o.away_high < o.away_low:
            raise UserError(
                f"options.away_low={o.away_low:g} is above options.away_high={o.away_high:g}", cure="exchange them"
            )
        # copied before adapters are put into the teacher's network
        self.student = self._heeding(self.clone(student or teacher, "student"), prompts)
        if o.fake == "lora":
            self.fake = lora_role(teacher, "fake", o.rank, o.lora_alpha, o.targets)
        else:
            self.fake = self.clone(teacher, "fake")
        self.teacher = frozen(teacher)
        self.decode, self.asks = decode, named_reward(o.reward) if o.reward else None
        self.others: Any = prompts(o.negatives) if o.negatives and prompts else None
        self._last: tuple[int, float] | None = None  # the step at which the student was measured, and its distance

    def _heeding(self, student: Denoiser, prompts: Any) -> Denoiser:
        """The student, which may be told a negative prompt where there are any."""
        o = self.options
        if not o.negatives:
            return student
        if prompts is None:
            raise UserError(
                "options.negatives are texts, and this teacher reads none", cure="options.negatives=[], or another one"
            )
        if "student" not in o.heeded_by:
            return student
        if "student" in self.lora:
            raise UserError("a LoRA student cannot learn to heed negative prompts", cure="leave lora.student away")
        return with_negatives(student)

    def prepare(self, data: Any) -> None:
        """The rows that the student is compared with."""
        if self.options.measured:
            self.compared = data.batch(1, 0, self.options.measured)
            if LABELS not in self.compared["cond"]:
                raise UserError(
                    "options.measured compares rows of each class, and these data have none", cure="set it to 0"
                )

    # --- what the turns are made of -------------------------------------------------------------------------------
    def scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """k of the teacher and of the LoRA teacher, ``[B]`` each: the same draw where both are random."""
        o = self.options
        k = o.k_low + (o.k_high - o.k_low) * self.draw.uniform(len(like)).to(like)
        fixed = torch.full_like(k, o.k_fixed)
        return k if o.random in ("both", "teacher") else fixed, k if o.random in ("both", "fake") else fixed

    def negatives(self, like: Tensor) -> dict[str, Tensor]:
        """The conditions of a negative prompt for each sample, ``[B, ...]``; empty without negative prompts."""
        if self.others is None:
            return {}
        rows = self.draw.integers(self.others.n).cpu()
        return {name: value.to(like.device) for name, value in self.others.conditions(rows).items()}

    def one_step(self, cond: Cond, told: Cond, z: Tensor) -> Tensor:
        """The student's sample: its noise prediction read as ``x0 = (x_T - sigma_T eps) / alpha_T``, which is the
        teacher's own one-step guess at the start."""
        process, t = self.student.process, z.new_full((), self.options.t_init * self.student.process.t_max)
        return self.student(process.sigma(t) * z, t, {**cond, **told}).x0

    def sample_student(self, cond: Cond, negatives: Cond) -> Tensor:
        z = self.draw.normal(self.draw.local, *self.student.shape).to(next(self.student.parameters()))
        if not isinstance(self.student, AttachedDenoiser) or not negatives:
            return self.one_step(cond, {}, z)
        o = self.options
        alpha = o.away_low + (o.away_high - o.away_low) * self.draw.uniform(len(z)).to(z)
        return self.one_step(cond, negative_conditions(negatives, alpha), z)

    def guided(self, who: str, x_t: Tensor, t: Tensor, cond: Cond, k: Tensor, negatives: Cond) -> Prediction:
        """``(1 - k) e(y-) + k e(y)``, with no condition for y- where ``who`` does not see negative prompts."""
        denoiser: Denoiser = getattr(self, who)
        if negatives and who in self.options.heeded_by:
            return denoiser.against(x_t, t, cond, negatives, k)
        return denoiser(x_t, t, cond, k)

    # --- turns ----------------------------------------------------------------------------------------------------
    @turn(trains="student", optim=Optim(lr=1e-6, clip_norm=1.0))
    def generator(self, batch: Batch) -> Terms:
        """``dL/dx0 = sg[alpha sigma (D_phi^(k) - D_psi^(k))] / numel``, and the reward where there is one."""
        o, cond, process = self.options, batch["cond"], self.teacher.process
        negatives = self.negatives(next(self.student.parameters()))
        x0 = self.sample_student(cond, negatives)
        self.shared["x0"] = x0.detach()
        t, eps = o.student_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        k, k_fake = self.scales(x0)
        with torch.no_grad():
            x_t = process.add_noise(x0, eps, t)
            real = self.guided("teacher", x_t, t, cond, k, negatives).x0
            fake = self.guided("fake", x_t, t, cond, k_fake, negatives).x0
            weight = process.alpha(t) * process.sigma(t) / x0[0].numel()
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", x0.std())
        terms = {"vsd": score_difference_loss(x0, fake, real, di=1.0, weight=weight)}
        if self.asks is not None and o.reward_weight:
            terms["reward"] = o.reward_weight * (1 - self.progress) * self.rewarded(x0, cond, self.asks)
        self.measure()
        return terms

    def rewarded(self, x0: Tensor, cond: Cond, reward: Reward) -> Tensor:
        """``mean max(0, margin - reward)``."""
        scores = reward(self.decode(x0) if self.decode is not None else x0, cond)
        self.note("reward", scores.mean())
        return hinge(scores, self.options.reward_margin)

    @turn(trains="fake", optim=Optim(lr=1e-3, clip_norm=1.0))
    def critic(self, batch: Batch) -> Terms:
        """``L_LoRA`` on the sample that the student's turn of this step made; one coin drops the condition of the whole
        batch."""
        o, cond, process, x0 = self.options, batch["cond"], self.teacher.process, self.shared["x0"]
        t, eps = o.fake_times.sample(self.draw, process).to(x0), self.draw.normal_like(x0)
        if self.draw.index(1_000_000) < o.condition_drop * 1_000_000:
            cond = self.fake.null_cond(cond)
        alpha = expand(process.alpha(t), x0)
        loss = denoising_loss(alpha * self.fake(process.add_noise(x0, eps, t), t, cond).eps, alpha * eps)
        self.note("fake_error", loss)
        return {"denoise": loss}

    # --- measuring ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def measure(self) -> None:
        """The student's distance to real rows, from noises that stay the same."""
        o = self.options
        if not o.measured or (self.step + 1) % o.measure_every or (self._last and self._last[0] == self.step):
            return
        device = device_of(self.student)
        cond = {name: value.to(device) for name, value in self.compared["cond"].items()}
        z = torch.randn(o.measured, *self.student.shape, generator=torch.Generator().manual_seed(0)).to(device)
        with evaluating(self.student):
            drawn = self.one_step(cond, {}, z).double().cpu()
        labels = cond[LABELS].cpu()
        found = conditional_energy_distance(drawn, labels, self.compared["x"].double().cpu(), labels)
        self.note("distance", torch.tensor(found))
        if self._last is not None:
            self.note("fluctuation", torch.tensor(abs(found - self._last[1])))
        self._last = self.step, found

    def sampler(self) -> FewStepSampler:
        return SteeredSampler((self.options.t_init,), negative_scale=self.options.negative_scale)
