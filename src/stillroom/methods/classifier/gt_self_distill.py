"""Self-distillation with weighted ground truth (arXiv 2102.13088)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.augment.images import moved_and_flipped
from stillroom.errors import UserError
from stillroom.losses.soft_labels import least_squares_mix, norm_penalty, probability_mse
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn, unfrozen
from stillroom.networks.recognition import ForwardPass, class_logits
from stillroom.surgery.initial import fresh_weights, overwrite


@register(
    "gt-self-distill",
    Paper(
        title="Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by "
        "Self-Distillation",
        arxiv="2102.13088",
        year=2021,
        venue="NeurIPS 2021",
        code="Kennethborup/self_distillation",
    ),
)
class GTSelfDistill(Method):
    """A classifier is trained again and again, each time from new weights, on a mix of the labels and the last
    classifier's probabilities. Without labels the regularisation of the rounds adds up until the fit collapses; with
    them it stays bounded.

    In round t, with p the student's softmax, q that of round t - 1's student, y one-hot and g the weight of the labels
    (``gt_weight``, the paper's alpha), mse a mean over the batch and the classes:

        L_1 = mse(p, y) + c sum_W |W|                                    W: all parameter tensors; norms, not squared
        L_t = g mse(p, y) + (1 - g) mse(p, sg q) + c sum_W |W|           t = 2, 3, ...
        g   = <Y - P_0, P_1 - P_0> / |P_1 - P_0|^2, clipped to [0, 1]    ``gt_weight: estimate``

    P_1 and P_0 are held-out probabilities of round 1's student and of a probe, a student of round t that learns from
    the teacher alone. For a model linear in its targets that g has the least held-out error.

    :class:`~stillroom.networks.kernel_self_distillation.KernelSelfDistillation` is the paper's theory as an estimator:
    for kernel ridge regression every round, its limit and the best weight are exact, and no round is computed by
    fitting.

    Departures: how the weight is estimated for deep networks is reconstructed (``parts["heldout"]`` is read); the
    teacher is kept in evaluation mode.
    """

    health = {
        "accuracy": "share of a batch for which argmax p is the label",
        "teacher_agreement": "share of a batch for which argmax p is argmax q",
        "gt_weight": "weight of the labels in this stage: 1 in round 1, 0 in a probe",
    }

    task = "classify"

    @dataclass
    class Options:
        rounds: int = field(default=5, metadata={"min": 1})  # trainings in all; the first is on the labels alone
        gt_weight: float | Literal["estimate"] = field(default=0.6, metadata={"min": 0, "max": 1})  # of the labels
        start: Literal["random", "given", "last"] = "random"  # weights of a round: new, the given ones, the last's
        penalty: float = field(default=1e-4, metadata={"min": 0})  # on the sum of the parameter tensors' norms
        shift: int = field(default=0, metadata={"min": 0})  # pixels that images are moved by; the paper's code: 4
        flip: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability of a mirrored image; there: 0.5

    options: Options
    architecture: nn.Module
    weight: Tensor  # of the labels in this stage
    by_truth: Tensor  # held-out probabilities of round 1, [N, classes]

    def build(self, student: nn.Module, teachers: Sequence[nn.Module] = ()) -> None:
        if teachers:
            raise UserError(
                f"gt-self-distill is its own teacher, {len(teachers)} were given",
                cure="name the student's network alone",
            )
        self.student = unfrozen(copy.deepcopy(student))
        # Not frozen(): its weights are those that training had reached, which a checkpoint must keep.
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        # A plain example of the network, no role of the method, so that it stays whole where the roles are sharded.
        object.__setattr__(self, "architecture", copy.deepcopy(student))
        if self.options.start == "given":
            self.given = frozen(copy.deepcopy(student))
        self.register_buffer("weight", torch.ones(()))

    @classmethod
    def begins(cls, options: Any) -> Literal["given", "new", "teacher"]:
        return "new" if options.start == "random" else "given"

    def teachers(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher}

    @torch.no_grad()
    def prepare(self, data: Any) -> None:
        if self.options.gt_weight != "estimate" or self.options.rounds == 1:
            return
        if "heldout" not in getattr(data, "parts", {}):
            raise UserError(
                "options.gt_weight=estimate needs held-out data", cure="give the data a part 'heldout', or a number"
            )
        self.heldout = data.parts["heldout"]
        self.register_buffer("by_truth", self.heldout_probabilities())

    def stages(self) -> tuple[Stage, ...]:
        """Rounds of equal length, each with a schedule and an optimizer of its own; before each but the first, if the
        weight is to be estimated, a probe that is taught by the teacher alone."""
        kinds = ("probe", "round") if self.options.gt_weight == "estimate" else ("round",)
        plan = [("round", 1), *((kind, number) for number in range(2, self.options.rounds + 1) for kind in kinds)]
        return tuple(
            Stage(f"{kind} {number}", own_schedule=True, fresh_optimizer=True, kind=kind, round=number)
            for kind, number in plan
        )

    @torch.no_grad()
    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        """Teacher <- student, student <- new weights; g of this stage."""
        if resumed or stage.round == 1:
            return
        estimate = self.options.gt_weight == "estimate"
        if stage.kind == "probe" or not estimate:
            if estimate and stage.round == 2:
                self.by_truth.copy_(self.heldout_probabilities())
            self.teacher.load_state_dict(self.student.state_dict())
            self.teacher.eval()
        if stage.kind == "probe":
            weight = 0.0
        elif estimate:
            truth = F.one_hot(self.heldout.labels, self.by_truth.shape[1]).to(self.by_truth)
            weight = least_squares_mix(self.heldout_probabilities(), self.by_truth, truth)
        else:
            weight = float(self.options.gt_weight)
        self.weight.fill_(weight)
        if self.options.start == "random":
            overwrite(self.student, fresh_weights(self.architecture, self.draw.index(2**31)))
        elif self.options.start == "given":
            self.student.load_state_dict(self.given.state_dict())
        elif estimate and stage.kind == "round":  # the last round's student, now the teacher; not the probe
            self.student.load_state_dict(self.teacher.state_dict())

    def heldout_probabilities(self) -> Tensor:
        """``[N, classes]`` of the student as it stands."""
        self.student.eval()
        images = self.heldout.images().split(256)
        device = self.weight.device
        return torch.cat([class_logits(self.student, part.to(device)).softmax(-1) for part in images])

    @turn(trains="student", optim=Optim(lr=1e-3, name="adam"))
    def match(self, batch: Batch) -> Terms:
        """``L_t``, all softmax outputs at temperature 1."""
        o, label = self.options, batch["cond"]["label"]
        images = moved_and_flipped(batch["x"], self.draw, o.shift, o.flip)
        p = class_logits(self.student, images).softmax(-1)
        terms = {"truth": self.weight * probability_mse(p, F.one_hot(label, p.shape[-1]).to(p))}
        if self.stage.round > 1:
            with torch.no_grad():
                t = class_logits(self.teacher, images).softmax(-1)
            terms["teacher"] = (1 - self.weight) * probability_mse(p, t)
            self.note("teacher_agreement", (p.argmax(-1) == t.argmax(-1)).float().mean())
        if o.penalty:
            terms["norms"] = o.penalty * norm_penalty(self.student.parameters())
        self.note("gt_weight", self.weight)
        self.note("accuracy", (p.argmax(-1) == label).float().mean())
        return terms

    def sampler(self) -> ForwardPass:
        return ForwardPass()
