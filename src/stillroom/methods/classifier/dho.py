"""DHO: few labels and a text-image teacher, each with a head of its own on one backbone (arXiv 2505.07675)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.augment.images import VIEW, Augmentation
from stillroom.data.outputs import Views, stored_outputs
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.losses.conflict import gradient_cosine
from stillroom.losses.soft_labels import forward_kl
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn, unfrozen
from stillroom.networks.dual_head import best_mixture, exchange, last_layer
from stillroom.networks.prompt_classifier import PROMPTS, FewShotCache, PromptClassifier
from stillroom.networks.recognition import ForwardPass, TwoHeadPass, class_logits
from stillroom.surgery.modules import weights_hash


@register(
    "dho",
    Paper(
        title="Simple (yet Effective) Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head "
        "Optimization",
        arxiv="2505.07675",
        year=2025,
        code="erjui/DHO",
    ),
)
class DHO(Method):
    """A classifier learns from few labelled images and from what a frozen teacher says of these and of many unlabelled
    ones. The two often contradict each other, so each has a head of its own; how far to trust which is chosen after the
    training, on held-out images (``parts["heldout"]``).

    With x_l, y the labelled and x_u the unlabelled images of a step, h_CE and h_KD the two heads' logits,
    p = sg softmax(teacher / eta) and q = softmax(h_KD / eta):

        L_CE = mean CE(h_CE(x_l), y)
        L_KD = eta^2 [mean KL(p || q)(x_l) + mean KL(p || q)(x_u)]            a sum of two means
        L    = lambda L_CE + (1 - lambda) L_KD
        answer = alpha softmax(h_CE) + (1 - alpha) softmax(h_KD / beta)       alpha, beta: chosen on held-out images

    Both losses reach the backbone, each its own head alone; nothing reaches the teacher.

    The teacher is a text-image model or any classifier. Each step reads ``engine.batch`` unlabelled images and as many
    labelled ones; both sets are cycled. Which images keep their labels follows from the seed; data with a part
    ``labelled`` bring their own, and are unlabelled otherwise.

    Departures (from the authors' code): labelled and unlabelled images are one batch, so that batch normalisation
    treats them alike; the mixture is never chosen on the test split.
    """

    health = {
        "label_accuracy": "share of the labelled images of a batch that h_CE gets right",
        "teacher_accuracy": "the same of the teacher",
        "teacher_agreement": "share of all images of a batch for which h_KD and the teacher have the same first class",
        "gradient_cosine": "cosine of the gradients of L_CE and L_KD with respect to the backbone: below 0 the labels "
        "and the teacher pull it apart; the last that was measured, every conflict_every steps",
    }

    task = "classify"

    @dataclass
    class Options:
        labelled: float = field(default=4.0, metadata={"min": 0})  # images per class with a label; below 1: the share
        gt_weight: float = field(default=0.5, metadata={"min": 0, "max": 1})  # lambda, of the labels; 1: no teacher
        temperature: float = 2.0  # eta, of teacher and student in the divergence
        heads: Literal["two", "one"] = "two"  # one: a single head for both losses, the paper's baseline (SHO)
        mixture: Literal["tuned", "fixed"] = "tuned"  # alpha and beta: the best on held-out images, or as given here
        alpha: float = field(default=0.5, metadata={"min": 0, "max": 1})  # paper: 0.4 zero-shot, 0.2 few-shot teacher
        beta: float = 0.5  # temperature of the teacher's head in the mixture
        prompts: tuple[str, ...] = PROMPTS  # of a text-image teacher
        zeta: float = 0.01  # its temperature
        # Labelled images beside the texts: a few-shot teacher. tuned: its keys are trained first (Tip-Adapter-F).
        cache: Literal["none", "fixed", "tuned"] = "none"
        cache_strength: float = field(default=1.0, metadata={"min": 0})  # a
        cache_sharpness: float = field(default=5.5, metadata={"min": 0})  # b
        cache_share: float = field(default=0.2, metadata={"min": 1e-6})  # steps of tuning, as a share of the student's
        text_average: Literal["normalised", "plain"] = "normalised"  # of several prompts; plain: the authors' code
        init: Literal["none", "label", "both"] = "none"  # heads that begin at the teacher's text features
        align: Literal["none", "paper", "code"] = "none"  # the teacher's head as a cosine, see TwoHeads
        crop: float = field(default=1.0, metadata={"min": 0.01, "max": 1})  # least share of the area; paper: 0.5
        shift: int = field(default=0, metadata={"min": 0})  # pixels that images are moved by
        flip: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability of a mirrored image; paper: 0.5
        views: int = field(default=0, metadata={"min": 0})  # in which an image is seen; 0: always new ones
        stored: str = ""  # folder that keeps what the teacher says of these views; written where it is not there
        stored_keep: int = field(default=0, metadata={"min": 0})  # logits of each that are kept; 0: all
        stored_precision: Literal["float16", "float32"] = "float16"
        conflict_every: int = field(default=50, metadata={"min": 0})  # steps between measured conflicts; 0: never

        @property
        def adapted(self) -> bool:
            return self.cache == "tuned"

    options: Options
    mixture: tuple[float, float]
    cache: FewShotCache | None
    cosine: Tensor | None = None  # the last that was measured

    def build(self, student: nn.Module, teacher: nn.Module) -> None:
        o = self.options
        if o.heads == "one" and (o.init != "none" or o.align != "none"):
            raise UserError("options.init and options.align are for two heads", cure="set options.heads to two")
        if isinstance(teacher, PromptClassifier):
            teacher.ask(o.prompts, o.zeta, o.text_average)
        elif o.init != "none" or o.cache != "none":
            key = "init" if o.init != "none" else "cache"
            raise UserError(f"options.{key} needs a text-image teacher", cure="set it to none, or give a CLIPModel")
        self.teacher = frozen(copy.deepcopy(teacher))
        self.student = unfrozen(copy.deepcopy(student))
        self.head = last_layer(self.student)[0]
        if o.heads == "two":
            heads = exchange(self.student, o.align, o.zeta)
            if o.init != "none":
                heads.start(self.teacher.text, both=o.init == "both")
        if o.stored and o.cache != "none":
            raise UserError(
                "options.stored keeps the answers of a teacher that options.cache changes in the run",
                cure="set options.cache to none, or options.stored to nothing",
            )
        if o.stored and not o.views:
            raise UserError("options.stored needs options.views", cure="8 views of each image, for example")
        self.cache = None
        self.mixture, self.augment = (o.alpha, o.beta), Views(Augmentation(o.crop, o.shift, o.flip), o.views)

    # --- data -----------------------------------------------------------------------------------------------------
    def prepare(self, data: Any) -> None:
        """Labelled and unlabelled data: some images of each class, and all others without their labels; what the
        teacher says of both, where it is to be stored."""
        if "labelled" not in data.parts:
            few = self._few(data.labels)
            data.parts["labelled"] = data.take(torch.nonzero(few)[:, 0])
            data.parts["unlabelled"] = data.take(torch.nonzero(~few)[:, 0])
            data.parts["unlabelled"].cond.pop("label")
        self.labelled, self.heldout = data.parts["labelled"], data.parts.get("heldout")
        data.parts["few"] = self.labelled.reordered(self.draw.index(2**31))
        if self.options.heads == "two" and self.options.mixture == "tuned" and self.heldout is None:
            raise UserError(
                "options.mixture=tuned needs held-out data", cure="give the data a part 'heldout', or set it to fixed"
            )
        if self.options.stored:
            self._store(data)
        if self.options.cache != "none":
            self.cache = self._remember(self.labelled)

    @torch.no_grad()
    def _remember(self, labelled: Any) -> FewShotCache:
        o, device = self.options, self.teacher.text.device
        parts = labelled.images().split(256)
        features = torch.cat([self.teacher.image_features(part.to(device)) for part in parts])
        return FewShotCache(
            features, labelled.labels.to(device), len(self.teacher.classes), o.cache_strength, o.cache_sharpness
        )

    def _store(self, data: Any) -> None:
        o, device = self.options, next(self.student.parameters()).device
        name = weights_hash(self.teacher) + (f", zeta {o.zeta:g}" if isinstance(self.teacher, PromptClassifier) else "")
        kept: dict[str, Any] = {"keep": o.stored_keep, "precision": o.stored_precision}

        def ask(images: Tensor) -> dict[str, Tensor]:
            return {"logits": class_logits(self.teacher, images.to(device))}

        self.store = stored_outputs(o.stored, ask, data, self.augment, name=name, **kept)
        del self.teacher

    def _few(self, labels: Tensor) -> Tensor:
        """bool ``[N]``: which rows keep their label."""
        wanted, few = self.options.labelled, torch.zeros(len(labels), dtype=torch.bool)
        for name in torch.unique(labels):
            rows = torch.nonzero(labels == name)[:, 0]
            count = max(1, round(wanted * len(rows))) if wanted < 1 else round(wanted)
            if count >= len(rows):
                raise UserError(
                    f"options.labelled={wanted:g} leaves no unlabelled image of class {int(name)} ({len(rows)} in all)",
                    cure="choose fewer",
                )
            generator = torch.Generator().manual_seed(self.draw.index(2**31))
            few[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
        return few

    def stages(self) -> tuple[Stage, ...]:
        distil = Stage("distil", ("distil",), data=("unlabelled", "few"), own_schedule=True)
        adapt = Stage("adapt", ("adapt",), self.options.cache_share, data="labelled", own_schedule=True)
        return (adapt, distil) if self.options.adapted else (distil,)

    def streams(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both streams as one: augmented images ``[2 B, ...]``, labelled first, their ids and the numbers of their
        views ``[2 B]``, and the labels ``[B]``. Each image is augmented once, for student and teacher alike."""
        few, many = batch["few"], batch["unlabelled"]
        images, ids, numbers = zip(*(self._viewed(s["x"], s["id"].cpu()) for s in (few, many)), strict=True)
        return torch.cat(images), torch.cat(ids), torch.cat(numbers), few["cond"]["label"]

    def _viewed(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in one of their numbered views, or in a new one; ids and numbers."""
        if not self.augment.count:
            return self.augment.augment(images, self.draw.uniform(len(images), VIEW)), ids, torch.zeros_like(ids)
        numbers = (self.draw.uniform(len(ids)) * self.augment.count).long().cpu()
        return self.augment.of(images, ids, numbers), ids, numbers

    @torch.no_grad()
    def taught(self, images: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
        """The teacher's logits ``[2 B, classes]``, live or from the store."""
        if self.options.stored:
            return self.store.read(ids, numbers)["logits"].to(images.device)
        return class_logits(self.teacher, images) if self.cache is None else self.teacher(images, self.cache)

    @turn(trains="cache", optim=Optim(lr=1e-3, weight_decay=1e-2, eps=1e-4), when="adapted")
    def adapt(self, batch: Batch) -> Terms:
        """Tip-Adapter-F (arXiv 2111.03930): the few-shot teacher learns its keys from the labelled images."""
        images = self._viewed(batch["x"], batch["id"].cpu())[0]
        return {"label": F.cross_entropy(self.teacher(images, self.cache), batch["cond"]["label"])}

    # --- losses ---------------------------------------------------------------------------------------------------
    @turn(trains="student", optim=Optim(lr=1e-3, weight_decay=1e-2))
    def distil(self, batch: Batch) -> Terms:
        """``lambda L_CE + (1 - lambda) L_KD``."""
        o = self.options
        images, ids, numbers, label = self.streams(batch)
        taught = self.taught(images, ids, numbers)
        output = class_logits(self.student, images)
        by_label, by_teacher = output.chunk(2, -1) if o.heads == "two" else (output, output)
        few = len(label)
        truth = F.cross_entropy(by_label[:few].float(), label)
        halves = [
            forward_kl(by_teacher[part], taught[part], temperature=o.temperature, temperature_squared=True)
            for part in (slice(few), slice(few, None))
        ]
        distillation = torch.stack(halves).sum()  # of two means
        self._watch(truth, distillation)
        self.note("label_accuracy", (by_label[:few].argmax(-1) == label).float().mean())
        self.note("teacher_accuracy", (taught[:few].argmax(-1) == label).float().mean())
        self.note("teacher_agreement", (by_teacher.argmax(-1) == taught.argmax(-1)).float().mean())
        return {"label": o.gt_weight * truth, "teacher": (1 - o.gt_weight) * distillation}

    def _watch(self, truth: Tensor, distillation: Tensor) -> None:
        """``cos(grad L_CE, grad L_KD)`` with respect to the backbone. Not for sharded weights, whose gradients are
        never in one place."""
        every = self.options.conflict_every
        backbone = [p for name, p in self.student.named_parameters() if not name.startswith(self.head + ".")]
        if every and (self.step + 1) % every == 0 and not any(hasattr(p, "full_tensor") for p in backbone):
            self.cosine = gradient_cosine(truth, distillation, backbone)
        if self.cosine is not None:
            self.note("gradient_cosine", self.cosine)

    # --- the mixture ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def finish(self, network: nn.Module) -> None:
        """alpha and beta of the best accuracy on held-out images, from logits that are computed once."""
        o = self.options
        if o.heads == "one" or o.mixture == "fixed":
            return
        assert self.heldout is not None
        device = next(network.parameters()).device
        logits = [class_logits(network, part.to(device)).cpu() for part in self.heldout.images().split(256)]
        label, taught = torch.cat(logits).chunk(2, -1)
        self.mixture = best_mixture(label, taught, self.heldout.labels)

    def sampler(self) -> Sampler:
        """The student with its mixture."""
        return TwoHeadPass(*self.mixture) if self.options.heads == "two" else ForwardPass()
