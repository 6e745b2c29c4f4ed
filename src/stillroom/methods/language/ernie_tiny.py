"""ERNIE-Tiny: four stages from general to task-specific, each of which changes one thing (arXiv 2106.02241)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.errors import UserError, nearest
from stillroom.losses.features import attention_mse, mse
from stillroom.losses.layer_maps import layer_map
from stillroom.losses.soft_labels import soft_cross_entropy
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, frozen, register, turn, unfrozen
from stillroom.networks.projectors import Projectors
from stillroom.networks.recognition import ForwardPass, class_logits
from stillroom.surgery.text_reader import EncoderReader, Reading, copy_layers, depth, text_inputs

LOSSES = ("latent", "soft", "hard")


@dataclass(frozen=True)
class Record:
    """One row of the paper's table. ``share`` of the steps; ``lr``: factor on the learning rate."""

    name: str
    teacher: Literal["pretrained", "tuned"]
    data: Literal["general", "task"]
    losses: tuple[str, ...] = ("latent",)
    share: float = 1.0
    lr: float = 1.0


TABLE: list[dict[str, Any]] = [
    {"name": "GD", "teacher": "pretrained", "data": "general", "losses": ["latent"], "share": 3.0},
    {"name": "GED", "teacher": "tuned", "data": "general", "losses": ["latent"], "share": 2.0},
    {"name": "TAD", "teacher": "tuned", "data": "task", "losses": ["latent"], "share": 2.0},
    {"name": "TSD", "teacher": "tuned", "data": "task", "losses": ["latent", "soft", "hard"], "share": 2.0, "lr": 0.6},
]
"""General, general-enhanced, task-adaptive and task-specific distillation: between two rows one entry changes."""


