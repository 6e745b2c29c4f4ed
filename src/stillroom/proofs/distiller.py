"""Distiller: mutual information between states against distances and against none, layer maps, and augmentation."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof

STEPS = 300
START = Arm(
    "general-distilled",
    "ernie-tiny",
    options={
        "stages": [{"name": "GD", "teacher": "pretrained", "data": "general", "losses": ["latent"]}],
        "tune_share": 0.0,
    },
    engine={
        "steps": 400, "batch": 32, "warmup": 20, "schedule": "linear", "log_every": 50,
        "optim": {"distil": {"lr": 1e-3}},
    },
)  # fmt: skip
"""What every arm starts from, as the paper's students do: it has learnt the teacher's states on all texts."""


def pipeline(name: str, labelled: int = 2000, **options: Any) -> Arm:
    """A student of 2 layers x 64 goes on for as many steps of as many labelled texts (augmented copies beside)."""
    return Arm(
        name,
        "distiller",
        options={"critic_width": 32, "critic_rate": 1.0, "intermediate_weight": 0.1, **options},
        engine={
            "steps": STEPS, "batch": 32, "warmup": 20, "schedule": "linear", "log_every": 50,
            "optim": {"distil": {"lr": 1e-3}},
        },
        data={"labelled": labelled},
        after=START,
    )  # fmt: skip


def claim(id: str, statement: str, left: str, op: str, right: str, offset: float, paper: str = "abstract") -> Claim:
    return Claim(id, statement, paper, "accuracy", left, op, right=right, offset=offset)  # type: ignore[arg-type]


def few(name: str, **options: Any) -> Arm:
    """200 labels for the student and the same 200 for its teacher, whose states it began with too."""
    start = START.with_("general-distilled", teacher="few")
    return pipeline(name, 200, **{"alpha": 0.5, **options}).with_(name, teacher="few", after=start)


MI = pipeline("mi-0.5", alpha=0.5)
NO_TEACHER = {"intermediate": "none", "prediction": "none"}
CLAIMS = (
    claim("intermediate", "States taught by mutual information beat none", "mi-0.5", ">=", "none", 0.01),
    claim("mi-mse", "Mutual information beats the squared error of projected states", "mi-0.5", ">=", "mse", 0.01),
    claim(
        "augmentation-few",
        "Augmentation helps where teacher and student have 200 labelled texts",
        "few, edits",
        ">=",
        "few",
        0.02,
    ),
    claim(
        "augmentation-student",
        "It helps where the student has 200 and the teacher had 2,000",
        "few, teacher of many, edits",
        ">=",
        "few, teacher of many",
        0.02,
    ),
    claim(
        "augmentation-many",
        "It gains at most half of that where they are many",
        "mi-0.5, edits",
        "<=",
        "mi-0.5",
        0.01,
    ),
    claim(
        "prediction",
        "The prediction loss matters less: squared error of logits costs at most a point",
        "mi-0.5, logits by mse",
        ">=",
        "mi-0.5",
        -0.01,
    ),
    claim("teacher", "It beats the same student on the labels alone", "mi-0.5", ">=", "labels-alone", 0.01, ""),
    claim(
        "few-teacher",
        "So it does where both have the same 200 labels",
        "few",
        ">=",
        "few, labels-alone",
        0.01,
        "",
    ),
    claim(
        "few-knowledge",
        "A teacher of 2,000 labels teaches a student of 200 more than one of the same 200",
        "few, teacher of many",
        ">=",
        "few",
        0.02,
        "",
    ),
    claim("learns", "Training beats the untouched network", "mi-0.5", ">=", "untouched", 0.1, ""),
    claim(
        "control-shuffled",
        "Control: a teacher that reads other texts spoils the student",
        "shuffled-teacher",
        "<=",
        "mi-0.5",
        -0.02,
        "",
    ),
)

TEXT_STEPS = 450
TEXT_START = START.with_("general-distilled", options={"attention": "none"}, engine={"steps": 900})


def text_pipeline(name: str, **options: Any) -> Arm:
    return pipeline(name, **options).with_(name, after=TEXT_START, engine={"steps": TEXT_STEPS})


TEXT = text_pipeline("mi-0.5", alpha=0.5)
LABELS = text_pipeline("labels-alone", **NO_TEACHER)
TEXT_ARMS = (
    TEXT,
    text_pipeline("none", intermediate="none"),
    text_pipeline("mse", intermediate="mse"),
    LABELS.with_("labels-alone", after=None, engine={"steps": TEXT_START.engine["steps"] + TEXT_STEPS}),
    TEXT.with_("untouched", engine={"steps": 0}),
    TEXT.with_("shuffled-teacher", teacher="shuffled"),
)

PROOFS = (
    Proof(
        "distiller",
        "text",
        "glosses-minilm-task",
        arms=TEXT_ARMS,
        claims=tuple(c for c in CLAIMS if {c.left, c.right} <= {arm.name for arm in TEXT_ARMS}),
        note="The teacher is all-MiniLM-L6-v2 (6 layers x 384); the student has 2 layers x 96. 2,000 of 20,000 "
        "definitions are labelled, the same for teacher and students and for all seeds, which have one teacher. Every "
        "student but that of labels-alone was distilled on all texts before, without labels, in 900 steps; "
        "labels-alone begins at random and takes as many steps as both stages of the others.",
    ),
    Proof(
        "distiller",
        "mechanism",
        "glosses-task",
        arms=(
            MI,
            pipeline("mi-0.1", alpha=0.1),
            pipeline("mi-1.0", alpha=1.0),
            pipeline("none", intermediate="none"),
            pipeline("mse", intermediate="mse"),
            pipeline("cosine", intermediate="cosine"),
            pipeline("mse-last", intermediate="mse", layer_map="last"),
            pipeline("mse-emd", intermediate="mse", layer_map="emd"),
            pipeline("mi-0.5, logits by mse", alpha=0.5, prediction="mse"),
            pipeline("mi-0.5, edits", alpha=0.5, augmentation="edits"),
            few("few"),
            few("few, edits", augmentation="edits"),
            few("few, labels-alone", **NO_TEACHER).with_(
                "few, labels-alone", after=None, engine={"steps": START.engine["steps"] + STEPS}
            ),
            pipeline("few, teacher of many", 200, alpha=0.5),
            pipeline("few, teacher of many, edits", 200, alpha=0.5, augmentation="edits"),
            pipeline("few, teacher of many, mixup", 200, alpha=0.5, augmentation="mixup"),
            pipeline("labels-alone", **NO_TEACHER),
            MI.with_("untouched", engine={"steps": 0}),
            MI.with_("shuffled-teacher", teacher="shuffled"),
        ),
        claims=CLAIMS,
        note="The teacher has 4 layers x 128 and was fine-tuned on 2,000 definitions; in the arms few, few, edits and "
        "few, labels-alone on the 200 that the student sees. Every student was taught its teacher's states on all "
        "texts before, without labels, in 400 steps; few, labels-alone begins at random and takes as many steps as "
        "both stages of the others. An augmented step costs two.",
    ),
)
