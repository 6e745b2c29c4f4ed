"""SNOOPI: random guidance scales against fixed ones, and negative texts inside cross-attention against guidance."""

from __future__ import annotations

from typing import Any

from stillroom.data.scenes.captions import COLOURS
from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm
from stillroom.proofs.points import control_claims, engine

DISTANCE, FLUCTUATION = "health/distance", "health/fluctuation"
"""Of the student as it stands, every ten updates over the second half of them."""

POINTS = Arm(
    "snoopi",
    "snoopi",
    options={"rank": 32, "lora_alpha": 32.0, "measured": 1000, "measure_every": 10},
    engine={
        **engine(350, generator={"lr": 1e-4, "clip_norm": 0.0}, critic={"lr": 3e-3, "clip_norm": 0.0}),
        "log_every": 10,
    },
)
FIXED = tuple(POINTS.with_(f"fixed {k:g}", options={"random": "none", "k_fixed": k}) for k in (1.5, 4.5, 7.5))


def steadier(arm: Arm) -> tuple[Claim, Claim]:
    """Of random scales against one that stays."""
    short = arm.name.removeprefix("fixed ").replace(".", "-")
    return (
        Claim(
            f"steadier-than-{short}",
            f"With random scales the student's distance changes at most 0.7 times as much from one measurement to the "
            f"next as with the {arm.name} scale",
            "version 1, Figure 2",
            FLUCTUATION,
            "snoopi",
            "<=",
            0.7,
            arm.name,
        ),
        Claim(
            f"as-near-as-{short}",
            f"And on average it is at most 1.05 times that with the {arm.name} scale",
            "version 1, Figure 2",
            DISTANCE,
            "snoopi",
            "<=",
            1.05,
            arm.name,
        ),
    )


MECHANISM = Proof(
    "snoopi",
    "mechanism",
    "pair",
    arms=(
        POINTS,
        *FIXED,
        POINTS.with_("teacher alone", options={"random": "teacher"}),
        POINTS.with_("lora alone", options={"random": "fake"}),
        POINTS.with_("untouched", engine={"steps": 0}),
        POINTS.with_("shuffled-teacher", teacher="shuffled"),
    ),
    claims=(
        *(claim for arm in FIXED for claim in steadier(arm)),
        Claim(
            "both",
            "Random scales in both networks are nearer the data than in the teacher alone",
            "version 1, Table 2",
            DISTANCE,
            "snoopi",
            "<=",
            1.0,
            "teacher alone",
        ),
        Claim(
            "lora-side",
            "Random scales in the LoRA teacher alone are nearer the data than in the teacher alone",
            "version 1, Table 2",
            DISTANCE,
            "lora alone",
            "<=",
            1.0,
            "teacher alone",
        ),
        *control_claims("snoopi"),
    ),
    note="The teacher of two overlapping classes is nearly exact, and so is its guidance at every scale; what random "
    "scales are for, a guided teacher that is wrong in its own way at each of them, is not here.",
)

# --- negative texts ---------------------------------------------------------------------------------------------------
STEPS = 6
TEACHER = {
    "name": "few-step-steered",
    "times": [round(1 - k / STEPS, 6) for k in range(STEPS)],
    "renoise": "ddim",
    "guidance": 3.0,
}


def teacher(arm: str, **sampler: Any) -> Arm:
    """The shipped teacher as it is, without any training, in six guided steps."""
    return Arm(arm, sampler={**TEACHER, **sampler})


CAPTIONS = recipe_arm("snoopi")


def drawn(arm: str, **sampler: Any) -> Arm:
    """The one-step student, sampled in another way."""
    times = [CAPTIONS.options["t_init"]]
    how = {"name": "few-step-steered", "times": times, **sampler}
    return CAPTIONS.with_(arm, engine={"steps": 0}, after=CAPTIONS, sampler=how)


HEEDS = CAPTIONS.with_("nasa-t", options={"negatives": COLOURS})


