"""Progressive distillation: halving in rounds against the last halving alone, in as many updates."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import card_sampler, recipe_arm

MAIN = Arm(
    "progressive",
    "progressive",
    options={"begin": 16, "end": 1},
    engine={
        "steps": 1000,
        "batch": 128,
        "warmup": 20,
        "schedule": "cosine",
        "log_every": 50,
        "optim": {"all": {"lr": 1e-3}},
    },
)


def claims(metric: str) -> tuple[Claim, ...]:
    """What both levels say."""
    rounds = Claim(
        "rounds",
        "Sixteen steps halved in rounds give a nearer single step than two steps halved once, in as many updates",
        "section 3",
        metric,
        "progressive",
        "<=",
        0.8,
        "last halving alone",
    )
    learns = Claim(
        "learns",
        "The student beats its teacher's own single step",
        "Figure 4",
        metric,
        "progressive",
        "<=",
        0.5,
        "teacher-1",
    )
    return rounds, learns


MECHANISM = Proof(
    "progressive",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        MAIN.with_("last halving alone", options={"begin": 2}),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
        Arm("teacher-1", sampler={"name": "few-step", "times": (1.0,)}),
    ),
    claims=(
        *claims("ced"),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for the wrong class ruins the student",
            "",
            "ced",
            "shuffled-teacher",
            ">=",
            3.0,
            "progressive",
        ),
    ),
)
PROGRESSIVE = recipe_arm("progressive")
IMAGE = Proof(
    "progressive",
    "image",
    "fashion",
    arms=(
        PROGRESSIVE,
        PROGRESSIVE.with_("last halving alone", options={"begin": 2}),
        Arm("teacher-1", sampler={"name": "few-step", "times": (1.0,)}),
        Arm("teacher", sampler=card_sampler("fashion-teacher")),
    ),
    claims=claims("fd"),
)

PROOFS = (IMAGE, MECHANISM)
