"""BOOT: the signal against the state, all times at once against times from T down, and stored pairs at equal cost."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.flow_maps import TEACHER, TEACHER_1, beats_one_step
from stillroom.proofs.image import recipe_arm
from stillroom.proofs.points import shuffled_claim

ENDS = "last/end_gap"  # not the mean over a part of the training, which would count the way there
MEASURED = {"held_out": 1000, "held_out_steps": 50, "measure_every": 100}
STEPS, BATCH, PAIR_STEPS = 1000, 128, 20
CALLS = 2  # of the teacher, for each row of a bootstrap step: at t, and at T
PAIRS = STEPS * BATCH * CALLS // PAIR_STEPS

MAIN = Arm(
    "boot",
    "boot",
    options=MEASURED,
    engine={
        "steps": STEPS,
        "batch": BATCH,
        "warmup": 50,
        "schedule": "cosine",
        "log_every": 100,
        "optim": {"all": {"lr": 1e-3}},
        "ema": [{"name": "ema", "of": "student", "decay": 0.98}],
        "export": "ema",
    },
)

MECHANISM = Proof(
    "boot",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        MAIN.with_("state", options={"predicts": "state"}),
        MAIN.with_("state, its own errors", options={"predicts": "state", "state_errors": "state"}),
        MAIN.with_("progressive", options={"progressive": True}),
        MAIN.with_("progressive, half", options={"progressive": True, "progressive_share": 0.5}),
        MAIN.with_("stored-pairs", options={"pairs": PAIRS, "pair_steps": PAIR_STEPS}),
        MAIN.with_("no-boundary", options={"beta": 0.0}),
        MAIN.with_("untouched", engine={"steps": 0}),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
        TEACHER_1,
    ),
    claims=(
        Claim(
            "signal",
            "A student of the signal ends nearer the end of the teacher's path than one of the state, whose errors are "
            "weighed as those of a signal",
            "not seen in the paper",
            ENDS,
            "boot",
            "<=",
            0.6,
            "state",
        ),
        Claim(
            "signal-scaled",
            "And nearer than one of the state whose errors are weighed as they are",
            "not seen in the paper",
            ENDS,
            "boot",
            "<=",
            0.6,
            "state, its own errors",
        ),
        Claim(
            "uniform",
            "So does one that learns all times at once, against times from the first one down which reach the last one "
            "as the training ends",
            "not seen in the paper",
            ENDS,
            "boot",
            "<=",
            0.5,
            "progressive",
        ),
        Claim(
            "uniform-half",
            "And against times that reach the last one at half of the training",
            "not seen in the paper",
            ENDS,
            "boot",
            "<=",
            0.5,
            "progressive, half",
        ),
        Claim(
            "first-step",
            "Its distance is at most a fifth of that of the teacher's own single step",
            "",
            "last/end_share",
            "boot",
            "<=",
            bound=0.2,
        ),
        beats_one_step("boot", "ced", "The student beats its teacher's own single step"),
        Claim(
            "pairs",
            "Beside it: it is at most twice as far as regression on stored pairs that cost the teacher as many calls",
            "not in the paper, which claims no more than to do without them",
            ENDS,
            "boot",
            "<=",
            2.0,
            "stored-pairs",
        ),
        Claim(
            "boundary",
            "Beside it: without the boundary nothing is gained",
            "not seen in the paper",
            ENDS,
            "no-boundary",
            ">=",
            0.8,
            "boot",
        ),
        Claim(
            "trained",
            "The student beats itself before the training",
            "",
            "ced",
            "boot",
            "<=",
            0.5,
            "untouched",
        ),
        shuffled_claim("boot"),
    ),
)

BOOT = recipe_arm("boot").with_("boot", options={**MEASURED, "held_out": 200, "held_out_steps": 25})
IMAGE = Proof(
    "boot",
    "image",
    "fashion",
    arms=(
        BOOT,
        BOOT.with_("state", options={"predicts": "state"}),
        BOOT.with_("progressive", options={"progressive": True}),
        BOOT.with_("stored-pairs", options={"pairs": 1000 * 32 * CALLS // PAIR_STEPS, "pair_steps": PAIR_STEPS}),
        BOOT.with_("untouched", engine={"steps": 0}),
        TEACHER_1,
        TEACHER,
    ),
    claims=(
        Claim(
            "signal",
            "A student of the signal ends nearer the end of the teacher's path than one of the state",
            "not seen in the paper",
            ENDS,
            "boot",
            "<=",
            0.6,
            "state",
        ),
        Claim(
            "uniform",
            "So does one that learns all times at once, against times from the first one down",
            "not seen in the paper",
            ENDS,
            "boot",
            "<=",
            0.5,
            "progressive",
        ),
        Claim(
            "first-step",
            "Its distance is at most a fifth of that of the teacher's own single step",
            "",
            "last/end_share",
            "boot",
            "<=",
            bound=0.2,
        ),
        Claim(
            "trained",
            "The student beats itself before the training",
            "",
            "fd",
            "boot",
            "<=",
            0.5,
            "untouched",
        ),
        beats_one_step("boot", "fd", "The one-step student beats its teacher's own single step", "abstract"),
        Claim(
            "pairs",
            "Beside it: it is at most twice as far from real pictures as regression on stored pairs that cost the "
            "teacher as many calls",
            "not in the paper",
            "fd",
            "boot",
            "<=",
            2.0,
            "stored-pairs",
        ),
    ),
)

PROOFS = (IMAGE, MECHANISM)
