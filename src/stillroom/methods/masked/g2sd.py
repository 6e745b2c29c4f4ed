"""G2SD: a masked autoencoder is distilled twice, first its decoder's features on unlabelled images, then the task
(arXiv 2302.14771)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.augment.images import mix_images, moved_and_flipped
from stillroom.errors import UserError
from stillroom.losses.features import smooth_l1
from stillroom.losses.layer_maps import at_fraction
from stillroom.losses.pixels import masked_pixel_loss
from stillroom.losses.soft_labels import decoupled_loss, soft_cross_entropy
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, Turn, frozen, register, turn, unfrozen
from stillroom.networks.mae import (
    Masking,
    block,
    decode,
    encode,
    learned,
    masking,
    patch_count,
    patchify,
    require_decoder,
    same_patches,
)
from stillroom.networks.projectors import projector
from stillroom.networks.recognition import ForwardPass, class_logits
from stillroom.networks.vit import carry_encoder, make_vit_classifier
from stillroom.surgery.taps import Taps, block_paths

MAE_OPTIM = {"betas": (0.9, 0.95), "weight_decay": 0.05}


@register(
    "g2sd",
    Paper(
        title="Generic-to-Specific Distillation of Masked Autoencoders",
        arxiv="2302.14771",
        year=2023,
        venue="CVPR 2023",
        code="pengzhiliang/G2SD",
    ),
)
class G2SD(Method):
    """Generic: under one mask, the student's decoder predicts the hidden state of a block half-way through the
    teacher's decoder, for visible and removed patches alike; no pixels. Specific: the student's encoder, with a
    distillation token, learns labels and the fine-tuned teacher's hard decisions, its rate falling towards the first
    block.

    With h_T the hidden state of the teacher's decoder after half of its blocks and h_S that of the student's whole
    decoder (both before the last norm, ``[B, 1 + N, D]``), LN a layer norm without weights, x~, y~ a mixed batch, and
    s, d the logits at the student's class and distillation tokens:

        L_GD = mean smoothL1_beta(MLP(h_S) - LN(sg h_T)),  beta = 2         over all tokens and channels
        L_SD = (1 - w) CE(s(x~), y~) + w CE(d(x~), argmax T(x~)),  w = 1/2  T: the fine-tuned teacher
        answer: (s + d) / 2

    The student is an untrained masked autoencoder; the teachers are a masked one, decoder and all, and for the specific
    stage the same fine-tuned, a classifier. With ``specific_share`` 0 the student stays an encoder.

    Departures: the distillation token has a position of its own (0 at the start), as transformers' DeiT has it.
    """

    health = {"teacher_agreement": "share of a mixed batch for which the student's answer is the fine-tuned teacher's"}

    task = "encode"

    @dataclass
    class Options:
        generic_share: float = field(default=1.0, metadata={"min": 0})  # of the steps; 0 leaves the stage out
        specific_share: float = field(default=0.5, metadata={"min": 0})
        mask_ratio: float = field(default=0.75, metadata={"min": 0, "max": 1})
        target: Literal["features", "pixels"] = "features"  # pixels: a plain masked autoencoder, without its teacher
        supervise: Literal["all", "masked"] = "all"  # which tokens learn; all: the class token, too
        teacher_block: int = field(default=-1, metadata={"min": -1})  # of its decoder, from 0; -1: half-way
        whiten: bool = True  # the target, by a layer norm without weights
        beta: float = field(default=2.0, metadata={"min": 1e-6})  # where smooth L1 becomes linear
        encoder_weight: float = field(default=0.0, metadata={"min": 0})  # of the encoders' last features
        specific: Literal["hard", "nkd", "labels"] = "hard"  # the teacher's decision, its soft labels, or none
        hard_weight: float = field(default=0.5, metadata={"min": 0, "max": 1})  # of the decision beside the labels
        labels: int = field(default=0, metadata={"min": 0})  # labelled images per class; 0: all
        layer_decay: float = field(default=0.75, metadata={"min": 1e-6, "max": 1})  # of the rate, block by block
        smoothing: float = field(default=0.1, metadata={"min": 0, "max": 1})  # of the labels
        mixup: float = field(default=0.8, metadata={"min": 0})  # Beta's parameter; 0: no mixing
        cutmix: float = field(default=1.0, metadata={"min": 0})
        shift: int = field(default=0, metadata={"min": 0})  # pixels that images are moved by
        flip: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability of a mirrored image

    options: Options
    encoder: Any  # that the generic stage trains; the student itself, where no specific stage follows
    head: Any  # None where the target is pixels
    encoder_head: Any  # None where encoder_weight is 0

    def build(self, student: nn.Module, teachers: Sequence[nn.Module] = ()) -> None:
        o = self.options
        if not (o.generic_share or o.specific_share):
            raise UserError("every stage of g2sd has share 0", cure="set options.generic_share to 1, for example")
        own = unfrozen(copy.deepcopy(require_decoder(student, "student")))
        own.config.image_mean = None  # it learns from pixels in [-1, 1], as a classifier will see them
        self.student, self.decoder = own.vit, own.decoder  # with a specific stage, until prepare() knows the classes
        self.encoder = self.student
        self.head = self.encoder_head = None
        self.patch, self.patches = own.config.patch_size, patch_count(own)
        masking(torch.zeros(1, self.patches), o.mask_ratio)  # a ratio that leaves nothing is refused here
        if o.generic_share and o.target == "features":
            if not teachers:
                raise UserError("g2sd has no teacher", cure="name a masked autoencoder: --teacher FOLDER")
            self.teacher = frozen(copy.deepcopy(require_decoder(teachers[0], "teacher")))
            same_patches(own, self.teacher)
            here, there = own.config, self.teacher.config
            depth = len(block_paths(self.teacher.decoder))
            index = o.teacher_block if o.teacher_block >= 0 else at_fraction(0.5, depth)[0]
            self.targets = Taps(self.teacher.decoder, {"hidden": block(self.teacher.decoder, index)}, early_exit=True)
            self.taps = Taps(self.decoder, {"hidden": block(self.decoder, -1)}, early_exit=True)
            self.head = projector(here.decoder_hidden_size, there.decoder_hidden_size, "mlp")
            if o.encoder_weight:
                self.encoder_head = projector(here.hidden_size, there.hidden_size, "mlp")
        if o.specific_share and o.specific != "labels":
            if len(teachers) < 2:
                raise UserError(
                    "g2sd's specific stage has no fine-tuned teacher",
                    cure="name a classifier after the masked autoencoder, or set options.specific_share to 0",
                )
            self.tutor = frozen(copy.deepcopy(teachers[1]))

    def prepare(self, data: Any) -> None:
        """With the classes known, the student becomes a classifier beside the encoder that the generic stage trains."""
        o = self.options
        if not o.specific_share:
            return
        self.classes = len(data.classes) or int(data.labels.max()) + 1
        kind = "DeiTForImageClassificationWithTeacher" if o.specific == "hard" else "DeiTForImageClassification"
        self.student = make_vit_classifier(self.encoder, self.classes, kind).to(next(self.encoder.parameters()).device)
        if o.labels:
            rows = [torch.nonzero(data.labels == c)[: o.labels, 0] for c in range(self.classes)]
            data.parts["labelled"] = data.take(torch.cat(rows))

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        """The specific stage begins with the generic one's encoder; decoder and heads are left behind."""
        if stage.kind == "specific" and not resumed:
            carry_encoder(self.encoder, self.student)

    def stages(self) -> tuple[Stage, ...]:
        o = self.options
        every = (
            Stage("generic", ("generic",), o.generic_share, own_schedule=True),
            Stage("specific", ("specific",), o.specific_share, data="labelled" if o.labels else "", own_schedule=True),
        )
        return tuple(stage for stage in every if stage.share > 0)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Neither biases nor the scales of layer norms."""
        return parameter.ndim > 1

    def rate(self, turn: Turn, name: str) -> float:
        """The specific stage's rate falls by ``layer_decay`` from the heads to each block below, and to the patches."""
        if turn.name != "specific":
            return 1.0
        blocks = block_paths(self.student)
        place = name.removeprefix("student.")
        depth = next((i + 1 for i, path in enumerate(blocks) if place.startswith(f"{path}.")), None)
        if depth is None:
            depth = 0 if ".embeddings." in place else len(blocks) + 1
        return self.options.layer_decay ** (len(blocks) + 1 - depth)

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        found = super().trained_parameters(name)
        fixed = name != "student" or not self.options.specific_share
        return learned(found) if fixed else found

    # --- generic ------------------------------------------------------------------------------------------------------
    def images(self, batch: Batch) -> Tensor:
        return moved_and_flipped(batch["x"], self.draw, self.options.shift, self.options.flip)

    @torch.no_grad()
    def target(self, images: Tensor, mask: Masking) -> tuple[Tensor, Tensor]:
        """``h_T [B, 1 + N, D]``, and the teacher's latent ``[B, 1 + V, D]``."""
        latent = encode(self.teacher.vit, images, mask.ids_keep)
        with self.targets.recording() as features:
            decode(self.teacher.decoder, latent, mask.ids_restore)
        return features["hidden"].float(), latent.float()

    @turn(
        trains=("encoder", "decoder", "head", "encoder_head"), optim=Optim(lr=1e-3, **MAE_OPTIM), when="generic_share"
    )
    def generic(self, batch: Batch) -> Terms:
        """``L_GD`` under one mask for both; with ``encoder_weight`` the same of the encoders' last features."""
        o, images = self.options, self.images(batch)
        mask = masking(self.draw.uniform(len(images), self.patches).to(images.device), o.mask_ratio)
        latent = encode(self.encoder, images, mask.ids_keep)
        if o.target == "pixels":
            predicted = decode(self.decoder, latent, mask.ids_restore)
            patches = patchify(images, self.patch)
            return {"pixels": masked_pixel_loss(predicted, patches, mask.mask)}
        with self.taps.recording() as features:
            decode(self.decoder, latent, mask.ids_restore)
        predicted, (hidden, seen) = self.head(features["hidden"]), self.target(images, mask)
        whitened: Literal["layer", "none"] = "layer" if o.whiten else "none"
        keep = F.pad(mask.mask, (1, 0), value=False) if o.supervise == "masked" else None
        terms = {"features": smooth_l1(predicted, hidden, beta=o.beta, target=whitened, keep=keep)}
        if o.encoder_weight:
            encoded = smooth_l1(self.encoder_head(latent), seen, beta=o.beta, target=whitened)
            terms["encoder"] = o.encoder_weight * encoded
        return terms

    # --- specific -----------------------------------------------------------------------------------------------------
    @turn(trains="student", optim=Optim(lr=1e-3, weight_decay=0.05), when="specific_share")
    def specific(self, batch: Batch) -> Terms:
        """``L_SD``; the teacher sees the mixed batch as it is."""
        o, label = self.options, batch["cond"]["label"]
        images = self.images(batch)
        if o.specific == "nkd":  # it needs whole labels
            logits = class_logits(self.student, images)
            return {"nkd": decoupled_loss(logits, self.told(images), label)}
        soft = F.one_hot(label, self.classes).float() * (1 - o.smoothing) + o.smoothing / self.classes
        images, soft = mix_images(images, soft, self.draw, o.mixup, o.cutmix)
        if o.specific == "labels":
            return {"label": soft_cross_entropy(class_logits(self.student, images), soft)}
        output, decided = self.student(images), self.told(images).argmax(-1)
        self.note("teacher_agreement", (output.logits.argmax(-1) == decided).float().mean())
        return {
            "label": (1 - o.hard_weight) * soft_cross_entropy(output.cls_logits, soft),
            "teacher": o.hard_weight * F.cross_entropy(output.distillation_logits, decided),
        }

    @torch.no_grad()
    def told(self, images: Tensor) -> Tensor:
        """``T(x)``: the fine-tuned teacher's logits."""
        return class_logits(self.tutor, images)

    def sampler(self) -> ForwardPass:
        return ForwardPass()
