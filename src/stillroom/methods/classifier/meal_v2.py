"""MEAL V2: a classifier improved by the soft labels of a teacher ensemble alone (arXiv 2009.08453)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.augment.images import Augmentation, cutmix_shares, moved_and_flipped
from stillroom.data.outputs import Views, stored_outputs
from stillroom.errors import UserError
from stillroom.losses.adversarial import logit_discrimination
from stillroom.losses.soft_labels import ensemble_probabilities, soft_cross_entropy
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn, unfrozen
from stillroom.networks.critics import LogitDiscriminator
from stillroom.networks.recognition import ForwardPass, class_logits
from stillroom.surgery.initial import fresh_weights
from stillroom.surgery.modules import weights_hash

OPTIM: dict[str, Any] = {"name": "sgd", "betas": (0.9, 0.0)}


@register(
    "meal-v2",
    Paper(
        title="MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
        arxiv="2009.08453",
        year=2020,
        code="szq0214/MEAL-V2",
    ),
)
class MEALV2(Method):
    """A trained classifier goes on learning from the mean probabilities of an ensemble of teachers instead of labels.
    A small discriminator between the student's logits and the teachers' mean logits regularises it: student and
    discriminator descend the same loss, there is no game.

    With S(x) the student's logits and T_k(x) those of K teachers, and D the discriminator's two logits:

        p_e   = sg 1/K sum_k softmax(T_k(x)),    m = sg 1/K sum_k T_k(x)       probabilities for S, logits for D
        L_sim = -mean sum_c p_e,c log softmax(S(x))_c                          no labels
        L_D   = mean BCE(D(u), v) over rows u of S(x), v = (1, 0), and of m, v = (0, 1)
        L     = L_sim + L_D                                                    minimised by S and D alike

    In L_D the student's logits keep their gradient, and its sign is not turned.

    The student is trained on labels already, or ``init_share`` trains it. Without teachers, ``teachers`` copies of the
    student's architecture are trained on labels first (``teach_share``). With ``stored`` (the authors' later, faster
    variant, FKD) the teachers are asked once, about ``views`` of every image, and training reads their answers; a batch
    that CutMix mixes is then labelled by the mixture of its targets.

    Departures (from the paper's code): the discriminator has a learning rate of its own (there the student's overwrites
    it) and no ReLU after its last layer (``final_relu`` puts it back; the loss then cannot fall below 0.347); it is at
    least 16 wide.
    """

    health = {
        "teacher_agreement": "share of a batch for which argmax S(x) is argmax p_e",
        "target_entropy": "mean of -sum_c p_e,c log p_e,c in nats: the least that L_sim can reach",
    }

    task = "classify"

    @dataclass
    class Options:
        teachers: int = field(default=3, metadata={"min": 1})  # that are made where none are given
        # Shares of the steps; 0 leaves a stage out.
        teach_share: float = field(default=1.0, metadata={"min": 0})  # labels, for teachers that were not given
        init_share: float = field(default=1.0, metadata={"min": 0})  # labels, for the student; 0: it is trained
        distil_share: float = field(default=1.0, metadata={"min": 0})
        settle: float = field(default=0.44, metadata={"min": 0, "max": 1})  # last part of it, at a tenth of the rate
        ensemble: Literal["average", "random"] = "average"  # all teachers, or one of them per step
        gt_weight: float = field(default=0.0, metadata={"min": 0, "max": 1})  # of the labels; 1: labels alone
        discriminator: float = field(default=1.0, metadata={"min": 0})  # weight of its loss; 0: there is none
        final_relu: bool = False  # after the discriminator's last layer, as in the paper's code
        shift: int = field(default=0, metadata={"min": 0})  # pixels that images are moved by
        flip: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability of a mirrored image
        cutmix: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability of a mixed batch
        judged: Literal["logits", "probabilities"] = "logits"  # what the discriminator sees; FKD: probabilities
        views: int = field(default=0, metadata={"min": 0})  # in which an image is seen by teachers; 0: always new ones
        stored: str = ""  # folder that keeps what the teachers say of these views; written where it is not there
        stored_keep: int = field(default=0, metadata={"min": 0})  # logits of each that are kept; 0: all; FKD: 5
        stored_precision: Literal["float16", "float32"] = "float16"

    options: Options
    untaught = True  # whether the teachers are made and trained here

    def build(self, student: nn.Module, teachers: Sequence[nn.Module] = ()) -> None:
        o = self.options
        if teachers:
            self.ensemble = nn.ModuleList(frozen(copy.deepcopy(teacher)) for teacher in teachers)
        else:
            self.ensemble = nn.ModuleList(unfrozen(copy.deepcopy(student)) for _ in range(o.teachers))
            for teacher in self.ensemble:
                teacher.load_state_dict(fresh_weights(student, int(torch.randint(2**31, ()))))
        self.untaught = not teachers
        if self.untaught and not o.teach_share:
            raise UserError(
                "meal-v2 has no teachers", cure="name them: --teacher FOLDER,FOLDER; or set options.teach_share to 1"
            )
        if o.stored and self.untaught:
            raise UserError("options.stored is for teachers that are given", cure="name them, or leave it empty")
        if o.stored and not o.views:
            raise UserError("options.stored needs options.views", cure="8 views of each image, for example")
        self.augment = Views(Augmentation(shift=o.shift, flip=o.flip), o.views)
        self.student = unfrozen(copy.deepcopy(student))
        if not self.stages():
            raise UserError("every stage of meal-v2 has share 0", cure="set options.distil_share to 1, for example")

    @torch.no_grad()
    def prepare(self, data: Any) -> None:
        o = self.options
        if o.stored:
            name = "+".join(weights_hash(teacher) for teacher in self.ensemble)
            kept: dict[str, Any] = {"keep": o.stored_keep, "precision": o.stored_precision}
            self.store = stored_outputs(o.stored, self._all_logits, data, self.augment, name=name, **kept)
            self.ensemble = nn.ModuleList()
        if self.options.discriminator:
            rows = data.batch(0, 0, 2)["x"].to(next(self.student.parameters()).device)
            classes = class_logits(self.student, rows).shape[-1]
            self.discriminator = LogitDiscriminator(classes, self.options.final_relu).to(rows.device)

    def teachers(self) -> dict[str, nn.Module]:
        return {f"teacher-{i}": teacher for i, teacher in enumerate(self.ensemble, start=1)}

    def stages(self) -> tuple[Stage, ...]:
        """Labels for the teachers and for the student, where they are not trained; then soft labels."""
        o, distil = self.options, ("distil", "judge")
        every = (
            Stage("teach", ("teach",), o.teach_share if self.untaught else 0.0, own_schedule=True),
            Stage("init", ("init",), o.init_share, own_schedule=True),
            Stage("distil", distil, o.distil_share * (1 - o.settle)),
            Stage("settle", distil, o.distil_share * o.settle, lr=0.1),
        )
        return tuple(stage for stage in every if stage.share > 0)

    # --- labels -----------------------------------------------------------------------------------------------------
    def images(self, batch: Batch) -> Tensor:
        """Moved and mirrored; student and teachers see the same."""
        return moved_and_flipped(batch["x"], self.draw, self.options.shift, self.options.flip)

    @turn(trains="ensemble", optim=Optim(lr=0.05, **OPTIM), when=("untaught", "teach_share"))
    def teach(self, batch: Batch) -> Terms:
        """Teachers that were not given, on labels."""
        images, label = self.images(batch), batch["cond"]["label"]
        return {f"label_{k}": F.cross_entropy(class_logits(t, images), label) for k, t in enumerate(self.ensemble)}

    @turn(trains="student", optim=Optim(lr=0.05, **OPTIM), when="init_share")
    def init(self, batch: Batch) -> Terms:
        """The student's start, on labels: without a good one, labels matter again."""
        return {"label": F.cross_entropy(class_logits(self.student, self.images(batch)), batch["cond"]["label"])}

    # --- soft labels ------------------------------------------------------------------------------------------------
    def _all_logits(self, images: Tensor) -> dict[str, Tensor]:
        """``[B, K, classes]``: what is stored."""
        images = images.to(next(self.student.parameters()).device)
        return {"logits": torch.stack([class_logits(teacher, images) for teacher in self.ensemble], 1)}

    @torch.no_grad()
    def taught(self, images: Tensor, key: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``p_e``, the mean of the teachers' PROBABILITIES, and ``m``, of their logits, ``[B, classes]`` each. From the
        store, by image and view (``key``), where there is one."""
        if self.options.stored and key is not None:
            logits = self.store.read(*key)["logits"].to(images.device).unbind(1)
            if self.options.ensemble == "random":
                logits = (logits[self.draw.index(len(logits))],)
        else:
            teachers = list(self.ensemble)
            if self.options.ensemble == "random":
                teachers = [teachers[self.draw.index(len(teachers))]]
            logits = [class_logits(teacher, images) for teacher in teachers]
        return ensemble_probabilities(logits), torch.stack(list(logits)).mean(0)

    def viewed(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The batch in one of its numbered views, or in a new one; and the views' keys."""
        if not self.augment.count:
            return self.images(batch), None
        images, ids = batch["x"], batch["id"].cpu()
        numbers = (self.draw.uniform(len(ids)) * self.augment.count).long().cpu()
        return self.augment.of(images, ids, numbers), (ids, numbers)

    @turn(trains="student", optim=Optim(lr=0.01, **OPTIM), when="distil_share")
    def distil(self, batch: Batch) -> Terms:
        """``L_sim + L_D`` for the student."""
        o, label = self.options, batch["cond"]["label"]
        views, key = self.viewed(batch)
        images, taken = cutmix_shares(views, self.draw, o.cutmix)
        target, mean_logits = self.taught(images, key)
        if o.stored and o.cutmix:
            target, mean_logits = (t + taken[:, None] * (t.roll(1, 0) - t) for t in (target, mean_logits))
        logits = class_logits(self.student, images)
        terms = {"soft": (1 - o.gt_weight) * soft_cross_entropy(logits, target)}
        if o.gt_weight:
            terms["label"] = o.gt_weight * F.cross_entropy(logits, label)
        if o.discriminator:
            pair = (logits, mean_logits) if o.judged == "logits" else (logits.softmax(-1), target)
            terms["discriminator"] = o.discriminator * logit_discrimination(self.discriminator, *pair)
            self.shared["judged"] = tuple(part.detach() for part in pair)
        self.note("teacher_agreement", (logits.argmax(-1) == target.argmax(-1)).float().mean())
        self.note("target_entropy", -(target * target.clamp_min(1e-12).log()).sum(-1).mean())
        return terms

    @turn(trains="discriminator", optim=Optim(lr=0.001, **OPTIM), when=("discriminator", "distil_share"))
    def judge(self, batch: Batch) -> Terms:
        """``L_D`` for the discriminator, in the same step, from the logits that the student had."""
        return {"discriminator": logit_discrimination(self.discriminator, *self.shared["judged"])}

    def sampler(self) -> ForwardPass:
        return ForwardPass()
