"""SANA-Sprint: one student for one, two and four steps, by continuous-time consistency and a latent GAN (arXiv
2503.09641)."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, Reparametrised
from stillroom.diffusion.derivatives import How
from stillroom.diffusion.process import Process, RectifiedFlow, TrigFlow, expand, last_time, match_snr
from stillroom.diffusion.sampling import FewStepSampler, Sampler, ScaleFewStepSampler, by_steps, share_at
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.folders.sana_sprint import is_sana, reads_scale, sprint_denoiser
from stillroom.losses.adversarial import hinge_generator, hinge_told
from stillroom.losses.flow_map import Norm, bound, evened, normalised, scm_change, towards, trig_times
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn
from stillroom.networks.discriminators import LatentDiscriminator
from stillroom.networks.extra_inputs import with_inputs
from stillroom.networks.scalars import LogVariance

TRIG = TrigFlow()
SCALE = "guidance_scale"
ANGLES: dict[int, tuple[float, ...]] = {
    1: (math.pi / 2,),
    2: (math.pi / 2, 1.3),
    4: (math.pi / 2, 1.3, 1.1, 0.6),
}
"""Times of TrigFlow at which a student of so many steps is asked (Table 7, whose first time is arctan 400 = 1.5683)."""


@register(
    "sana-sprint",
    Paper(
        title="SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
        arxiv="2503.09641",
        year=2025,
        venue="ICCV 2025",
        code="NVlabs/Sana",
    ),
)
class SanaSprint(Method):
    """A student that jumps from any noise level to data, so that the same weights serve one, two and four steps; the
    guidance scale is one of its inputs. Any teacher is read as TrigFlow's without training (sec. 3.1), ``u = cos(t) x0
    + sin(t) eps``, and ``F`` is its velocity there. With ``f(u, t) = cos(t) u - sin(t) F(u, t)``, J the derivative of F
    along ``cos t sin t (du/dt, 1)``, du/dt the guided teacher's F:

        g     = -cos^2(t) (F - du/dt) - r (cos t sin t u + J),     g <- g / (|g| + c / sd)            alg. 1
        L_sCM = mean[ exp(-w(t)) / (sd tan t) |F - sg(F) - sg(g)|^2 + w(t) ]                           eq. 8
        L_G   = -mean D(F_pre's features of f(u, t), noised)       t = pi/2 with probability p         eq. 11, sec. 3.3
        L_D   = (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2                                  eq. 10

    The paper measures noise on data that it scales to a standard deviation of sd; here data keep their own, and sd is
    of the law of times, of the weight and of c alone. r grows from 0 to 1 (tangent warm-up). D has a head on each of
    several blocks of the frozen teacher (LADD). Fake are the student's samples, and real ones under another one's
    condition.

    Before that the teacher itself may learn to read times in [0, 1] (``retime_share``; sec. 3.2): the derivative by
    time of one that reads them in [0, 1000] is a thousand times as large. A student of a Sana is Sana-Sprint's network,
    which ``SanaSprintPipeline`` runs.

    Departures: the retimed copy learns the teacher's own velocities, not noised data; the norm of g is over the mean of
    squares; fakes of a step are judged as they were drawn before the student's update; AdamW, not CAME.
    """

    health = {
        "tangent": "root mean square of the elements of g before it is normalised: how far the student is from "
        "consistency along the teacher's path, and how steep its function of time is",
        "consistency": "mean of |F - sg(F) - g|^2 over elements, g normalised: with tangent_norm rms near 1 where all "
        "tangents are long, and lower where they are short beside c; with l2 at most 1 over the number of elements",
        "logvar": "mean of w over the batch: the logarithm of the loss that the weighting expects",
        "retime_error": "mean squared difference between the retimed copy's velocity and the teacher's",
        "real_logit": "mean output of the discriminator's heads on noised real data; the hinge loss is content above 1",
        "fake_logit": "the same on noised samples of the student; content below -1",
        "sample_std": "standard deviation of all elements of a batch of the student's samples",
    }

    @dataclass
    class Options:
        steps: Literal[1, 2, 4] = 1  # of the finished student's sampler; the weights are the same for all
        guidance: tuple[float, ...] = (
            4.0,
            4.5,
            5.0,
        )  # scales that are learnt, one for each sample; none: no guidance
        scale: float = 4.5  # of the finished student's sampler
        scm_weight: float = field(default=1.0, metadata={"min": 0})
        gan_weight: float = field(default=0.5, metadata={"min": 0})
        at_max: float = field(default=0.5, metadata={"min": 0, "max": 1})  # p: of the GAN's samples, from noise alone
        times: TimeLaw = TimeLaw("log-normal", 0.0007, 0.9993, mean=0.0, std=1.6)  # of log(sd tan t)
        gan_times: TimeLaw = TimeLaw("log-normal", 0.0007, 0.9993, mean=-0.6, std=1.0)  # of what D sees
        data_std: float = field(default=0.5, metadata={"above": 0})  # sd: data's scale where the paper measures tan t
        tangent_warmup: float = field(default=0.2, metadata={"min": 0, "max": 1})  # share of the steps in which r grows
        tangent_c: float = field(default=0.1, metadata={"min": 0})  # c
        tangent_norm: Norm = "rms"
        # of noise to signal, below which r is 0: for networks that predict x0
        bound: float = field(default=0.0, metadata={"min": 0, "later": True})
        derivative: How = "exact"  # "difference": for networks with layers that have no forward-mode rule
        derivative_step: float = field(default=1e-3, metadata={"above": 0})
        gan_blocks: tuple[str, ...] = ()  # paths of the blocks that D reads; none: four, from early to last
        gan_width: int = field(default=64, metadata={"min": 1})  # channels of D's heads
        misaligned: bool = True  # real data under another one's condition are fake
        retime_share: float = field(default=0.0, metadata={"min": 0, "below": 1})  # of the steps; 0: times as they are
        time_scale: float = field(default=1.0, metadata={"above": 0})  # the retimed network is fed time_scale * t

    options: Options
    discriminator: Any
    retimed: Denoiser | None
    variance: LogVariance | None

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        if o.guidance and not teacher.null:
            raise UserError(
                "sana-sprint learns guidance, and this teacher has no unconditional value",
                cure="options.guidance=[], or say what stands for none",
            )
        self.teacher = frozen(teacher)
        self.student = self._begun(student or teacher)
        self.retimed = copy.deepcopy(self.student).requires_grad_(False).eval() if o.retime_share else None
        self.variance = LogVariance() if o.scm_weight else None
        self.discriminator = (
            LatentDiscriminator(self.base, o.gan_blocks, o.gan_width) if o.gan_weight else nn.Identity()
        )

    def _begun(self, given: Denoiser) -> Denoiser:
        """The student before any training: with the guidance scale as an input, and other times to come."""
        o = self.options
        if is_sana(given) and not reads_scale(given):
            if "student" in self.lora:
                raise UserError("a Sana-Sprint student is a network of its own", cure="leave lora.student away")
            if not o.retime_share:
                raise UserError(
                    "Sana-Sprint's pipeline feeds its network times in [0, 1], which this teacher has to learn first",
                    cure="options.retime_share=0.2",
                )
            return sprint_denoiser(given).requires_grad_(True)
        student = self.clone(given, "student")
        if o.retime_share:
            if not isinstance(given.process, RectifiedFlow):
                raise UserError(
                    f"options.retime_share is for flows, not for the {given.process.name} process", cure="set it to 0"
                )
            student.process = dataclasses.replace(given.process, time_scale=o.time_scale)
        if o.guidance and not reads_scale(student):
            if "student" in self.lora:
                raise UserError("a LoRA student gets no input for the guidance scale", cure="options.guidance=[]")
            return with_inputs(student, SCALE)
        return student

    @property
    def base(self) -> Denoiser:
        """Whose path and features the student learns from."""
        return self.teacher if self.retimed is None else self.retimed

    # --- times ----------------------------------------------------------------------------------------------------
    @property
    def end(self) -> float:
        """TrigFlow's time of the teacher's purest noise: pi/2, where it has no signal left."""
        return last_time(self.teacher.process, TRIG)

    def angles(self, law: TimeLaw, like: Tensor) -> Tensor:
        """``t = arctan(e^n / sd)`` ``[B]``."""
        return trig_times(law, self.draw, self.options.data_std, self.teacher.process, like)

    def stages(self) -> tuple[Stage, ...]:
        share = self.options.retime_share
        distil = Stage("distil", ("generator", "critic"), 1 - share, own_schedule=True)  # warmed up after retiming
        return (Stage("retime", ("retime",), share, own_schedule=True), distil) if share else (distil,)

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        """The student as it stands after retiming is the teacher of what follows."""
        if stage.kind == "distil" and self.retimed is not None and not resumed:
            with torch.no_grad():
                for mine, theirs in zip(self.retimed.parameters(), self.student.parameters(), strict=True):
                    mine.copy_(theirs)

    @property
    def warm(self) -> float:
        """r."""
        o = self.options
        done = max(0.0, (self.progress - o.retime_share) / (1 - o.retime_share))  # a stage has whole steps
        return min(1.0, done / o.tangent_warmup) if o.tangent_warmup else 1.0

    # --- turns ----------------------------------------------------------------------------------------------------
    @turn(trains="student", when="retime_share", optim=Optim(lr=2e-5))
    def retime(self, batch: Batch) -> Terms:
        """The teacher's own velocity at times that are fed otherwise, without its condition for a tenth of the rows
        (sec. 3.2; there by flow matching on data)."""
        x0, cond, process = batch["x"], dict(batch["cond"]), self.teacher.process
        t = TimeLaw("uniform", shift=1.0).sample(self.draw, process).to(x0)
        if self.teacher.null and cond:
            cond = self.teacher.without(cond, self.draw.uniform(len(x0)) < 0.1)
        x_t = process.add_noise(x0, self.draw.normal_like(x0), t)
        with torch.no_grad():
            target = self.teacher(x_t, t, cond).v
        error = (self.student(x_t, t, cond).v - target).square().flatten(1).mean(1)
        self.note("retime_error", error.mean())
        return {"retime": (evened(process, self.student.prediction, t) * error).mean()}

    @turn(trains=("student", "variance"), optim=Optim(lr=2e-6, clip_norm=0.1))
    def generator(self, batch: Batch) -> Terms:
        """``L_sCM`` and the generator's part of LADD (alg. 1)."""
        o, terms = self.options, {}
        told = self.with_scale(batch["cond"], batch["x"])
        if self.variance is not None:
            terms["consistency"] = o.scm_weight * self.consistency(batch, told)
        if o.gan_weight:
            x0 = self.jump(batch, told)
            self.shared["x0"] = x0.detach()
            s = self.angles(o.gan_times, x0)
            logits = self.judged(TRIG.add_noise(x0, self.draw.normal_like(x0), s), s, batch["cond"])
            terms["gan"] = o.gan_weight * hinge_generator(logits)
            self.note("sample_std", x0.std())
        return terms

    @turn(trains="discriminator", when="gan_weight", optim=Optim(lr=2e-6, clip_norm=0.1))
    def critic(self, batch: Batch) -> Terms:
        """``L_D``: real and generated at the same times, each with a noise of its own; pairs that do not belong
        together count as generated (eq. 10; misaligned pairs are the code's)."""
        o, real, cond = self.options, batch["x"], batch["cond"]
        fake = self.shared["x0"]
        s = self.angles(o.gan_times, real)
        shown, asked, apart = [real, fake], [cond, cond], torch.ones(len(real), device=real.device)
        if o.misaligned and cond:
            shown.append(real[beside(len(real), real.device)])
            asked.append(cond)
            apart = torch.cat([apart, differing(cond)])
        x = torch.cat([TRIG.add_noise(one, self.draw.normal_like(one), s) for one in shown])
        every = {name: torch.cat([part[name] for part in asked]) for name in cond}
        logits = self.judged(x, s.repeat(len(shown)), every)
        of_real, of_fake = logits[: len(real)], logits[len(real) :]
        self.note("real_logit", of_real.mean())
        self.note("fake_logit", of_fake[: len(real)].mean())
        return {"gan": (hinge_told(of_real, True) + hinge_told(of_fake, False, apart.to(logits))) / 2}

    # --- what they are made of ------------------------------------------------------------------------------------
    def with_scale(self, cond: Cond, like: Tensor) -> dict[str, Tensor]:
        """``cond`` and a guidance scale for each sample, one of those that are learnt."""
        scales = self.options.guidance
        if not scales:
            return dict(cond)
        which = self.draw.integers(len(scales))
        return {**cond, SCALE: torch.tensor(scales, device=which.device)[which].to(like)}

    def consistency(self, batch: Batch, told: Cond) -> Tensor:
        o, x0, cond = self.options, batch["x"], batch["cond"]
        t = self.angles(o.times, x0)
        u = TRIG.add_noise(x0, self.draw.normal_like(x0), t)
        teacher, student = Reparametrised(self.base, TRIG), Reparametrised(self.student, TRIG)
        with torch.no_grad():
            velocity = teacher(u, t, cond, told.get(SCALE, 1.0)).v
        r = bound(t, o.bound, self.warm)
        own, tangent = scm_change(
            lambda u, t: student(u, t, told).v, velocity, u, t, r, o.derivative, o.derivative_step
        )
        step = normalised(tangent, o.tangent_c / o.data_std, o.tangent_norm)
        assert self.variance is not None
        logvar = self.variance(t)
        self.note("tangent", tangent.square().mean().sqrt())
        self.note("consistency", step.square().mean())
        self.note("logvar", logvar.mean())
        return towards(own, step, 1 / (o.data_std * t.tan()), logvar)

    def jump(self, batch: Batch, told: Cond) -> Tensor:
        """``f(u, t)`` at fresh times, with probability p the last, from noise alone (sec. 3.3)."""
        x0 = batch["x"]
        t, z = self.angles(self.options.times, x0), self.draw.normal_like(x0)
        last = self.draw.uniform(len(x0)).to(x0) < self.options.at_max
        t = torch.where(last, t.new_tensor(self.end), t)
        u = torch.where(expand(last, x0), expand(t.sin(), x0) * z, TRIG.add_noise(x0, z, t))
        return Reparametrised(self.student, TRIG)(u, t, told).x0

    def judged(self, u: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """D's logits ``[B, N]`` of noised data, in the base's own units."""
        time, scale = match_snr(s, TRIG, self.base.process)
        return self.discriminator.logits(self.base, expand(scale, u) * u, time, cond)

    def sampler(self) -> FewStepSampler:
        return taking(self.options.steps, self.options, self.teacher.process)

    @classmethod
    def also(cls, options: Options, process: Process) -> dict[str, Sampler]:
        """The numbers of steps that the sampler does not take."""
        return by_steps(options.steps, ANGLES, lambda steps: taking(steps, options, process))


def taking(steps: int, options: SanaSprint.Options, process: Process) -> FewStepSampler:
    """A sampler of so many steps."""
    times = (1.0, *(share_at(process, math.cos(t), math.sin(t)) for t in ANGLES[steps][1:]))
    return ScaleFewStepSampler(times, scale=options.scale) if options.guidance else FewStepSampler(times)


def beside(rows: int, device: torch.device) -> Tensor:
    """For each of ``rows`` its neighbour, ``[rows]``: 0 and 1, 2 and 3, ... change places, whatever micro-batches a
    batch is split into; a last one without a neighbour stays."""
    return (torch.arange(rows, device=device) ^ 1).clamp(max=rows - 1)


def differing(cond: Cond) -> Tensor:
    """1 for rows ``[B]`` whose condition is not that of the row :func:`beside` them, else 0."""
    rows = len(next(iter(cond.values())))
    other = beside(rows, next(iter(cond.values())).device)
    same = torch.stack([(value == value[other]).reshape(rows, -1).all(1) for value in cond.values()]).all(0)
    return (~same).float()
