"""MEAL V2: soft labels of an ensemble against labels, one teacher, both together, and with a discriminator."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm

TEACH, INIT, DISTIL = 150, 200, 200


def points(name: str, **options: Any) -> Arm:
    """Three teachers on noisy labels, the student on the same, then soft labels: steps as above, batch 64."""
    shares = {"teach_share": TEACH, "init_share": INIT, "distil_share": DISTIL, "settle": 0.4, "shift": 1}
    options = {**shares, "discriminator": 0.0, **options}
    steps = sum(int(options[f"{stage}_share"]) for stage in ("teach", "init", "distil"))
    return Arm(
        name,
        "meal-v2",
        options=options,
        engine={"steps": steps, "batch": 64, "log_every": 50, "optim": {"distil": {"lr": 0.02}}},
    )


def accuracy(id: str, statement: str, left: str, op: str, right: str, offset: float, paper: str = "") -> Claim:
    return Claim(id, statement, paper, "accuracy", left, op, right=right, offset=offset)  # type: ignore[arg-type]


ENSEMBLE = points("ensemble")
MECHANISM = Proof(
    "meal-v2",
    "mechanism",
    "digits",
    arms=(
        ENSEMBLE,
        points("labels-continued", gt_weight=1.0),
        points("one-teacher", teachers=1),
        points("ensemble-and-labels", gt_weight=0.5),
        points("ensemble-and-discriminator", discriminator=1.0),
        points("random-start", init_share=0),
        ENSEMBLE.with_("untouched", engine={"steps": 0}),
        ENSEMBLE.with_("shuffled-teachers", teacher="shuffled"),
    ),
    claims=(
        accuracy(
            "soft-labels",
            "Soft labels of an ensemble beat as many more steps on the labels",
            "ensemble",
            ">=",
            "labels-continued",
            0.01,
            "abstract",
        ),
        accuracy("ensemble", "Three teachers are better than one", "ensemble", ">=", "one-teacher", 0.005, "abstract"),
        accuracy(
            "labels-unneeded",
            "From a trained start, labels beside the soft ones add nothing",
            "ensemble",
            ">=",
            "ensemble-and-labels",
            -0.01,
            "abstract",
        ),
        accuracy("start", "A trained start matters", "ensemble", ">=", "random-start", 0.01, "abstract"),
        accuracy(
            "discriminator-harmless",
            "The discriminator does not hurt",
            "ensemble-and-discriminator",
            ">=",
            "ensemble",
            -0.01,
            "abstract",
        ),
        accuracy("learns", "Training beats the untouched network", "ensemble", ">=", "untouched", 0.5),
        Claim(
            "control-shuffled",
            "Control: teachers that answer for the wrong class ruin the student",
            "",
            "accuracy",
            "shuffled-teachers",
            "<=",
            0.5,
            "ensemble",
        ),
    ),
    note="Noisy labels stand for those of ImageNet. Nothing is claimed of what the discriminator gains: the "
    "paper has no comparison with and without it.",
)

MAIN = recipe_arm("meal-v2")
IMAGE = Proof(
    "meal-v2",
    "image",
    "fashion-labels",
    arms=(
        MAIN,
        MAIN.with_("labels-continued", options={"gt_weight": 1.0}),
        MAIN.with_("one-teacher", options={"teachers": 1}),
        MAIN.with_("untouched", engine={"steps": 0}),
        MAIN.with_("shuffled-teachers", teacher="shuffled"),
    ),
    claims=(
        accuracy(
            "soft-labels",
            "Soft labels of an ensemble beat as many more steps on the labels",
            "meal-v2",
            ">=",
            "labels-continued",
            0.005,
            "abstract",
        ),
        accuracy("ensemble", "Three teachers are no worse than one", "meal-v2", ">=", "one-teacher", 0.0, "abstract"),
        accuracy("learns", "Training beats the untouched network", "meal-v2", ">=", "untouched", 0.5),
        Claim(
            "control-shuffled",
            "Control: teachers that answer for the wrong class ruin the student",
            "",
            "accuracy",
            "shuffled-teachers",
            "<=",
            0.5,
            "meal-v2",
        ),
    ),
)

PROOFS = (IMAGE, MECHANISM)
