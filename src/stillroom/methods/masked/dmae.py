"""DMAE: a small masked autoencoder is pre-trained while one of its feature maps follows a big one's (arXiv
2208.12256)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.augment.images import moved_and_flipped
from stillroom.errors import UserError
from stillroom.losses.features import l1, mse, normalised
from stillroom.losses.layer_maps import at_fraction
from stillroom.losses.pixels import masked_pixel_loss
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn, unfrozen
from stillroom.networks.mae import (
    Masking,
    block,
    decode,
    encode,
    is_masked,
    learned,
    masking,
    own_pixels,
    patch_count,
    patchify,
    require_decoder,
    same_patches,
)
from stillroom.networks.projectors import Projectors
from stillroom.networks.recognition import ForwardPass
from stillroom.networks.vit import encoder_of
from stillroom.surgery.taps import Taps, block_paths


@register(
    "dmae",
    Paper(
        title="Masked Autoencoders Enable Efficient Knowledge Distillers",
        arxiv="2208.12256",
        year=2023,
        venue="CVPR 2023",
        code="UCSC-VLAA/DMAE",
    ),
)
class DMAE(Method):
    """A small masked autoencoder reconstructs pixels; beside that, what one of its blocks says of the visible patches
    and of the class token follows a block of a frozen big one, at the same share of the depth, under the same mask.
    The teacher runs no further than that block.

    With one mask for both, z_S and z_T the residual streams ``[B, 1 + V, D]`` after the aligned blocks (class token and
    V visible patches, before the last norm), P a linear map and n(.) scaling to length 1:

        L_pix  = mean over removed patches of mean_pixels (predicted - target)^2
        L_feat = mean abs(n(P z_S) - n(sg z_T))                     over batch, tokens and channels
        L      = L_pix + alpha L_feat

    The student is an untrained masked autoencoder; of the teacher's the encoder is enough.

    Departures: the paper's equation compares raw features, its code features of length 1, as here by default; the
    code's term is small beside the pixels' (``alpha`` and ``normalise`` are options). The teacher stops at the aligned
    block, where the released code runs all of it.
    """

    health = {"feature_cosine": "mean cosine of P z_S and z_T over batch and tokens: 1 where the features agree"}

    task = "encode"

    @dataclass
    class Options:
        mask_ratio: float = field(default=0.75, metadata={"min": 0, "max": 1})  # share of patches that are removed
        alpha: float = field(default=1.0, metadata={"min": 0})  # weight of the features; 0: no teacher, a plain MAE
        pixels: float = field(default=1.0, metadata={"min": 0})  # weight of the reconstruction
        normalise: Literal["l2", "layer", "none"] = "l2"  # of both sides' features
        distance: Literal["l1", "mse"] = "l1"
        depth: float = field(default=0.75, metadata={"min": 0, "max": 1})  # of the aligned block in both networks
        student_block: int = field(default=-1, metadata={"min": -1})  # counted from 0; -1: by depth
        teacher_block: int = field(default=-1, metadata={"min": -1})
        projector: Literal["linear", "mlp"] = "linear"
        normalise_pixels: bool = False  # each target patch has mean 0 and variance 1
        shift: int = field(default=0, metadata={"min": 0})  # pixels that images are moved by
        flip: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability of a mirrored image

    options: Options
    decoder: Any  # None where no pixels are predicted
    projectors: Any  # None where there is no teacher

    def build(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        o = self.options
        own = unfrozen(copy.deepcopy(require_decoder(student, "student")))
        self.student, self.decoder, self.projectors = own.vit, own.decoder if o.pixels else None, None
        if not (o.alpha or o.pixels):
            raise UserError("dmae has nothing to minimise", cure="set options.alpha or options.pixels above 0")
        self.patch, self.patches = own.config.patch_size, patch_count(own)
        masking(torch.zeros(1, self.patches), o.mask_ratio)  # a ratio that leaves nothing is refused here
        if not o.alpha:
            return
        if teacher is None:
            raise UserError("dmae has no teacher", cure="name one, or set options.alpha to 0")
        self.teacher = frozen(copy.deepcopy(encoder_of(teacher)))
        if not is_masked(self.teacher):
            raise UserError(
                f"the teacher {type(teacher).__name__} is no masked autoencoder", cure="give a ViTMAEModel's folder"
            )
        same_patches(self.student, self.teacher)
        self.taps = self.read(self.student, o.student_block, early_exit=False)
        self.targets = self.read(self.teacher, o.teacher_block, early_exit=True)
        widths = [(1, network.config.hidden_size) for network in (self.student, self.teacher)]
        self.projectors = Projectors({"block": widths[0]}, {"block": widths[1]}, {"block": "block"}, o.projector)

    def read(self, network: nn.Module, chosen: int, early_exit: bool) -> Taps:
        """The aligned block: the residual stream after it, before the last layer norm."""
        index = chosen if chosen >= 0 else at_fraction(self.options.depth, len(block_paths(network)))[0]
        return Taps(network, {"block": block(network, index)}, early_exit=early_exit)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Neither biases nor the scales of layer norms."""
        return parameter.ndim > 1

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        return learned(super().trained_parameters(name))

    # --- one step -----------------------------------------------------------------------------------------------------
    def images(self, batch: Batch) -> Tensor:
        return moved_and_flipped(batch["x"], self.draw, self.options.shift, self.options.flip)

    def draw_mask(self, images: Tensor) -> Masking:
        """One mask for both networks."""
        return masking(self.draw.uniform(len(images), self.patches).to(images.device), self.options.mask_ratio)

    @torch.no_grad()
    def target(self, images: Tensor, mask: Masking) -> Tensor:
        """``z_T [B, 1 + V, D_T]``, float32, from the visible patches alone."""
        with self.targets.recording() as features:
            encode(self.teacher, images, mask.ids_keep)
        return features["block"].float()

    @turn(trains=("student", "decoder", "projectors"), optim=Optim(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05))
    def pretrain(self, batch: Batch) -> Terms:
        """``L_pix + alpha L_feat``."""
        o, images, terms = self.options, self.images(batch), {}
        mask = self.draw_mask(images)
        if not o.alpha:
            latent = encode(self.student, images, mask.ids_keep)
        else:
            with self.taps.recording() as features:
                latent = encode(self.student, images, mask.ids_keep)
            projected, target = self.projectors.project("block", features["block"]), self.target(images, mask)
            terms["features"] = o.alpha * self.distance(projected, target)
            self.note("feature_cosine", torch.cosine_similarity(projected, target, dim=-1).mean())
        if o.pixels:
            patches = patchify(own_pixels(self.student, images), self.patch)
            predicted = decode(self.decoder, latent, mask.ids_restore)
            terms["pixels"] = o.pixels * masked_pixel_loss(predicted, patches, mask.mask, o.normalise_pixels)
        return terms

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``L_feat``; the paper singles L1 out."""
        o = self.options
        if o.distance == "l1":
            return l1(student, teacher, normalise=o.normalise)
        return mse(normalised(student, o.normalise), normalised(teacher, o.normalise))

    def sampler(self) -> ForwardPass:
        return ForwardPass()
