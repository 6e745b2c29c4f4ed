"""G2SD: the generic stage against reconstruction of pixels and an untrained teacher; both stages against either."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm

GENERIC, SPECIFIC, RATIO = 1200, 300, 0.76


def arm(name: str, steps: int, **options: Any) -> Arm:
    """The mask leaves 6 of 25 patches; 20 labels per class, batch 64."""
    options = {"mask_ratio": RATIO, "labels": 20, "mixup": 0.0, "cutmix": 0.0, **options}
    engine = {
        "steps": steps, "batch": 64, "warmup": 30, "schedule": "cosine", "log_every": 100,
        "optim": {"generic": {"lr": 1.5e-3}} if options.get("generic_share") else {},
    }  # fmt: skip
    return Arm(name, "g2sd", options=options, engine=engine)


def generic(name: str, **options: Any) -> Arm:
    return arm(name, GENERIC, generic_share=1, specific_share=0, **options)


def both(name: str, **options: Any) -> Arm:
    return arm(name, GENERIC + SPECIFIC, generic_share=GENERIC, specific_share=SPECIFIC, **options)


def more(metric: str, id: str, statement: str, left: str, right: str, offset: float, paper: str = "") -> Claim:
    return Claim(id, statement, paper, metric, left, ">=", right=right, offset=offset)


DECODED = generic("generic")
STAGE_ONE = Proof(
    "g2sd",
    "mechanism",
    "canvas",
    arms=(
        DECODED,
        generic("pixels", target="pixels"),
        generic("removed-patches-alone", supervise="masked"),
        generic("target-as-it-is", whiten=False),
        DECODED.with_("random-teacher", teacher="untrained"),
        DECODED.with_("shuffled-teacher", teacher="shuffled"),
        DECODED.with_("untouched", engine={"steps": 0}),
        Arm("teacher", sampler={"name": "forward"}),
    ),
    claims=(
        more(
            "probe", "generic", "Learning the teacher's decoder makes the better encoder than pixels", "generic",
            "pixels", 0.05, "abstract",
        ),
        more(
            "probe", "control-random", "Control: an untrained teacher's decoder does not", "pixels", "random-teacher",
            0.0,
        ),
        more(
            "probe", "control-shuffled", "Control: the decoder of another image does not", "generic",
            "shuffled-teacher", 0.05,
        ),
        more("probe", "learns", "Training beats the untouched network", "generic", "untouched", 0.05),
    ),
)  # fmt: skip

WHOLE = both("both-stages")
STAGE_TWO = Proof(
    "g2sd",
    "mechanism",
    "canvas-labels",
    arms=(
        WHOLE,
        arm("specific-alone", GENERIC + SPECIFIC, generic_share=0, specific_share=1),
        both("pixels-then-specific", target="pixels"),
        both("generic-then-labels", specific="labels"),
        both("generic-then-nkd", specific="nkd"),
        WHOLE.with_("shuffled-teachers", teacher="shuffled"),
        WHOLE.with_("untouched", engine={"steps": 0}),
    ),
    claims=(
        more(
            "accuracy", "generic-helps", "After the generic stage the task is learnt no worse than after pixels",
            "both-stages", "pixels-then-specific", 0.0, "abstract",
        ),
        more(
            "accuracy", "both", "Both stages beat as many steps of the specific stage alone", "both-stages",
            "specific-alone", 0.0, "abstract",
        ),
        more(
            "accuracy", "control-shuffled", "Control: teachers that see another image do not help", "both-stages",
            "shuffled-teachers", 0.05,
        ),
    ),
    note="20 labels per class: with all 1,200 a student of this size needs no teacher.",
)  # fmt: skip

FRESH_GENERIC, FRESH_SPECIFIC = 600, 150


def short(name: str, generic: int = FRESH_GENERIC, specific: int = FRESH_SPECIFIC, **options: Any) -> Arm:
    return arm(name, FRESH_GENERIC + FRESH_SPECIFIC, generic_share=generic, specific_share=specific, **options)


FRESH = Proof(
    "g2sd",
    "mechanism",
    "fresh-canvas-labels",
    arms=(
        short("both-stages"),
        short("pixels-then-specific", target="pixels"),
        short("specific-alone", generic=0),
        short("both-stages").with_("shuffled-teachers", teacher="shuffled"),
        short("both-stages").with_("untouched", engine={"steps": 0}),
    ),
    claims=(
        more(
            "accuracy", "generic-helps", "After the generic stage the task is learnt no worse than after pixels",
            "both-stages", "pixels-then-specific", 0.0, "abstract",
        ),
        more(
            "accuracy", "both", "Both stages beat as many steps of the specific stage alone", "both-stages",
            "specific-alone", 0.03, "abstract",
        ),
        more(
            "accuracy_occluded", "robust", "So they do where some patches are covered", "both-stages",
            "specific-alone", 0.03, "abstract",
        ),
        more(
            "accuracy", "control-shuffled", "Control: teachers that see another image do not help", "both-stages",
            "shuffled-teachers", 0.05,
        ),
    ),
    note="20 labels per class: with all 1,200 a student of this size needs no teacher. 600 generic and 150 specific "
    "steps. Left out for their cost: the generic stage by itself, an untrained teacher, targets of the hidden patches "
    "alone and unwhitened, and the specific stage with soft labels or with labels alone.",
)  # fmt: skip

MAIN = recipe_arm("g2sd").with_("g2sd", engine={"steps": 400, "batch": 64, "warmup": 20})
IMAGE = Proof(
    "g2sd",
    "image",
    "fashion-encoders-labels",
    arms=(
        MAIN,
        MAIN.with_("pixels-then-specific", options={"target": "pixels"}),
        MAIN.with_("specific-alone", options={"generic_share": 0.0}),
        MAIN.with_("untouched", engine={"steps": 0}),
    ),
    claims=(
        more(
            "accuracy", "generic-helps", "After the generic stage the task is learnt no worse than after pixels",
            "g2sd", "pixels-then-specific", 0.0, "abstract",
        ),
        more(
            "accuracy", "both", "Both stages beat as many steps of the specific stage alone", "g2sd", "specific-alone",
            0.0, "abstract",
        ),
        more("accuracy", "learns", "Training beats guessing", "g2sd", "untouched", 0.4),
    ),
    note="400 steps of batch 64, where the recipe has 1,600 of 128.",
)  # fmt: skip

PROOFS = (IMAGE, FRESH, STAGE_ONE, STAGE_TWO)