def negative_claims(prefix: str, free: str, less: str, main: str, more: str) -> tuple[Claim, ...]:
    """What NASA does where it is not trained for: arms that differ in the scale alone."""
    return (
        Claim(
            f"{prefix}removes",
            f"Away from a colour at most a quarter of its pictures are left ({main})",
            "version 1, Table 3",
            "unwanted",
            main,
            "<=",
            0.25,
            free,
        ),
        Claim(
            f"{prefix}removes-half",
            "And at most a half",
            "version 1, Table 3",
            "unwanted",
            main,
            "<=",
            0.5,
            free,
        ),
        Claim(
            f"{prefix}keeps-digits",
            "The digit stays the one that was asked for, to five points",
            "version 1, Table 3",
            "digit",
            main,
            ">=",
            1.0,
            free,
            offset=-0.05,
        ),
        Claim(
            f"{prefix}rises",
            "A smaller scale leaves at least as many",
            "version 3, Figure 7",
            "unwanted",
            main,
            "<=",
            1.0,
            less,
        ),
        Claim(
            f"{prefix}too-much",
            f"Too large a scale spoils digits: five points fewer ({more})",
            "version 3, Figure 7",
            "digit",
            more,
            "<=",
            1.0,
            main,
            offset=-0.05,
        ),
        Claim(
            f"{prefix}control-other",
            "Control: away from another colour six tenths of the colour stay",
            "",
            "unwanted_other",
            main,
            ">=",
            0.6,
            free,
        ),
    )


IMAGE = Proof(
    "snoopi",
    "image",
    "scenes-negatives",
    arms=(
        CAPTIONS,
        drawn("plain", negative_scale=0.0),
        drawn("away 0.2", negative_scale=0.2),
        drawn("away 1", negative_scale=1.0),
        drawn("guided 2.5", name="few-step", guidance=2.5),
        HEEDS,
        HEEDS.with_("negatives in the teacher alone", options={"heeded_by": ["teacher"]}),
        CAPTIONS.with_("untouched", engine={"steps": 0}),
        CAPTIONS.with_("shuffled-teacher", teacher="shuffled"),
        teacher("teacher, plain", negative_scale=0.0),
        teacher("teacher, away 0.5", negative_scale=0.5),
        teacher("teacher, away 1", negative_scale=1.0),
        teacher("teacher, away 2", negative_scale=2.0),
        teacher("teacher, guided from the text", name="few-step"),
    ),
    claims=(
        *negative_claims(
            "teacher-",
            "teacher, plain",
            "teacher, away 0.5",
            "teacher, away 1",
            "teacher, away 2",
        ),
        *negative_claims("", "plain", "away 0.2", "snoopi", "away 1"),
        Claim(
            "against-guidance",
            "In one step: five points more pictures of the digit without the colour than by guidance from the text",
            "version 3, Table 2",
            "clean",
            "snoopi",
            ">=",
            1.0,
            "guided 2.5",
            offset=0.05,
        ),
        Claim(
            "heeded",
            "A student that has learnt to heed negative texts removes ten points more of the colour than one whose "
            "teacher alone saw them",
            "version 3, Table 5",
            "removed",
            "nasa-t",
            ">=",
            1.0,
            "negatives in the teacher alone",
            offset=0.1,
        ),
        Claim(
            "heeded-digits",
            "At no loss of digits beyond five points",
            "version 3, Table 5",
            "digit",
            "nasa-t",
            ">=",
            1.0,
            "negatives in the teacher alone",
            offset=-0.05,
        ),
        Claim(
            "learns",
            "The one-step student draws the digit far more often than the untouched copy of the teacher",
            "",
            "digit_plain",
            "snoopi",
            ">=",
            1.0,
            "untouched",
            offset=0.3,
        ),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for another caption teaches no digits",
            "",
            "digit_plain",
            "shuffled-teacher",
            "<=",
            0.5,
            "snoopi",
        ),
    ),
)

PROOFS = (IMAGE, MECHANISM)
