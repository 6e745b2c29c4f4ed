"""SwiftBrush: the learned fake score against plain score distillation sampling; LoRA against a full copy."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import image_arms, image_claims, longer_arm, longer_claim, recorded_arm
from stillroom.proofs.points import control_claims, engine

POINTS = Arm(
    "swiftbrush",
    "swiftbrush",
    options={"rank": 32, "lora_alpha": 32.0, "guidance": 1.0, "fake_guidance": 1.0, "condition_drop": 0.0},
    engine=engine(1000, generator={"lr": 1e-4, "clip_norm": 0.0}, critic={"lr": 3e-3, "clip_norm": 0.0}),
)

RAW = POINTS.with_("raw-output", options={"reparametrise": False}, student="raw", engine={"steps": 400})
"""Its start is fitted first, so that its raw output is what the re-parametrised student draws before it is trained."""

MECHANISM = Proof(
    "swiftbrush",
    "mechanism",
    "ring",
    arms=(
        POINTS,
        POINTS.with_("sds", options={"score": "sds"}),
        POINTS.with_("full-copy", options={"fake": "full"}, engine={"optim": {"critic": {"lr": 1e-3}}}),
        RAW,
        RAW.with_("raw-output-untouched", engine={"steps": 0}),
        POINTS.with_("reparametrised-short", engine={"steps": 400}),
        POINTS.with_("untouched", engine={"steps": 0}),
        POINTS.with_("shuffled-teacher", teacher="shuffled"),
    ),
    claims=(
        Claim(
            "not-collapsed",
            "The spread within a class stays at least 0.8 of the data's",
            "section 3.2",
            "class_std",
            "swiftbrush",
            ">=",
            bound=0.8,
        ),
        Claim(
            "sds-collapses",
            "Without the learned fake score (SDS) the spread collapses below 0.3",
            "section 3.2",
            "class_std",
            "sds",
            "<=",
            bound=0.3,
        ),
        Claim(
            "vsd-beats-sds",
            "VSD with a LoRA fake score is closer to the data than SDS",
            "section 3.2",
            "ced",
            "swiftbrush",
            "<=",
            0.5,
            "sds",
        ),
        Claim(
            "lora-suffices",
            "A LoRA fake score is at most twice as far from the data as a full copy",
            "section 3.2",
            "ced",
            "swiftbrush",
            "<=",
            2.0,
            "full-copy",
        ),
        Claim(
            "reparametrisation",
            "From an equal start, reading x0 through the re-parametrisation beats taking the raw output as x0",
            "section 3.3",
            "ced",
            "reparametrised-short",
            "<=",
            0.8,
            "raw-output",
        ),
        *control_claims("swiftbrush", learns=0.7),
    ),
)

SWIFTBRUSH = recorded_arm("swiftbrush")
LONGER = longer_arm("swiftbrush", guidance=1.0)
IMAGE = Proof(
    "swiftbrush",
    "image",
    "fashion",
    arms=(SWIFTBRUSH, SWIFTBRUSH.with_("sds", options={"score": "sds"}), LONGER, *image_arms(SWIFTBRUSH)),
    claims=(
        Claim(
            "vsd-beats-sds",
            "VSD with a LoRA fake score is at most half as far from real images as SDS",
            "section 3.2",
            "fd",
            "swiftbrush",
            "<=",
            0.5,
            "sds",
        ),
        Claim(
            "class",
            "The student draws the class it is asked for",
            "Table 1",
            "class_agreement",
            "swiftbrush",
            ">=",
            bound=0.85,
        ),
        *image_claims("swiftbrush"),
        longer_claim(LONGER),
    ),
)

PROOFS = (IMAGE, MECHANISM)
