"""ERNIE-Tiny: the four stages against fewer, another order, no states in the last stage, and labels alone."""

from __future__ import annotations

from typing import Any

from stillroom.methods.language.ernie_tiny import TABLE
from stillroom.proofs.base import Arm, Claim, Proof

STEPS = 900
ROWS = {str(row["name"]): row for row in TABLE}


def plan(name: str, shares: dict[str, int], losses: dict[str, list[str]] | None = None, **options: Any) -> Arm:
    """Stages are rows of the paper's table, in this order, for these steps; ``losses`` replaces a row's. A stage that
    is alone runs at the full rate, as the first of several does, not at the last one's 0.6."""
    alone = {"lr": 1.0} if len(shares) == 1 else {}
    rows = [
        {**ROWS[stage], "share": float(steps)}
        | alone
        | ({"losses": losses[stage]} if losses and stage in losses else {})
        for stage, steps in shares.items()
    ]
    return Arm(
        name,
        "ernie-tiny",
        options={"stages": rows, **options},
        engine={
            "steps": sum(shares.values()), "batch": 32, "warmup": 20, "schedule": "linear", "log_every": 50,
            "optim": {"distil": {"lr": 1e-3}},
        },
    )  # fmt: skip


FULL = plan("four-stages", {"GD": 300, "GED": 200, "TAD": 200, "TSD": 200})


def claim(id: str, statement: str, metric: str, op: str, right: str, paper: str = "", **margin: float) -> Claim:
    return Claim(id, statement, paper, metric, "four-stages", op, right=right, **margin)  # type: ignore[arg-type]


CLAIMS = (
    claim(
        "enhanced-kl",
        "General text under the fine-tuned teacher brings the student nearer to it than as much under the "
        "pretrained one",
        "kl",
        "<=",
        "no-GED",
        "abstract",
        factor=0.93,
    ),
    claim("enhanced", "And it raises the accuracy", "accuracy", ">=", "no-GED", "abstract", offset=0.005),
    claim("stages", "Four stages beat the last one alone", "accuracy", ">=", "TSD-alone", "abstract", offset=0.04),
    claim(
        "order",
        "From general to specific is no worse than another order",
        "accuracy",
        ">=",
        "another-order",
        "abstract",
        offset=0.0,
    ),
    claim(
        "latent-at-the-end",
        "States beside both label losses in the last stage are no worse than none",
        "accuracy",
        ">=",
        "no-latent-at-the-end",
        "abstract",
        offset=0.0,
    ),
    claim(
        "teacher",
        "It beats the same student on the labels alone, for as many steps",
        "accuracy",
        ">=",
        "labels-alone",
        offset=0.02,
    ),
    claim("learns", "Training beats the untouched network", "accuracy", ">=", "untouched", offset=0.1),
    claim(
        "control-shuffled",
        "Control: teachers that read other texts bring the student less near",
        "kl",
        "<=",
        "shuffled-teachers",
        factor=0.8,
    ),
)

TEXT_STEPS = 1350
TEXT = plan("four-stages", {"GD": 450, "GED": 300, "TAD": 300, "TSD": 300}, attention="none")
TEXT_ARMS = (
    TEXT,
    plan("no-GED", {"GD": 750, "TAD": 300, "TSD": 300}, attention="none"),
    plan("TSD-alone", {"TSD": TEXT_STEPS}, attention="none"),
    plan("labels-alone", {"TSD": TEXT_STEPS}, {"TSD": ["hard"]}, attention="none"),
    TEXT.with_("untouched", engine={"steps": 0}),
    TEXT.with_("shuffled-teachers", teacher="shuffled"),
)

PROOFS = (
    Proof(
        "ernie-tiny",
        "text",
        "glosses-minilm",
        arms=TEXT_ARMS,
        claims=tuple(c for c in CLAIMS if c.right in {arm.name for arm in TEXT_ARMS}),
        note="The teacher is all-MiniLM-L6-v2 (6 layers x 384); the student has 2 layers x 96 and begins at random. "
        "2,000 of 20,000 definitions are labelled, the same for teacher and students and for all seeds, which have one "
        "teacher. Attention is left out: the states alone of the teacher are stored. All arms take 1,350 steps of 32 "
        "texts.",
    ),
    Proof(
        "ernie-tiny",
        "mechanism",
        "glosses",
        arms=(
            FULL,
            plan("no-GED", {"GD": 500, "TAD": 200, "TSD": 200}),
            plan("no-latent-at-the-end", {"GD": 500, "TSD": 400}, {"TSD": ["soft", "hard"]}),
            plan("TSD-alone", {"TSD": STEPS}),
            plan("another-order", {"TAD": 200, "GED": 200, "GD": 300, "TSD": 200}),
            plan("labels-alone", {"TSD": STEPS}, {"TSD": ["hard"]}),
            FULL.with_("untouched", engine={"steps": 0}),
            FULL.with_("shuffled-teachers", teacher="shuffled"),
        ),
        claims=CLAIMS,
        note="The teacher has 4 layers x 128 and was pretrained for minutes on 40,000 definitions; the student has 2 "
        "layers x 64. 2,000 definitions are labelled. All arms take 900 steps of 32 texts.",
    ),
)
