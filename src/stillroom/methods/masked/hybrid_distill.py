"""Hybrid Distill: one student of two teachers, features of a discriminative one and token relations of a masked one
(arXiv 2306.15876)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.augment.images import moved_and_flipped
from stillroom.errors import UserError
from stillroom.losses.features import gather_relation, relation, relation_kl, smooth_l1
from stillroom.method import Batch, Method, Optim, Paper, Terms, frozen, register, turn, unfrozen
from stillroom.networks.mae import encode, is_masked, learned, same_patches
from stillroom.networks.projectors import projector
from stillroom.networks.recognition import ForwardPass
from stillroom.networks.vit import encoder_of
from stillroom.surgery.taps import Tap, Taps, block_paths, module_paths, projection_path, split_heads


@register(
    "hybrid-distill",
    Paper(
        title="Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners",
        arxiv="2306.15876",
        year=2024,
        venue="ICLR 2024",
        code="lygsbw/hybriddistill",
    ),
)
class HybridDistill(Method):
    """The student's last features follow those of a contrastive or supervised teacher, which separate classes; the
    relations of its queries and keys in the last layers follow those of a masked autoencoder, whose heads stay
    diverse. The student sees only the patches that the masked teacher finds least redundant. No labels, no pixels.

    With M the tokens that the student sees, S its last features, T_c the discriminative teacher's, P a linear map, LN a
    layer norm without weights, and R = Q K^T / sqrt(d) per head of a network's layer:

        L_c = smoothL1(P S, LN(sg T_c)[M])
        L_m = mean over the last layers of KL(softmax(sg R_m[M, M]) || softmax(R_S))     m: the masked teacher
        L   = alpha L_c + beta L_m
        M:  before layers 0, L/3, 2L/3 of the masked teacher, of the n patches left the floor(theta n) are dropped whose
            mean cosine with all of them is highest

    The teachers are the discriminative one and then the masked autoencoder.

    Departures: the authors published no code. Not theirs, for want of it: relations are compared as attention
    (``relation: kl``) rather than as raw products, and the masked teacher's relations come from a pass over the whole
    image.
    """

    task = "encode"

    @dataclass
    class Options:
        alpha: float = field(default=1.0, metadata={"min": 0})  # weight of the features; 0: the masked teacher alone
        beta: float = field(default=1.0, metadata={"min": 0})  # weight of the relations; 0: the other teacher alone
        theta: float = field(default=0.3, metadata={"min": 0, "max": 0.95})  # share dropped in each round; 0: none
        rounds: int = field(default=3, metadata={"min": 1})  # at layers 0, L/3, 2L/3, for three
        relation_layers: int = field(default=2, metadata={"min": 1})  # so many last ones
        relation: Literal["kl", "smooth_l1"] = "kl"  # of attention, or of scaled products
        relation_heads: int = field(default=0, metadata={"min": 0})  # that both networks are split into; 0: student's
        whiten: bool = True  # the features' target, by a layer norm without weights
        smooth: float = field(default=1.0, metadata={"min": 1e-6})  # where smooth L1 becomes linear
        projector: Literal["linear", "mlp"] = "linear"
        shift: int = field(default=0, metadata={"min": 0})  # pixels that images are moved by
        flip: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability of a mirrored image

    options: Options
    projector: Any  # None where alpha is 0

    def build(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        o = self.options
        if not (o.alpha or o.beta):
            raise UserError("hybrid-distill has nothing to minimise", cure="set options.alpha or options.beta above 0")
        if len(teachers) != 2:
            raise UserError(
                f"hybrid-distill learns from two teachers, not {len(teachers)}",
                cure="name the contrastive or supervised one, then the masked one: --teacher FOLDER,FOLDER",
            )
        self.student = unfrozen(copy.deepcopy(encoder_of(student)))
        self.masters = nn.ModuleList(frozen(copy.deepcopy(encoder_of(teacher))) for teacher in teachers)
        for who, network in (("student", self.student), ("second teacher", self.masked)):
            if not is_masked(network):
                raise UserError(
                    f"the {who} {type(network).__name__} cannot leave patches out", cure="give a ViTMAEModel's folder"
                )
        same_patches(self.student, *self.masters)
        mine, theirs = self.student.config, encoder_of(self.masters[0]).config
        self.projector = projector(mine.hidden_size, theirs.hidden_size, o.projector) if o.alpha else None
        self.heads = o.relation_heads or mine.num_attention_heads
        for network in (self.student, self.masked):
            split_heads(
                torch.zeros(1, 1, network.config.hidden_size), self.heads
            )  # what does not split is refused here
        self.ours, self.theirs = self.relations(self.student), self.relations(self.masked)

    def teachers(self) -> dict[str, nn.Module]:
        return {"teacher-features": self.masters[0], "teacher-masked": self.masters[1]}

    @property
    def masked(self) -> Any:
        return self.masters[1]

    def relations(self, network: nn.Module) -> Taps:
        """Queries and keys of the last layers, ``q0, k0`` the last but so many."""
        blocks = block_paths(network)
        if len(blocks) < self.options.relation_layers:
            raise UserError(
                f"{type(network).__name__} has {len(blocks)} layers, not {self.options.relation_layers}",
                cure="lower options.relation_layers",
            )
        taps = {}
        for place, path in enumerate(blocks[-self.options.relation_layers :]):
            taps[f"q{place}"] = projection_path(network, path, "query")
            taps[f"k{place}"] = projection_path(network, path, "key")
        return Taps(network, taps)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Neither biases nor the scales of layer norms."""
        return parameter.ndim > 1

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        return learned(super().trained_parameters(name))

    # --- one step -----------------------------------------------------------------------------------------------------
    def images(self, batch: Batch) -> Tensor:
        return moved_and_flipped(batch["x"], self.draw, self.options.shift, self.options.flip)

    @torch.no_grad()
    def informative(self, images: Tensor) -> Tensor:
        """``M``: the patches ``[B, K]`` that stay, in reading order: before some of its layers the masked teacher drops
        those that are most like the others on average, and goes on with the rest. The class token stays."""
        o, paths, modules = self.options, block_paths(self.masked), module_paths(self.masked)
        rounds = {i * len(paths) // o.rounds for i in range(o.rounds)}
        with Taps(self.masked, {"tokens": Tap(paths[0], "input")}, early_exit=True) as taps:
            hidden = self.record(taps, images)["tokens"]
        kept = torch.arange(hidden.shape[1] - 1, device=images.device).expand(len(images), -1)
        for layer, path in enumerate(paths[: max(rounds) + 1]):
            if layer in rounds:
                stay = self.least_redundant(hidden[:, 1:])
                kept = kept.gather(1, stay)
                hidden = hidden.gather(1, with_class(stay)[..., None].expand(-1, -1, hidden.shape[-1]))
            output = modules[path](hidden)
            hidden = output if isinstance(output, Tensor) else output[0]
        return kept

    def least_redundant(self, tokens: Tensor) -> Tensor:
        """Places ``[B, n - floor(theta n)]``, ascending, of the tokens ``[B, n, D]`` whose mean cosine with all of them
        is least."""
        unit = nn.functional.normalize(tokens.float(), dim=-1)
        redundancy = (unit * unit.mean(1, keepdim=True)).sum(-1)
        n = tokens.shape[1]
        stay = redundancy.argsort(1)[:, : n - int(self.options.theta * n + 1e-6)]
        return stay.sort(1).values

    @staticmethod
    def record(taps: Taps, images: Tensor, ids_keep: Tensor | None = None) -> Any:
        with taps.recording() as features:
            encode(taps.network, images, ids_keep)
        return features

    @turn(trains=("student", "projector"), optim=Optim(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05))
    def distil(self, batch: Batch) -> Terms:
        """``alpha L_c + beta L_m``."""
        o, images, terms = self.options, self.images(batch), {}
        kept = self.informative(images) if o.theta else None
        with self.ours.recording() as ours:
            features = encode(self.student, images, kept)
        tokens = with_class(kept) if kept is not None else None
        if o.alpha:
            with torch.no_grad():
                told = encode(self.masters[0], images)
            if tokens is not None:
                told = told.gather(1, tokens[..., None].expand(-1, -1, told.shape[-1]))
            target: Literal["layer", "none"] = "layer" if o.whiten else "none"
            terms["features"] = o.alpha * smooth_l1(self.projector(features), told, beta=o.smooth, target=target)
        if o.beta:
            with torch.no_grad():
                theirs = self.record(self.theirs, images)
            losses = [self.relation_loss(ours, theirs, layer, tokens) for layer in range(o.relation_layers)]
            terms["relations"] = o.beta * torch.stack(losses).mean()
        return terms

    def relation_loss(self, ours: Any, theirs: Any, layer: int, tokens: Tensor | None) -> Tensor:
        """One layer's part of ``L_m``; the teacher's products are gathered on both axes before any softmax."""
        mine, told = (
            relation(*(split_heads(side[f"{part}{layer}"], self.heads) for part in "qk")) for side in (ours, theirs)
        )
        if tokens is not None:
            told = gather_relation(told, tokens)
        if self.options.relation == "kl":
            return relation_kl(mine, told)
        return smooth_l1(mine, told, beta=self.options.smooth)

    def sampler(self) -> ForwardPass:
        return ForwardPass()


def with_class(patches: Tensor) -> Tensor:
    """Places of the class token and of patches ``[B, K]`` in a sequence that begins with the class token."""
    return torch.cat([torch.zeros_like(patches[:, :1]), patches + 1], 1)
