"""Distiller: augmentation, layer map, intermediate and prediction loss, each a choice (arXiv 2109.11105)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.augment.texts import contextual_replacement, mixup_weights, nearest_tokens, random_edits
from stillroom.data.texts import check_vocabularies
from stillroom.errors import UserError
from stillroom.folders.text_networks import load_masked_lm
from stillroom.losses import features
from stillroom.losses.layer_maps import as_weights, emd, layer_map, mapped_loss
from stillroom.losses.mutual_information import i_alpha
from stillroom.losses.soft_labels import soft_cross_entropy
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, Turn, frozen, register, turn, unfrozen
from stillroom.networks.critics import MICritic
from stillroom.networks.projectors import Projectors
from stillroom.networks.recognition import ForwardPass, class_logits
from stillroom.surgery.text_reader import (
    EncoderReader,
    Reading,
    depth,
    mixed_inputs,
    positions,
    text_inputs,
    token_table,
)


@dataclass
class Pass:
    """What student and teacher made of one version of a batch; ``distinct [B, B]``: which texts differ."""

    found: Reading
    taught: Reading
    keep: Tensor
    distinct: Tensor


@register(
    "distiller",
    Paper(
        title="Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing",
        arxiv="2109.11105",
        year=2021,
        venue="SustaiNLP 2021",
    ),
)
class Distiller(Method):
    """A student learns a fine-tuned teacher's states by way of mutual information or a distance, its answers, and the
    labels. Student and critics climb the same bound: there is no game between them.

    With H_i^T and H_j^S the states of teacher layer i and student layer j, z the logits, and m_ij the layer map (fixed,
    or the optimal transport plan for the costs l_ij, without gradients):

        L = b_inter sum_ij m_ij l(sg H_i^T, H_j^S) + b_pred l_pred(sg z_T, z_S) + b_hard CE(y, softmax(z_S))

    and without its last term on an augmented copy of the batch. One choice of l is minus MI-alpha, the bound of Poole
    et al. (arXiv 1905.06922, sec. 2.3), for critic scores s_ij = f(x_i, y_j) and a log-baseline b_j = log q(y_j) over
    the B texts of a batch:

        I_alpha = 1 + mean_j (s_jj - D_j(all i)) - mean_j exp(log mean_(i != j) e^s_ij - D_j(i != j))
        D_j(I)  = log(alpha mean_(i in I) e^s_ij + (1 - alpha) e^b_j)

    alpha = 1 is InfoNCE, alpha = 0 is TUBA. Student, critics and baselines all raise it, in one step.

    Departures: the critic's layout, the weights and the values of alpha are not in the paper's public text. Here the
    critic is separable, and it and the baseline are small transformers, which the paper finds better than MLPs (app.,
    Table 4); the anchor y is the student. Of the paper's augmentations back-translation is left out. A synonym is one
    of the eight tokens nearest in the teacher's embeddings.
    """

    health = {
        "teacher_agreement": "share of a batch for which argmax z_S is argmax z_T",
        "mutual_information": "I_alpha in nats, averaged over pairs of layers by the layer map; at most about "
        "1 + log(B / alpha) for a batch of B; of the batch itself, not of its augmented copy",
    }

    task = "classify-text"

    @dataclass
    class Options:
        # Of a copy that the teacher answers, without labels.
        augmentation: Literal["none", "contextual", "edits", "mixup"] = "none"
        edit_rate: float = field(default=0.2, metadata={"min": 0, "max": 1})  # share of tokens edited or replaced
        masked_lm: str = ""  # folder of the masked language model of "contextual"; its vocabulary is the student's
        mixup: float = field(default=0.4, metadata={"min": 1e-3})  # a of Beta(a, a)
        layer_map: Literal["skip", "uniform", "last", "emd"] = "skip"
        intermediate: Literal["none", "ce", "mse", "l2", "cosine", "pkd", "mi"] = "mi"
        alpha: float = field(default=0.5, metadata={"min": 0, "max": 1})  # of MI-alpha; 1: InfoNCE, 0: TUBA
        anchor: Literal["student", "teacher"] = "student"  # whose baseline; the other holds the keys
        critic: Literal["transformer", "mlp"] = "transformer"
        critics: Literal["per-pair", "shared"] = "per-pair"
        critic_width: int = field(default=128, metadata={"min": 1})
        critic_heads: int = field(default=4, metadata={"min": 1})
        critic_rate: float = field(default=2.0, metadata={"min": 0})  # factor on the learning rate for the critics
        prediction: Literal["none", "ce", "mse"] = "ce"
        temperature: float = field(default=1.0, metadata={"min": 1e-6})
        intermediate_weight: float = field(default=1.0, metadata={"min": 0})
        prediction_weight: float = field(default=1.0, metadata={"min": 0})
        label_weight: float = field(default=1.0, metadata={"min": 0})
        augmented_weight: float = field(default=1.0, metadata={"min": 0})  # of the augmented copy's losses

        # Steps of the teacher's fine-tuning, as a share of the student's; 0: it is fine-tuned already.
        tune_share: float = field(default=0.0, metadata={"min": 0})

    options: Options

    def build(self, student: nn.Module, teacher: nn.Module) -> None:
        o = self.options
        if o.intermediate == o.prediction == "none" and not o.label_weight:
            raise UserError(
                "distiller has nothing to learn from", cure="choose a loss, or set options.label_weight to 1"
            )
        if o.critic_width % o.critic_heads:
            raise UserError(
                f"options.critic_width {o.critic_width} does not divide into {o.critic_heads} heads",
                cure="choose a multiple",
            )
        self.student = unfrozen(copy.deepcopy(student))
        self.teacher = (unfrozen if o.tune_share else frozen)(copy.deepcopy(teacher))
        self.masked_lm = self.read_masked_lm() if o.augmentation == "contextual" else None
        m, n = depth(self.teacher), depth(self.student)
        layers = None if o.layer_map == "emd" else layer_map(o.layer_map, m, n)
        self.fixed = as_weights(layers, m) if layers else None
        # Teacher and student layers, from 0, that are compared: all where the plan follows from the costs.
        self.pairs = [(i, j) for i in range(m) for j in range(n) if layers is None or layers[j] == i]
        self.depths = m, n
        read = o.intermediate != "none"
        self.mine = EncoderReader(self.student, range(1, n + 1) if read else ())
        self.theirs = EncoderReader(self.teacher, range(1, m + 1) if read else ())
        self.adapters, self.critics = nn.ModuleDict(), nn.ModuleDict()
        mine, theirs = self.mine.shapes(), self.theirs.shapes()
        if o.intermediate == "mi":
            for i, j in self.pairs:
                x, y = theirs[f"h{i + 1}"][-1], mine[f"h{j + 1}"][-1]
                if o.anchor == "teacher":
                    x, y = y, x
                key = self.critic_of(i, j)
                if key not in self.critics:
                    self.critics[key] = MICritic(x, y, o.critic_width, o.critic_heads, o.critic)
        elif read:
            self.adapters = Projectors(mine, theirs, {f"h{j + 1}": f"h{i + 1}" for i, j in self.pairs})

    def critic_of(self, i: int, j: int) -> str:
        return "shared" if self.options.critics == "shared" else f"{i}-{j}"

    def read_masked_lm(self) -> nn.Module:
        if not self.options.masked_lm:
            raise UserError(
                "options.augmentation=contextual needs a masked language model",
                cure="give its folder as options.masked_lm, or choose options.augmentation=edits",
            )
        network, self.words = load_masked_lm(Path(self.options.masked_lm).expanduser())
        return frozen(network)

    def prepare(self, data: Any) -> None:
        tokenizer = data.tokenizer
        self.special, self.pad = set(tokenizer.all_special_ids), int(tokenizer.pad_token_id)
        self.longest = min((n for n in map(positions, (self.student, self.teacher)) if n), default=0)
        if self.options.augmentation == "edits":
            found = nearest_tokens(token_table(self.teacher).weight, self.special)
            self.neighbours = found.to(next(self.student.parameters()).device)
        if self.masked_lm is not None:
            check_vocabularies({"the student": tokenizer, self.options.masked_lm: self.words})
            self.mask_id = int(self.words.mask_token_id)

    def teachers(self) -> dict[str, nn.Module]:
        return {"teacher-tuned" if self.options.tune_share else "teacher": self.teacher}

    def stages(self) -> tuple[Stage, ...]:
        distil = Stage("distil", ("distil",), own_schedule=True)
        tune = Stage("tune", ("tune",), self.options.tune_share, own_schedule=True)
        return (tune, distil) if self.options.tune_share else (distil,)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1

    def rate(self, turn: Turn, name: str) -> float:
        return self.options.critic_rate if name.startswith("critics.") else 1.0

    @turn(trains="teacher", optim=Optim(lr=5e-5, weight_decay=0.01, clip_norm=1.0), when="tune_share")
    def tune(self, batch: Batch) -> Terms:
        """The teacher, where it is not fine-tuned yet."""
        return {"label": F.cross_entropy(class_logits(self.teacher, text_inputs(batch)), batch["cond"]["label"])}

    # --- the student --------------------------------------------------------------------------------------------------
    @turn(trains=("student", "adapters", "critics"), optim=Optim(lr=5e-5, weight_decay=0.01, clip_norm=1.0))
    def distil(self, batch: Batch) -> Terms:
        """``L``, and the same without labels on an augmented copy: one step for student, adapters and critics."""
        o = self.options
        seen = self.look(batch)
        terms = self.compare(seen, "tokens")
        if o.label_weight:
            terms["label"] = o.label_weight * F.cross_entropy(seen.found.logits, batch["cond"]["label"])
        if o.augmentation != "none":
            again = self.compare(self.look(*self.augmented(batch)), "augmented tokens")
            terms |= {f"augmented_{name}": o.augmented_weight * loss for name, loss in again.items()}
        same = seen.found.logits.argmax(-1) == seen.taught.logits.argmax(-1)
        self.note("teacher_agreement", same.float().mean())
        return terms

    def look(self, batch: Batch, mix: tuple[Tensor, Tensor] | None = None) -> Pass:
        """Both networks on one batch; ``mix``: mixup's row order and weights, the same for both."""
        with ExitStack() as stack:
            for network in (self.student, self.teacher) if mix is not None else ():
                stack.enter_context(mixed_inputs(network, *mix))  # type: ignore[misc]
            with torch.no_grad():
                taught = self.theirs(batch)
            found = self.mine(batch)
        ids, keep = batch["input_ids"], batch["attention_mask"].bool()
        shown = ids.masked_fill(~keep, -1)
        distinct = (shown[:, None] != shown[None]).any(-1)  # equal texts are no negatives of one another
        return Pass(found, taught, keep, distinct)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Real tokens, of the batch and of its augmented copy, whose edits are drawn first in the turn."""
        found = {"tokens": batch["attention_mask"].sum()}
        if self.options.augmentation == "edits":
            found["augmented tokens"] = self.augmented(batch)[0]["attention_mask"].sum()
        elif self.options.augmentation == "mixup":
            keep = batch["attention_mask"].bool()
            found["augmented tokens"] = (keep | keep.roll(1, 0)).sum()
        elif self.options.augmentation == "contextual":
            found["augmented tokens"] = found["tokens"]
        return found

    def augmented(self, batch: Batch) -> tuple[Batch, tuple[Tensor, Tensor] | None]:
        """Replacement in context, random edits, or mixup: each row's embeddings mixed with those of the row before it.
        A batch, and mixup's row order and weights."""
        ids, keep = batch["input_ids"], batch["attention_mask"].bool()
        if self.masked_lm is not None:
            ids = contextual_replacement(
                ids, keep, self.draw, self.options.edit_rate, self.masked_lm, self.mask_id, self.special
            )
            return {"input_ids": ids, "attention_mask": keep}, None
        if self.options.augmentation == "edits":
            ids, keep = random_edits(
                ids, keep, self.draw, self.options.edit_rate, self.neighbours, self.special, self.pad, self.longest
            )
            return {"input_ids": ids, "attention_mask": keep}, None
        weight = mixup_weights(len(ids), self.draw, self.options.mixup).to(ids.device)
        order = torch.arange(len(ids), device=ids.device).roll(1)
        return {"input_ids": ids, "attention_mask": keep | keep[order]}, (order, weight)

    def compare(self, seen: Pass, tokens: str) -> dict[str, Tensor]:
        """``tokens``: what :meth:`counts` calls those of this pass. Mutual information is a bound over texts, no mean
        over tokens."""
        o = self.options
        terms: dict[str, Tensor] = {}
        if o.intermediate != "none":
            found, bound = self.intermediate(seen)
            if o.intermediate == "mi" and tokens == "tokens":
                self.note("mutual_information", bound)
            terms["intermediate"] = o.intermediate_weight * (
                found if o.intermediate == "mi" else self.over(tokens, found)
            )
        if o.prediction == "ce":
            p = (seen.taught.logits.float() / o.temperature).softmax(-1)
            terms["prediction"] = o.prediction_weight * soft_cross_entropy(
                seen.found.logits, p, temperature=o.temperature
            )
        elif o.prediction == "mse":
            terms["prediction"] = o.prediction_weight * F.mse_loss(seen.found.logits, seen.taught.logits)
        return terms

    # --- intermediate states ------------------------------------------------------------------------------------------
    def intermediate(self, seen: Pass) -> tuple[Tensor, Tensor]:
        """``sum_ij m_ij l_ij``, and minus its average by m, which for MI-alpha is the bound. m is the fixed map, or the
        optimal transport plan for the costs of this batch."""
        losses = self.losses(seen)
        plan = self.plan(losses)
        total = mapped_loss(plan, losses)
        return total, -total / plan.sum().to(total)

    def plan(self, losses: Tensor) -> Tensor:
        """``m [M, N]``."""
        return emd(losses - losses.min()) if self.fixed is None else self.fixed  # a constant changes no plan

    def losses(self, seen: Pass) -> Tensor:
        """``l_ij`` of every compared pair, ``[M, N]``; 0 elsewhere."""
        m, n = self.depths
        zero = seen.found.logits.new_zeros(())
        found = {pair: self.loss(seen, *pair) for pair in self.pairs}
        return torch.stack([torch.stack([found.get((i, j), zero) for j in range(n)]) for i in range(m)])

    def loss(self, seen: Pass, i: int, j: int) -> Tensor:
        """``l_ij``, teacher and student layers counted from 0; for MI-alpha minus the bound."""
        o = self.options
        theirs, mine, keep = seen.taught.hidden[i + 1], seen.found.hidden[j + 1], seen.keep
        if o.intermediate == "mi":
            x, y = (theirs, mine) if o.anchor == "student" else (mine, theirs)
            scores, log_q = self.critics[self.critic_of(i, j)](x, y, keep, keep)
            return -i_alpha(scores, log_q, o.alpha, seen.distinct)
        return distance(o.intermediate, self.adapters.project(f"h{j + 1}", mine), theirs, keep)  # type: ignore[operator]

    def sampler(self) -> ForwardPass:
        return ForwardPass()


def distance(kind: str, mine: Tensor, theirs: Tensor, keep: Tensor) -> Tensor:
    """CE: cross-entropy of the channels' softmax; PKD: squared distance of states of length 1."""
    if kind == "ce":
        return soft_cross_entropy(mine, theirs.float().softmax(-1), keep=keep)
    plain: Mapping[str, Any] = {"mse": features.mse, "l2": features.l2, "cosine": features.cosine}
    if kind == "pkd":
        return features.l2(mine, theirs, normalise="l2", keep=keep)
    return plain[kind](mine, theirs, keep=keep)
