"""Progressive distillation: halving in rounds against the last halving alone, in as many updates."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.flow_maps import TEACHER, TEACHER_1, beats_one_step
from stillroom.proofs.image import recipe_arm
from stillroom.proofs.points import shuffled_claim

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
    learns = beats_one_step("progressive", metric, "The student beats its teacher's own single step", "Figure 4")
    return rounds, learns


MECHANISM = Proof(
    "progressive",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        MAIN.with_("last halving alone", options={"begin": 2}),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
        TEACHER_1,
    ),
    claims=(
        *claims("ced"),
        shuffled_claim("progressive", 3.0),
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
        TEACHER_1,
        TEACHER,
    ),
    claims=claims("fd"),
)

PROOFS = (IMAGE, MECHANISM)
