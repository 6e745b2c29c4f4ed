"""KD: what plain regression on stored paths comes to, in one step and in two."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.flow_maps import TEACHER, TEACHER_1, beats_one_step
from stillroom.proofs.image import recipe_arm
from stillroom.proofs.points import shuffled_claim

MAIN = Arm(
    "kd",
    "kd",
    options={"paths": 12_800, "path_steps": 20, "stored_precision": "float32"},
    engine={
        "steps": 1000,
        "batch": 128,
        "warmup": 50,
        "schedule": "cosine",
        "log_every": 100,
        "optim": {"all": {"lr": 1e-3}},
        "ema": [{"name": "ema", "of": "student", "decay": 0.98}],
        "export": "ema",
    },
)


def claims(metric: str) -> tuple[Claim, ...]:
    """What both levels say."""
    one = beats_one_step(
        "kd",
        metric,
        "A student that learnt where paths end beats its teacher's own single step",
        "section 4",
        claim="one-step",
    )
    two = Claim(
        "two-steps",
        "Two steps of it are no farther than one",
        "not in the paper",
        metric,
        "kd, 2 steps",
        "<=",
        1.0,
        "kd",
    )
    return one, two


MECHANISM = Proof(
    "kd",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        MAIN.with_("kd, 2 steps", options={"steps": 2}),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
        TEACHER_1,
    ),
    claims=(
        *claims("ced"),
        shuffled_claim("kd"),
    ),
)
KD = recipe_arm("kd")
IMAGE = Proof(
    "kd",
    "image",
    "fashion",
    arms=(
        KD,
        KD.with_("kd, 2 steps", options={"steps": 2}),
        TEACHER_1,
        TEACHER,
    ),
    claims=claims("fd"),
)

PROOFS = (IMAGE, MECHANISM)