@register(
    "ernie-tiny",
    Paper(
        title="ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression",
        arxiv="2106.02241",
        year=2021,
    ),
)
class ERNIETiny(Method):
    """A small text encoder learns a pretrained teacher's states on general text, then the fine-tuned teacher's on the
    same text, then on the task's texts, and then its answers and the labels too.

    With H^l the states after layer l (0: the embeddings), A^l the attention scores before their softmax, z the logits,
    g(l) the teacher layer of student layer l and W_l a trained map to the teacher's width:

        L_lat  = sum_(l = 0..N) MSE(H_S^l W_l, sg H_T^g(l)) + sum_(l = 1..N) MSE(A_S^l, sg A_T^g(l))
        L_soft = CE(softmax(sg z_T / tau), softmax(z_S / tau)),    L_hard = CE(y, softmax(z_S))

        GD    pretrained teacher    general text           L_lat
        GED   fine-tuned teacher    general text           L_lat
        TAD   fine-tuned teacher    the task's texts       L_lat
        TSD   fine-tuned teacher    texts and labels       L_lat + L_soft + L_hard

    Means are over real tokens (pairs of them) and channels (heads). Without a fine-tuned teacher a copy of the
    pretrained one is fine-tuned on the labels first (``tune_share``).

    Departures: the paper fixes the stages; its text that is public does not give the losses' algebra, which is
    TinyBERT's here (arXiv 1909.10351), with weights and temperature 1. Classification only, no regression.
    """

    health = {"teacher_agreement": "share of a batch for which argmax z_S is argmax z_T; in stages with L_soft"}

    task = "classify-text"

    @dataclass
    class Options:
        stages: list[dict[str, Any]] = field(default_factory=lambda: copy.deepcopy(TABLE))  # in the order they run
        tune_share: float = field(default=2.0, metadata={"min": 0})  # of the fine-tuning, where it is done here
        layer_map: Literal["uniform", "skip", "last"] = "uniform"  # all three end with the teacher's last layer
        layers: list[int] = field(default_factory=list)  # instead: teacher layer of each student layer, from 0
        attention: Literal["scores", "maps", "none"] = "scores"  # maps: after the softmax, averaged over heads
        projectors: Literal["per-layer", "shared"] = "per-layer"
        keep_projectors: bool = True  # False: they start anew in each stage
        start: Literal["random", "teacher"] = "random"  # the student's weights: as given, or the mapped teacher layers
        temperature: float = field(default=1.0, metadata={"min": 1e-6})
        latent_weight: float = field(default=1.0, metadata={"min": 0})
        soft_weight: float = field(default=1.0, metadata={"min": 0})
        hard_weight: float = field(default=1.0, metadata={"min": 0})

        def __post_init__(self) -> None:
            read_records(self.stages)

    options: Options
    untuned = True  # whether the fine-tuned teacher is made here

    @classmethod
    def begins(cls, options: Any) -> Literal["given", "new", "teacher"]:
        return "teacher" if options.start == "teacher" else "given"

    def build(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        o = self.options
        self.records = read_records(o.stages)
        if len(teachers) not in (1, 2):
            raise UserError(
                f"ernie-tiny learns from a pretrained teacher and a fine-tuned one, {len(teachers)} were given",
                cure="name the pretrained one, and after it the fine-tuned one if there is one",
            )
        pretrained, tuned = teachers[0], (*teachers[1:], None)[0]
        self.student = unfrozen(copy.deepcopy(student))
        self.pretrained = frozen(copy.deepcopy(pretrained))
        self.untuned = tuned is None
        self.tuned = unfrozen(copy.deepcopy(pretrained)) if tuned is None else frozen(copy.deepcopy(tuned))
        if self.untuned and not o.tune_share and any(r.teacher == "tuned" for r in self.records.values()):
            raise UserError(
                "ernie-tiny has no fine-tuned teacher",
                cure="name it after the pretrained one, or set options.tune_share to 2",
            )
        self.target = self.layers()
        if o.start == "teacher":
            copy_layers(self.student, self.pretrained, [layer - 1 for layer in self.target[1:]])
        attention = range(1, len(self.target)) if o.attention != "none" else ()
        self.mine = EncoderReader(self.student, range(len(self.target)), attention)
        theirs = tuple(self.target[layer] for layer in attention)
        self.readers = {name: EncoderReader(self.role(name), self.target, theirs) for name in ("pretrained", "tuned")}
        heads = self.mine.heads, self.readers["pretrained"].heads
        if o.attention == "scores" and heads[0] != heads[1]:
            raise UserError(
                f"the student has {heads[0]} attention heads, the teacher {heads[1]}: their scores do not pair",
                cure="set options.attention to maps (averaged over heads) or none",
            )
        self.projectors = Projectors(self.mine.shapes(), self.readers["pretrained"].shapes(), self.pairs())

    def layers(self) -> tuple[int, ...]:
        """``g``: the teacher layer of student layers 0..N, embeddings being 0. The last learns from the last."""
        theirs, mine = depth(self.pretrained), depth(self.student)
        if not self.options.layers:
            return (0, *(layer + 1 for layer in layer_map(self.options.layer_map, theirs, mine)))
        if len(self.options.layers) != mine or not all(0 <= layer < theirs for layer in self.options.layers):
            raise UserError(
                f"options.layers {self.options.layers} does not map a student of {mine} layers to {theirs}",
                cure=f"give {mine} numbers from 0 to {theirs - 1}",
            )
        return (0, *(layer + 1 for layer in self.options.layers))

    def pairs(self) -> dict[str, str]:
        """Student tap -> teacher tap, one pair for each projector."""
        shared = self.options.projectors == "shared"
        return {f"h{j}": f"h{g}" for j, g in enumerate(self.target) if j < 2 or not shared}

    def teachers(self) -> dict[str, nn.Module]:
        return {"teacher-pretrained": self.pretrained, "teacher-tuned": self.tuned}

    def stages(self) -> tuple[Stage, ...]:
        """The records, each with optimizers and a schedule of its own; the student and its projectors go on."""
        tune = Stage("tune", ("tune",), self.options.tune_share, own_schedule=True)
        kept = [] if not (self.untuned and self.options.tune_share) else [tune]
        for r in self.records.values():
            data = "general" if r.data == "general" else ""
            own = {"own_schedule": True, "fresh_optimizer": True}
            kept.append(Stage(r.name, ("distil",), r.share, data, r.lr, **own, kind="distil"))
        return tuple(kept)

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        if not self.options.keep_projectors and not resumed and stage.kind == "distil":
            torch.manual_seed(self.draw.index(2**31))
            for projector in self.projectors.values():
                projector.reset_parameters()  # type: ignore[operator]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1

    @turn(trains="tuned", optim=Optim(lr=5e-5, weight_decay=0.01, clip_norm=1.0), when=("untuned", "tune_share"))
    def tune(self, batch: Batch) -> Terms:
        """The fine-tuned teacher, where none was given."""
        logits = class_logits(self.tuned, text_inputs(batch))
        return {"label": F.cross_entropy(logits, batch["cond"]["label"])}

    @turn(trains=("student", "projectors"), optim=Optim(lr=5e-5, weight_decay=0.01, clip_norm=1.0))
    def distil(self, batch: Batch) -> Terms:
        """The losses of the stage's record: ``L_lat``, and in the last ``L_lat + L_soft + L_hard``."""
        o, record = self.options, self.records[self.stage.name]
        with torch.no_grad():
            taught = self.readers[record.teacher](batch)
        found = self.mine(batch)
        terms: dict[str, Tensor] = {}
        if "latent" in record.losses:
            terms |= {name: o.latent_weight * loss for name, loss in self.latent(found, taught, batch).items()}
        if "soft" in record.losses:
            p = (taught.logits.float() / o.temperature).softmax(-1)
            terms["soft"] = o.soft_weight * soft_cross_entropy(found.logits, p, temperature=o.temperature)
        if "hard" in record.losses:
            terms["hard"] = o.hard_weight * F.cross_entropy(found.logits, batch["cond"]["label"])
        if "soft" in record.losses:
            same = found.logits.argmax(-1) == taught.logits.argmax(-1)
            self.note("teacher_agreement", same.float().mean())
        return terms

    def latent(self, found: Reading, taught: Reading, batch: Batch) -> dict[str, Tensor]:
        """``L_lat`` in two parts: states over real tokens, attention over pairs of them."""
        keep = batch["attention_mask"].bool()
        last_projector = min(len(self.target) - 1, 1) if self.options.projectors == "shared" else len(self.target)
        states = [
            mse(self.projectors.project(f"h{min(j, last_projector)}", found.hidden[j]), taught.hidden[g], keep=keep)
            for j, g in enumerate(self.target)
        ]
        terms = {"hidden": self.over("tokens", torch.stack(states).sum())}
        if self.options.attention != "none":
            pairs = [(found.scores[j], taught.scores[g]) for j, g in enumerate(self.target) if j]
            if self.options.attention == "maps":
                pairs = [(mean_map(s, keep), mean_map(t, keep)) for s, t in pairs]
            gaps = [attention_mse(s, t, keep=keep) for s, t in pairs]
            terms["attention"] = self.over("pairs", torch.stack(gaps).sum())
        return terms

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Real tokens, and pairs of them in one text."""
        lengths = batch["attention_mask"].sum(1)
        return {"tokens": lengths.sum(), "pairs": lengths.square().sum()}

    def sampler(self) -> ForwardPass:
        return ForwardPass()


def mean_map(scores: Tensor, keep: Tensor) -> Tensor:
    """Attention probabilities ``[B, 1, L, L]`` of scores ``[B, heads, L, L]``, averaged over heads."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~keep[:, None, None, :], lowest).softmax(-1).mean(1, keepdim=True)


def read_records(rows: list[dict[str, Any]]) -> dict[str, Record]:
    """The stage records by name. Raises UserError for a key or a value that a record does not have."""
    allowed: dict[str, tuple[str, ...]] = {"teacher": ("pretrained", "tuned"), "data": ("general", "task")}
    keys = tuple(Record.__dataclass_fields__)
    found: dict[str, Record] = {}
    for i, row in enumerate(rows):
        where = f"options.stages[{i}]"
        for key in row:
            if key not in keys:
                raise UserError(f"{where} has no key {key!r}{nearest(key, keys)}", cure=f"its keys: {', '.join(keys)}")
        for key in ("name", "teacher", "data"):
            if key not in row:
                raise UserError(f"{where} lacks {key!r}", cure="a stage has name, teacher, data, losses, share, lr")
        for key, choices in allowed.items():
            if row[key] not in choices:
                raise UserError(f"{where}.{key} is {row[key]!r}", cure=f"one of: {', '.join(choices)}")
        losses = tuple(row.get("losses", ("latent",)))
        if not losses or not set(losses) <= set(LOSSES):
            raise UserError(f"{where}.losses is {list(losses)}", cure=f"some of: {', '.join(LOSSES)}")
        if "hard" in losses and row["data"] == "general":
            raise UserError(f"{where} wants labels of general text, which has none", cure="leave out hard")
        if "soft" in losses and row["teacher"] == "pretrained":
            raise UserError(f"{where} wants answers of the pretrained teacher, which has no head", cure="use tuned")
        for key in ("share", "lr"):
            value = row.get(key, 1.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"{where}.{key} is {value!r}", cure="give a number above 0")
        name = str(row["name"])
        if name in found or name == "tune":
            raise UserError(f"{where}: the name {name!r} is taken", cure="give every stage a name of its own")
        values: dict[str, Any] = {**row, "name": name, "losses": losses}
        found[name] = Record(**values)
    if not found:
        raise UserError("options.stages is empty", cure="give at least one stage")
    return found
