"""Flash-DMD: losses by noise level, a discriminator of pictures, a fake score that follows by average, and preferences
learnt while distillation goes on (arXiv 2511.20549)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import FewStepSampler, Renoise, approach, continued, few_step_times, rollout
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.evaluation.agreement import timed_agreement_for, trained_timed_agreement
from stillroom.losses import adversarial, preference, score
from stillroom.losses.preference import best_and_worst, dpo_loss, transition_loss
from stillroom.losses.rewards import named_reward
from stillroom.losses.score import FakeLoss, fake_score_loss, mean_abs_normaliser, score_difference_loss
from stillroom.method import Batch, Method, Optim, Paper, Stage, Target, Terms, Turn, frozen, register, turn, unfrozen
from stillroom.networks.discriminators import BlockFeatures, LatentDiscriminator, PictureDiscriminator
from stillroom.registry import named_function
from stillroom.surgery.lora import lora_role, take_over

AGREEMENT = "agreement"
PREFERENCE = "preference"
OWN = "autoencoder"
OF_TEACHER = "teacher"
CLEAN = 0.02  # noise over signal where a teacher's blocks are asked about a picture
OPTIM = Optim(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01, clip_norm=10.0)


@register(
    "flash-dmd",
    Paper(
        title="Flash-DMD: Towards High-Fidelity Few-Step Image Generation with Efficient Distillation and Joint "
        "Reinforcement Learning",
        arxiv="2511.20549",
        year=2025,
        venue="CVPR 2026",
    ),
)
class FlashDMD(Method):
    """DMD2's student of few steps for a fraction of the updates. The steps are cut in two. At a noisy one, reached as
    at inference, the student follows the difference of scores, and no discriminator:

        x0 = G(x_t, t, c),  t in H:    L_DM = < sg [D_f - D_r](F(x0)) / mean |x0 - D_r|, x0 > / numel    eq. 4

    From there its own sampler runs on without a gradient to a clean sample, which is noised to a late step; that one
    call more is judged, as a picture, by heads on a frozen encoder behind a frozen decoder V:

        y = G(F(sg B(x0)), t', c),  t' in L:    L_adv = w softplus(-disc(V(y)))

    so that what is coarse follows the teacher and what is fine the pictures. Without a discriminator distributions are
    matched at all steps. The fake score learns to denoise the student's samples and nothing else, in one or two updates
    for one of the student, and after each of these it moves towards it, ``psi <- lambda psi + (1 - lambda) theta``
    (eq. 11).

    Then (``rl_share``) preferences are learnt while the distillation goes on, one update of it for ``rl_turns`` of
    these. From a state z of a noisy step, k candidates of the next state are drawn and scored by a reward of noisy
    states; the best, w, and the worst, l, are a pair of

        L = -log sigmoid(beta H),                                                                   eq. 12
        H = log p(w | z) / p_ref(w | z) - log p(l | z) / p_ref(l | z),                              eq. 13
        p(z' | z) = N(alpha' x0(z), sigma'^2 I)

    p_ref: the student as the stage began. Log-ratios are means over elements.

    Departures: no code was released, and neither weights, lambda, beta, k nor the split are said: those here are
    reconstructions. The encoder is the model's own autoencoder's, or one that is named; the paper's is SAM's. The fake
    score's loss is taken in the teacher's own velocity space by default. Beside preferences the fake score is trained
    once with each update of distillation, whatever ``critic_turns``, and follows the student after every update.
    """

    health = {
        **score.HEALTH,
        "real_logit": "mean logit of the discriminator on real pictures: log odds of being real; 0: it cannot tell",
        "fake_logit": "the same on pictures of the student's late steps; far below where the discriminator wins",
        "sample_mean": "mean of all elements of a batch of the student's samples",
        "reward": "mean score of the candidates that preferences are taken from",
        "reward_gap": "mean difference in score of the best and the worst candidate of a state",
        "log_ratio": "mean of H, the logit of a pair over beta: 0 where the stage begins",
        "preference_accuracy": preference.HEALTH["preference_accuracy"],
    }

    @dataclass
    class Options:
        student_steps: int = field(default=4, metadata={"min": 1})  # N network calls at inference
        t_init: float = field(default=1.0, metadata={"above": 0, "max": 1})  # of the first call
        # Of the N times towards noise, s u / (1 + (s - 1) u): a flow's own shift; 1: evenly spaced
        step_shift: float = field(default=1.0, metadata={"above": 0})
        guidance: float = 1.0  # on the teacher only
        critic_turns: int = field(default=1, metadata={"min": 1})  # critic updates per student update (TTUR): 1 or 2
        coupling: float = field(default=0.97, metadata={"min": 0, "max": 1})  # lambda; 1: no coupling. R
        # split: matching at noisy steps, the discriminator at late ones; summed: both at every step, as DMD2
        placement: Literal["split", "summed"] = "split"
        split: float = field(default=0.5, metadata={"min": 0, "max": 1})  # of the range: later steps are below it. R
        gan_weight: float = field(default=5e-3, metadata={"min": 0})  # w; 0: no discriminator, and no real data. R
        # autoencoder: of the model itself, where it has one that decodes with a graph, else the teacher's blocks;
        # teacher: these; or package.module:function that returns a module, pictures to a list of feature maps
        encoder: str = OWN
        crop: int = field(default=0, metadata={"min": 0})  # side of the part that is decoded, in latents; 0: all
        gan_rate: float = field(default=1.0, metadata={"min": 0})  # of the heads' learning rate, over the critic's
        generator_times: TimeLaw = TimeLaw("uniform", 0.02, 0.98)
        critic_times: TimeLaw = TimeLaw("uniform", 0.001, 1.0)  # 0 itself has no eps to predict
        fake_loss: FakeLoss = "v"
        renoise: Renoise = "fresh"
        rl_share: float = field(default=0.0, metadata={"min": 0, "max": 1})  # of the steps, with preferences
        rl_turns: int = field(default=5, metadata={"min": 0})  # updates by preferences for one of distillation; 0: all
        rl_steps: Literal["high", "all"] = "high"  # where pairs are taken from: noisy steps, or all but the last
        candidates: int = field(default=4, metadata={"min": 2})  # k. R
        beta: float = field(default=100.0, metadata={"above": 0})  # R
        reward: str = AGREEMENT  # with class or text, learnt from noised data; or package.module:function of your own
        # What a reward of your own is shown: states, z and conditions with "time", the share of the range ``[B]``; or
        # predictions, what the student makes of z, decoded where that can be
        rewarded: Literal["states", "predictions"] = "states"
        reward_steps: int = field(default=600, metadata={"min": 1})  # of the network that judges agreement

        @property
        def distilled(self) -> bool:
            """Whether distillation goes on beside preferences."""
            return self.rl_share > 0 and self.rl_turns > 0

        @property
        def distil_every(self) -> int:
            """How steps from one update of distillation to the next, beside preferences."""
            return max(self.rl_turns, 1)

    options: Options
    discriminator: Any
    reference: Any
    encoder: Any
    autoencoder: Any
    agreement: Any

    def build(
        self,
        teacher: Denoiser,
        student: Denoiser | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        autoencoder: nn.Module | None = None,
    ) -> None:
        o = self.options
        self.times = few_step_times(o.student_steps, o.t_init, o.step_shift)
        self.high = [k for k, t in enumerate(self.times) if t > o.split] if o.placement == "split" else []
        self.low = [k for k in range(len(self.times)) if k not in self.high]
        self._check()
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.fake = self.clone(teacher, "fake")
        if o.coupling < 1:
            self._check_coupling()
        self.asks = named_reward(o.reward) if o.reward != AGREEMENT else None
        self.decode, self.autoencoder = decode, None
        self.encoder, self.discriminator = None, nn.Identity()
        if o.gan_weight:
            self._look(autoencoder)
        self.reference = self._copy() if o.rl_share else None

    def _check(self) -> None:
        o = self.options
        if o.placement == "split" and o.gan_weight and not (self.high and self.low):
            steps = ", ".join(f"{t:.3g}" for t in self.times)
            raise UserError(
                f"options.split={o.split:g} leaves all of the steps {steps} on one side",
                cure="choose a number between two of them, or options.placement=summed",
            )
        if o.placement == "split" and not self.high:
            raise UserError(f"options.split={o.split:g} leaves no noisy step", cure="make it smaller")
        if o.rl_share and not self.paired:
            raise UserError(
                "preferences need a step with another after it", cure="set options.student_steps to 2 or more"
            )
        if o.renoise != "fresh" and (o.rl_share or (o.placement == "split" and o.gan_weight)):
            raise UserError(
                f"options.renoise={o.renoise}, but late steps and preferences are learnt for fresh noise at each step",
                cure="options.renoise=fresh, or options.placement=summed without preferences",
            )

    def _check_coupling(self) -> None:
        """Raises UserError for a student whose weights mean something else than the fake score's."""
        shapes = [[p.shape for p in self.trained_parameters(role).values()] for role in ("fake", "student")]
        mine, theirs = (
            f"{type(one.network).__name__} that predicts {one.prediction} on {one.process.name}"
            for one in (self.fake, self.student)
        )
        if mine != theirs or shapes[0] != shapes[1]:
            what = theirs if mine != theirs else "student of other trained weights"
            raise UserError(
                f"the fake score, a {mine}, cannot follow a {what}",
                cure="start from a student of the teacher's kind, train both as the same adapters or neither, or set "
                "options.coupling=1",
            )

    def _look(self, autoencoder: nn.Module | None) -> None:
        """Whose features the discriminator reads."""
        o, teacher = self.options, self.teacher
        if o.encoder == OF_TEACHER or (o.encoder == OWN and autoencoder is None):
            self.discriminator = LatentDiscriminator(teacher)
            return
        if o.encoder == OWN:
            assert autoencoder is not None
            self.autoencoder = frozen(autoencoder)
            self.encoder = BlockFeatures(self.autoencoder.encoder)
        else:
            cure = "for example options.encoder=my_package.encoders:make, which returns a module"
            self.encoder = frozen(named_function(o.encoder, "options.encoder", cure)())
            self.autoencoder = None if autoencoder is None else frozen(autoencoder)
        weight = next(teacher.parameters())
        self.discriminator = PictureDiscriminator(self.encoder, self.pictures(weight.new_zeros(1, *teacher.shape)))

    def _copy(self) -> Denoiser:
        """The student as preferences begin; no turn trains it."""
        if "student" in self.lora:
            made: Denoiser = lora_role(self.teacher, "reference", **self.lora["student"])
            take_over(made, self.student)
            return made
        return unfrozen(copy.deepcopy(self.student)).eval()

    @property
    def matched(self) -> list[int]:
        """The steps where distributions are matched: noisy ones, or all where no discriminator has the others."""
        return self.high if self.high and self.options.gan_weight else list(range(len(self.times)))

    @property
    def paired(self) -> list[int]:
        """The steps whose states pairs are taken from."""
        steps = self.high if self.options.rl_steps == "high" and self.high else range(len(self.times))
        return [k for k in steps if k + 1 < len(self.times)]

    def teachers(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def followers(self) -> Mapping[str, Target]:
        """The coupling of the fake score, which is trained as well."""
        return {"fake": Target("student", self.options.coupling)} if self.options.coupling < 1 else {}

    def rate(self, turn: Turn, name: str) -> float:
        return self.options.gan_rate if name.startswith("discriminator.") else 1.0

    def prepare(self, data: Any) -> None:
        """The reward of noisy states learns agreement from the data's own pairs, where none is named."""
        o, teacher = self.options, self.teacher
        if not o.rl_share or self.asks is not None:
            return
        weight, shape = next(teacher.parameters()).detach(), tuple(teacher.shape)
        if type(weight) is not Tensor:  # a plan's, which have no values
            judge = timed_agreement_for(data, data.batch(0, 0, 2)["cond"], shape)
        else:
            judge = trained_timed_agreement(data, shape, o.reward_steps, teacher.process)
        self.agreement = frozen(judge.to(weight.device))

    # --- stages ---------------------------------------------------------------------------------------------------
    def stages(self) -> tuple[Stage, ...]:
        share, own = self.options.rl_share, {"own_schedule": True, "fresh_optimizer": True}
        found = (
            Stage("distillation", ("generator", "critic"), 1 - share, **own),
            Stage(PREFERENCE, ("distil", "follow", "prefer"), share, **own),
        )
        return tuple(stage for stage in found if stage.share > 0)

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        if stage.kind == PREFERENCE and not resumed:
            take_over(self.reference, self.student)

    # --- distillation ---------------------------------------------------------------------------------------------
    def noised(self, x: Tensor, law: TimeLaw) -> tuple[Tensor, Tensor, Tensor]:
        """``(F(x), t, eps)``: ``alpha x + sigma eps`` with fresh noise and a time of this law."""
        t, eps = law.sample(self.draw, self.teacher.process).to(x), self.draw.normal_like(x)
        return self.teacher.process.add_noise(x, eps, t), t, eps

    def one_of(self, steps: list[int]) -> int:
        """A step for the whole batch."""
        return steps[self.draw.index(len(steps))] if len(steps) > 1 else steps[0]

    def sample_student(self, batch: Batch, grad: bool) -> tuple[Tensor, int]:
        """``x0 = G(x_t, t, c)`` at one of the steps where distributions are matched, reached as at inference; and which
        step it is."""
        k, renoise = self.one_of(self.matched), self.options.renoise
        return rollout(self.student, self.draw, batch["cond"], self.times, grad=grad, last=k, renoise=renoise), k

    def late(self, x0: Tensor, k: int, cond: Cond) -> Tensor:
        """``y``: one call, with a graph, at a late step, of the student's own clean sample noised to it."""
        clean = continued(self.student, self.draw, cond, x0.detach(), self.times[k + 1 :])
        t = clean.new_full((), self.times[self.one_of(self.low)] * self.student.process.t_max)
        return self.student(self.student.process.add_noise(clean, self.draw.normal_like(clean), t), t, cond).x0

    def pictures(self, latents: Tensor) -> Tensor:
        """What the encoder is shown: pictures, or samples as they are where there is nothing to decode."""
        return latents if self.decode is None else self.decode(latents)

    def part(self, x: Tensor) -> Tensor:
        """The part of latents that is decoded: a square at a place that the batch shares."""
        side = self.options.crop
        if not side or x.ndim < 4:
            return x
        for axis in (-2, -1):
            left = x.shape[axis] - side
            if left > 0:
                x = x.narrow(axis, self.draw.index(left + 1), side)
        return x

    def judged(self, x: Tensor, cond: Cond) -> Tensor:
        """Logits of samples ``[B, ...]``, by their pictures, with a graph."""
        if self.encoder is None:
            t = self.teacher.process.time_of(x.new_ones(()), x.new_full((), CLEAN))
            return self.discriminator.logits(self.teacher, x, t, cond)
        return self.discriminator.logits(self.encoder(self.pictures(self.part(x))))

    @turn(trains="student", every="critic_turns", optim=OPTIM)
    def generator(self, batch: Batch) -> Terms:
        """``L_DM`` at a noisy step, ``w L_adv`` at a late one."""
        o, cond = self.options, batch["cond"]
        x0, k = self.sample_student(batch, grad=True)
        fixed = x0.detach()
        self.shared["x0"] = fixed
        x_t, t, _ = self.noised(fixed, o.generator_times)
        with torch.no_grad():
            real, fake = self.teacher(x_t, t, cond, o.guidance).x0, self.fake(x_t, t, cond).x0
        weight = mean_abs_normaliser(x0, real) / x0[0].numel()
        terms: dict[str, Any] = {"dm": score_difference_loss(x0, fake, real, di=1.0, weight=weight)}
        self.note("score_gap", (fake - real).square().mean())
        self.note("sample_std", fixed.std())
        self.note("sample_mean", fixed.mean())
        if o.gan_weight:
            y = self.late(fixed, k, cond) if self.high else x0
            self.shared["y"] = y.detach()
            terms["gan"] = o.gan_weight * adversarial.generator_loss(self.judged(y, cond)).mean()
        return terms

    @turn(trains=("fake", "discriminator"), optim=OPTIM)
    def critic(self, batch: Batch) -> Terms:
        """The fake score denoises the student's samples; where the student was updated, the discriminator learns to
        tell its pictures from real ones."""
        o, cond = self.options, batch["cond"]
        x0 = self.shared.get("x0")
        if x0 is None:
            x0 = self.sample_student(batch, grad=False)[0]
        x_t, t, eps = self.noised(x0, o.critic_times)
        terms: dict[str, Any] = {"denoise": fake_score_loss(self.fake(x_t, t, cond), x0, eps, o.fake_loss)}
        self.note("fake_error", terms["denoise"])
        if (y := self.shared.get("y")) is not None:

            def told(x: Tensor, real: bool) -> Tensor:
                logits = self.judged(x, cond)
                self.note("real_logit" if real else "fake_logit", logits.mean())
                return adversarial.told(logits, real)

            terms["gan"] = lambda: told(y, False) + told(batch["x"], True)
        return terms

    # --- preferences ----------------------------------------------------------------------------------------------
    @turn(trains="student", every="distil_every", when="distilled", optim=OPTIM)
    def distil(self, batch: Batch) -> Terms:
        """What :meth:`generator` minimises, between preferences."""
        return self.generator(batch)

    @turn(trains=("fake", "discriminator"), every="distil_every", when="distilled", optim=OPTIM)
    def follow(self, batch: Batch) -> Terms:
        """What :meth:`critic` minimises, between preferences."""
        return self.critic(batch)

    def reward(self, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Scores ``[B]`` of states z at the time t."""
        share = (t / self.teacher.process.t_max).expand(len(z))
        if self.asks is None:
            return self.agreement(z, cond, share)
        if self.options.rewarded == "states":
            return self.asks(z, {**cond, "time": share})
        return self.asks(self.pictures(self.student(z, t, cond).x0), cond)

    @turn(trains="student", when="rl_share", optim=OPTIM)
    def prefer(self, batch: Batch) -> Terms:
        """Preference optimisation: of k next states of one state, the best against the worst."""
        o, cond, process = self.options, batch["cond"], self.student.process
        k = self.one_of(self.paired)
        z, t = approach(self.student, self.draw, cond, self.times, k, o.renoise)
        x0 = self.student(z, t, cond).x0
        s = x0.new_full((), self.times[k + 1] * process.t_max)
        alpha, sigma = process.alpha(s), process.sigma(s)
        with torch.no_grad():
            of_reference = alpha * self.reference(z, t, cond).x0
            noises = torch.stack([self.draw.normal_like(x0) for _ in range(o.candidates)])
            following = alpha * x0.detach() + sigma * noises
            scores = torch.stack([self.reward(one, s, cond) for one in following])
            best, worst = best_and_worst(following, scores)
            held = transition_loss(best, of_reference, sigma), transition_loss(worst, of_reference, sigma)
        own = transition_loss(best, alpha * x0, sigma), transition_loss(worst, alpha * x0, sigma)
        found = dpo_loss(own[0], own[1], held[0], held[1], o.beta)
        self.note("reward", scores.mean())
        self.note("reward_gap", (scores.amax(0) - scores.amin(0)).mean())
        self.note("log_ratio", found.health["margin"] / o.beta)
        self.note("preference_accuracy", found.health["preference_accuracy"])
        return found.terms

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.times, self.options.renoise)
