"""BOOT: one step from noise and prompts alone, by bootstrapping the teacher's path in time (arXiv 2306.05544)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.data.trajectories import Paths, Trajectories, paths_for
from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import expand
from stillroom.diffusion.sampling import FewStepSampler, SignalSampler, signal
from stillroom.errors import UserError
from stillroom.losses.score import denoising_loss
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn
from stillroom.surgery.modules import device_of, evaluating

ADAM = Optim(lr=1e-4, name="adam", betas=(0.9, 0.999), clip_norm=1.0)
ROWS = 256
"""Of paths to measure on, at a time."""


@register(
    "boot",
    Paper(
        title="BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping",
        arxiv="2306.05544",
        year=2023,
        venue="ICML 2023 workshop",
    ),
)
class BOOT(Method):
    """A student that maps a path's first noise and a time to the signal of that path at that time; at the last time it
    is a one-step generator. Needs conditions alone: no image is read, none is stored.

    With x_t = alpha_t y_t + sigma_t eps, eps the noise that the path began with and f the teacher's x0-prediction, the
    signal y obeys the signal-ODE, of which one exact DDIM step from t to s = t - delta is

        y_s = y_t + k (f(x_t, t) - y_t),    k = 1 - (alpha_t sigma_s) / (sigma_t alpha_s)
        L_BS = |y(eps, s) - sg[y + k (f(alpha_t y + sigma_t eps, t) - y)]|^2 / k^2,  y = sg y(eps, t)
        L_BC = |y(eps, T) - f(sigma_T eps, T)|^2                                                    the boundary
        L    = L_BS + beta L_BC

    with t uniform from the first step on. The perfect student is deterministic DDIM on a grid of delta.

    Departures: weights 1 / k^2 are bounded by ``most``; the body of the paper could not be read, so rates and delta are
    those of another implementation, and the weight of the boundary, 1, is ours (0.1 there, on velocities); the distance
    is the squared one, not LPIPS. The student reads its output as the teacher does at T, whatever its time is told, so
    that at T it begins as the teacher's own first step; where the teacher predicts noise, which a small alpha_T would
    divide, the output is the signal itself, and the student first learns to say that step, whatever the time
    (``begin_share``).
    """

    health = {
        "residual": "mean squared error of a bootstrapped step over elements, before its weight; over k^2 it is the "
        "residual of the signal-ODE",
        "end_gap": "mean squared difference between the student's one step and the teacher's many steps from the same "
        "noise, on paths that are not learnt from",
        "end_share": "end_gap over what the teacher's own single step has there: 1 where nothing is gained on it",
    }

    @dataclass
    class Options:
        delta: float = field(default=0.05, metadata={"above": 0, "below": 1})  # a bootstrap step, as a share of t_max
        low: float = field(default=0.01, metadata={"min": 0, "below": 1})  # the last time, as a share of t_max
        high: float = field(default=0.99, metadata={"above": 0, "max": 1})  # T
        beta: float = field(default=1.0, metadata={"min": 0})  # of the boundary, on signals
        most: float = field(default=1000.0, metadata={"above": 0})  # of 1 / k^2
        guidance: float = 1.0  # on the teacher
        # of the steps, beside a teacher of noise: what the student learns before it bootstraps
        begin_share: float = field(default=0.05, metadata={"min": 0, "below": 1, "later": True})
        clip: float = field(default=0.0, metadata={"min": 0})  # of the teacher's x0 to +-this; 0: none
        solver: Literal["euler", "heun"] = "euler"  # heun: the mean of the teacher's x0 at both ends of a step
        # Times are told backwards, low as high: the finished student is asked at ``high``, as a pipeline of diffusers
        # asks for one step.
        flipped: bool = False
        # Ablations: the state x_t in place of the signal; times from T down in the course of the training; regression
        # on so many stored pairs of noise and the teacher's end, instead of bootstrapping.
        predicts: Literal["signal", "state"] = "signal"
        progressive: bool = False
        progressive_share: float = field(default=1.0, metadata={"above": 0, "max": 1, "later": True})  # of the training
        # what errors of a student of the state are weighed in: of the signal, which divides them by alpha_s, or as is
        state_errors: Literal["signal", "state"] = field(default="signal", metadata={"later": True})
        pairs: int = field(default=0, metadata={"min": 0})
        pair_steps: int = field(default=20, metadata={"min": 1})
        held_out: int = field(default=0, metadata={"min": 0})  # paths to measure on; 0: none
        held_out_steps: int = field(default=50, metadata={"min": 1})
        measure_every: int = field(default=100, metadata={"min": 1})  # steps

        @property
        def bootstraps(self) -> bool:
            return not self.pairs

    options: Options

    def build(self, teacher: Denoiser, student: Denoiser | None = None) -> None:
        o = self.options
        if teacher.prediction == "edm":
            raise UserError(
                "boot reads a network's output at one time alone, and EDM's preconditioning changes it with the time",
                cure="give a teacher of a VP process or of a flow",
            )
        if o.low + o.delta >= o.high:
            raise UserError(
                f"options.low={o.low:g}, delta={o.delta:g} and high={o.high:g} leave no times",
                cure="a smaller delta, or low and high farther apart",
            )
        if o.flipped and o.predicts == "state":
            raise UserError("options.flipped is of students of the signal", cure="options.predicts=signal")
        self.teacher = frozen(teacher)
        self.student = self.clone(student or teacher, "student")
        self.begun = 0.0
        if self.student.prediction == "eps":
            self.student.prediction = "x0"
            self.begun = o.begin_share if o.bootstraps else 0.0

    def stages(self) -> tuple[Stage, ...]:
        if not self.begun:
            return (Stage("train"),)
        first = Stage("begin", ("begin",), self.begun, own_schedule=True)
        return first, Stage("train", ("bootstrap",), 1 - self.begun, own_schedule=True)

    def prepare(self, data: Any) -> None:
        """Pairs for the ablation, and paths to measure on, for conditions of the data."""
        o = self.options
        self.found: Trajectories | None = self._ends(data, o.pairs, o.pair_steps, 0) if o.pairs else None
        self.others: Trajectories | None = self._ends(data, o.held_out, o.held_out_steps, 1) if o.held_out else None
        self._measured = -1  # the last step that was

    def _ends(self, data: Any, count: int, steps: int, seed: int) -> Trajectories:
        w = self.options.guidance
        paths = Paths(count, steps, low=w, high=w, seed=seed, keep="ends", precision="float32")
        return paths_for(data, self.teacher, paths, batch=512)

    # --- the student ------------------------------------------------------------------------------------------------
    def at(self, share: Tensor) -> Tensor:
        """A share of t_max as a time."""
        return share * self.teacher.process.t_max

    def said(self, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the student says of noise ``eps`` and times ``t [B]``: the signal, or the state."""
        o = self.options
        told = self.at(t.new_tensor(o.low + o.high)) - t if o.flipped else t
        return signal(self.student, eps, told, cond, o.high)

    def top(self, like: Tensor) -> Tensor:
        """T, ``[B]``."""
        return like.new_full((len(like),), self.options.high * self.teacher.process.t_max)

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        process = self.teacher.process
        return expand(process.alpha(t), like), expand(process.sigma(t), like)

    def taught(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The teacher's x0."""
        p: Prediction = self.teacher(x_t, t, cond, self.options.guidance)
        return p.x0.clamp(-self.options.clip, self.options.clip) if self.options.clip else p.x0

    def noise(self) -> Tensor:
        return self.draw.normal(self.draw.local, *self.teacher.shape).to(device_of(self.teacher))

    # --- the losses -------------------------------------------------------------------------------------------------
    @turn(trains="student", optim=ADAM, when="begun")
    def begin(self, batch: Batch) -> Terms:
        """A new output that says the teacher's first step, at all times."""
        o, cond, eps = self.options, batch["cond"], self.noise()
        t = self.at(o.low + (o.high - o.low) * self.draw.uniform(len(eps)).to(eps))
        self.measure()
        return {"begin": self.distance_to_first(eps, t, cond)}

    @turn(trains="student", optim=ADAM, when="bootstraps")
    def bootstrap(self, batch: Batch) -> Terms:
        """``L_BS + beta L_BC``."""
        o, cond, eps = self.options, batch["cond"], self.noise()
        u = self.draw.uniform(len(eps)).to(eps)
        room = o.high - o.low - o.delta
        done = max(0.0, self.progress - self.begun) / (1 - self.begun)
        reach = min(done / o.progressive_share + o.delta, 1.0) if o.progressive else 1.0
        t, s = self.at(o.high - room * reach * u), self.at(o.high - room * reach * u - o.delta)
        with torch.no_grad():
            target, k = self.target(eps, t, s, cond)
        error = self.said(eps, s, cond) - target
        if o.predicts == "state" and o.state_errors == "signal":
            error = error / self.rates(s, eps)[0]
        self.note("residual", error.square().mean())
        weight = (1 / k.square()).clamp(max=o.most).flatten()
        terms = {"bootstrap": denoising_loss(error, torch.zeros_like(error), weight)}
        if o.beta:
            terms["boundary"] = o.beta * self.boundary(eps, cond)
        self.measure()
        return terms

    def target(self, eps: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """What the student is to say at ``s``, and k ``[B, 1, ...]``: one step of the signal-ODE from what it says at
        ``t``."""
        (alpha, sigma), (alpha_s, sigma_s) = self.rates(t, eps), self.rates(s, eps)
        k = 1 - (alpha * sigma_s) / (sigma * alpha_s)
        said = self.said(eps, t, cond)
        if self.options.predicts == "state":  # the same step, in x: no division by alpha_t
            f = self.taught(said, t, cond)
            return sigma_s / sigma * said + (alpha_s - alpha * sigma_s / sigma) * f, k
        f = self.taught(alpha * said + sigma * eps, t, cond)
        after = said + k * (f - said)
        if self.options.solver == "heun":  # the mean of f: the rest of a step is exact in k already
            again = self.taught(alpha_s * after + sigma_s * eps, s, cond)
            after = said + k * ((f + again) / 2 - said)
        return after, k

    def boundary(self, eps: Tensor, cond: Cond) -> Tensor:
        """``L_BC``, at T."""
        return self.distance_to_first(eps, self.top(eps), cond)

    def distance_to_first(self, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Of what the student says at ``t`` from the signal, or the state, of the teacher's first step."""
        alpha, sigma = self.rates(t, eps)
        with torch.no_grad():
            f = self.first_step(eps, cond)
            wanted = f if self.options.predicts == "signal" else alpha * f + sigma * eps
        return denoising_loss(self.said(eps, t, cond), wanted)

    def first_step(self, eps: Tensor, cond: Cond) -> Tensor:
        """The teacher's x0 of noise alone."""
        top = self.top(eps)
        return self.taught(self.rates(top, eps)[1] * eps, top, cond)

    @turn(trains="student", optim=ADAM, when="pairs")
    def regress(self, batch: Batch) -> Terms:
        """Stored pairs: ``|y(eps, t_min) - x0|^2``."""
        assert self.found is not None
        noise, end, cond = self.of_paths(self.found, self.draw.integers(self.found.n).cpu())
        loss = (self.jumped(noise, cond) - end).square().mean()
        self.measure()
        return {"pairs": loss}

    def of_paths(self, found: Trajectories, rows: Tensor) -> tuple[Tensor, Tensor, Cond]:
        """Noises, ends and conditions of paths ``rows``."""
        device = device_of(self.teacher)
        cond = {name: value[rows].to(device) for name, value in found.cond.items()}
        noise, end = (part[rows].float().to(device) for part in (found.noise, found.end))
        return noise, end, cond

    def jumped(self, noise: Tensor, cond: Cond) -> Tensor:
        """The signal at ``low``: the student's one step."""
        t = self.at(noise.new_full((len(noise),), self.options.low))
        said = self.said(noise, t, cond)
        if self.options.predicts == "state":
            alpha, sigma = self.rates(t, noise)
            said = (said - sigma * noise) / alpha
        return said

    @torch.no_grad()
    def measure(self) -> None:
        """The student's one step, and the teacher's, on paths that are not learnt from: once in a step."""
        due = (self.step + 1) % self.options.measure_every == 0 and self.step != self._measured
        if self.others is None or not due:
            return
        self._measured = self.step
        own, theirs = [], []
        with evaluating(self.student):
            for rows in torch.arange(self.others.n).split(ROWS):
                noise, end, cond = self.of_paths(self.others, rows)
                own.append((self.jumped(noise, cond) - end).square().flatten(1).mean(1))
                theirs.append((self.first_step(noise, cond) - end).square().flatten(1).mean(1))
        self.note("end_gap", torch.cat(own).mean())
        self.note("end_share", torch.cat(own).mean() / torch.cat(theirs).mean())

    def sampler(self) -> SignalSampler | FewStepSampler:
        o = self.options
        return FewStepSampler((o.high,)) if o.flipped else SignalSampler(o.low, o.high, o.predicts)
