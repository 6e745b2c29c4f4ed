"""ERNIE-Tiny: the four stages against fewer, another order, no states in the last stage, and labels alone."""

from __future__ import annotations

from typing import Any

from stillroom.methods.language.ernie_tiny import TABLE
from stillroom.proofs.base import Arm, Claim, Proof

STEPS = 900
ROWS = {str(row["name"]): row for row in TABLE}


def plan(name: str, shares: dict[str, int], losses: dict[str, list[str]] | None = None, **options: Any) -> Arm:
    """Stages are rows of the paper's table, in this order, for these steps; ``losses`` replaces a row's."""
    rows = [
        {**ROWS[stage], "share": float(steps)} | ({"losses": losses[stage]} if losses and stage in losses else {})
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


PROOFS = (
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
        claims=(
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
            claim(
                "stages", "Four stages beat the last one alone", "accuracy", ">=", "TSD-alone", "abstract", offset=0.04
            ),
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
        ),
        note="The teacher has 4 layers x 128 and was pretrained for minutes on 40,000 definitions; the student has 2 "
        "layers x 64. 2,000 definitions are labelled. All arms take 900 steps of 32 texts.",
    ),
)
