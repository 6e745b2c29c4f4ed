"""MEAL V2: soft labels of an ensemble against labels, one teacher, both together, and with a discriminator: with scarce
images and teachers better than the student, and with neither."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm

INIT, DISTIL = 400, 400


def points(name: str, **options: Any) -> Arm:
    """The student on noisy labels, then on soft ones of the bench's teachers: steps as above, batch 64."""
    shares = {"init_share": INIT, "distil_share": DISTIL, "settle": 0.4, "shift": 1}
    options = {**shares, "discriminator": 0.0, **options}
    steps = sum(int(options[f"{stage}_share"]) for stage in ("init", "distil"))
    rates = {"optim": {"distil": {"lr": 0.02}}} if options["distil_share"] else {}
    return Arm(name, "meal-v2", options=options, engine={"steps": steps, "batch": 64, "log_every": 50, **rates})


def accuracy(id: str, statement: str, left: str, op: str, right: str, offset: float, paper: str = "") -> Claim:
    return Claim(id, statement, paper, "accuracy", left, op, right=right, offset=offset)  # type: ignore[arg-type]


def shuffled(main: str) -> Claim:
    return Claim(
        "control-shuffled",
        "Control: teachers that answer for the wrong class ruin the student",
        "",
        "accuracy",
        "shuffled-teachers",
        "<=",
        0.5,
        main,
    )


ENSEMBLE = points("ensemble")
MECHANISM = Proof(
    "meal-v2",
    "mechanism",
    "digits-ensemble",
    arms=(
        ENSEMBLE,
        points("labels-continued", gt_weight=1.0),
        points("start", distil_share=0),
        points("one-teacher").with_("one-teacher", teacher="one"),
        points("ensemble-and-labels", gt_weight=0.5),
        points("ensemble-and-discriminator", discriminator=1.0),
        points("random-start", init_share=0, distil_share=INIT + DISTIL),
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
        accuracy("gain", "They make a trained student better", "ensemble", ">=", "start", 0.01, "abstract"),
        accuracy("ensemble", "Three teachers are better than one", "ensemble", ">=", "one-teacher", 0.005, "abstract"),
        accuracy(
            "labels-unneeded",
            "From a trained start, labels beside the soft ones add nothing",
            "ensemble",
            ">=",
            "ensemble-and-labels",
            -0.007,
            "abstract",
        ),
        accuracy(
            "start",
            "A start trained on labels is better than as many steps more on soft labels",
            "ensemble",
            ">=",
            "random-start",
            0.005,
            "abstract",
        ),
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
        shuffled("ensemble"),
    ),
    note="Noisy labels stand for those of ImageNet; teachers and student see the same. The teachers have twice the "
    "student's channels, and their rate falls to nothing. All arms take 800 steps but start, which ends after the "
    "first 400 on labels. Nothing is claimed of what the discriminator gains: the paper has no comparison with and "
    "without it.",
)

MAIN = recipe_arm("meal-v2")
SCARCE = MAIN.with_("meal-v2", engine={"steps": 1200})
HALF = SCARCE.with_("start", options={"distil_share": 0.0, "discriminator": 0.0}, engine={"steps": 600})
LABELS = {"gt_weight": 1.0, "discriminator": 0.0}
IMAGE = Proof(
    "meal-v2",
    "image",
    "fashion-ensemble",
    arms=(
        SCARCE,
        SCARCE.with_("labels-continued", options=LABELS),
        HALF,
        SCARCE.with_("one-teacher", teacher="one"),
        SCARCE.with_("untouched", engine={"steps": 0}),
        SCARCE.with_("shuffled-teachers", teacher="shuffled"),
    ),
    claims=(
        accuracy(
            "soft-labels",
            "Soft labels of an ensemble beat as many more steps on the labels",
            "meal-v2",
            ">=",
            "labels-continued",
            0.01,
            "abstract",
        ),
        accuracy("gain", "They make a trained student better", "meal-v2", ">=", "start", 0.01, "abstract"),
        accuracy("ensemble", "Three teachers are no worse than one", "meal-v2", ">=", "one-teacher", 0.0, "abstract"),
        accuracy("learns", "Training beats the untouched network", "meal-v2", ">=", "untouched", 0.5),
        shuffled("meal-v2"),
    ),
    note="2,000 images, 40% of their labels redrawn; three teachers twice as wide as the student have learnt from the "
    "same images and labels, with a rate that falls to nothing. The student takes 600 steps on the labels and 600 on "
    "what the teachers say; start ends after the first.",
)
PLENTY = Proof(
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
        shuffled("meal-v2"),
    ),
    note="The regime in which it does not pay: 10,000 images, and teachers of the student's own size, trained in the "
    "run at a constant rate, which are no better than labels that go on.",
)

PROOFS = (IMAGE, PLENTY, MECHANISM)
