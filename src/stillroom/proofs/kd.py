"""KD: what plain regression on stored paths comes to, in one step and in two."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import card_sampler, recipe_arm

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
    one = Claim(
        "one-step",
        "A student that learnt where paths end beats its teacher's own single step",
        "section 4",
        metric,
        "kd",
        "<=",
        0.5,
        "teacher-1",
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
            5.0,
            "kd",
        ),
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
        Arm("teacher-1", sampler={"name": "few-step", "times": (1.0,)}),
        Arm("teacher", sampler=card_sampler("fashion-teacher")),
    ),
    claims=claims("fd"),
)

PROOFS = (IMAGE, MECHANISM)
