"""DHO: two heads against one, and what their mixture adds, with teachers that are wrong in different ways."""

from __future__ import annotations

from typing import Any

from stillroom.bench.digits.teachers import PROMPTS, ZETA
from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm

LABEL_HEAD = {"name": "two-heads", "alpha": 1.0, "temperature": 1.0}
TEACHER_HEAD = {"name": "two-heads", "alpha": 0.0, "temperature": 1.0}
WEIGHTS = (0.2, 0.35, 0.65, 0.8, 0.9)
"""Of the labels in a single head, besides 0.5."""


def points(name: str, shots: int, teacher: str = "bench", **options: Any) -> Arm:
    """600 steps on 64 labelled and 64 unlabelled images, moved by up to a pixel."""
    return Arm(
        name,
        "dho",
        options={"labelled": shots, "shift": 1, "conflict_every": 10, **options},
        engine={"steps": 600, "batch": 64, "log_every": 10},
        teacher=teacher,
    )


def claim(
    id: str, statement: str, left: str, op: Any, right: str, offset: float, paper: str = "", **more: Any
) -> Claim:
    return Claim(id, statement, paper, more.get("metric", "accuracy"), left, op, right=right, offset=offset)


def heads_of(arm: Arm) -> tuple[Arm, Arm]:
    """The same training, of which one head alone is asked."""
    return (
        arm.with_(f"{arm.name}, label head", sampler=LABEL_HEAD),
        arm.with_(f"{arm.name}, teacher head", sampler=TEACHER_HEAD),
    )


ONE, FOUR = points("dho-1", 1), points("dho-4", 4)
SINGLE_1, SINGLE_4 = points("one-head-1", 1, heads="one"), points("one-head-4", 4, heads="one")
LABELS = points("labels-4", 4, heads="one", gt_weight=1.0)
TAUGHT = points("teacher-only", 4, heads="one", gt_weight=0.0)
RANDOM = points("random-errors", 4, teacher="random")
CAPTIONS = points("captions", 4, teacher="captions", zeta=ZETA, prompts=PROMPTS)
WEIGHTED = [SINGLE_4.with_(f"one-head-4, lambda {w:g}", options={"gt_weight": w}) for w in WEIGHTS]

MAIN = recipe_arm("dho")
BIASED = MAIN.with_("biased", options={"labelled": 50}, engine={"steps": 600, "warmup": 60}, teacher="biased")
BIASED_ONE = BIASED.with_("biased, one head", options={"heads": "one"})
BIASED_WEIGHTS = (0.8, 0.9)
IMAGE = Proof(
    "dho",
    "image",
    "fashion-semi",
    arms=(
        MAIN,
        MAIN.with_("one-head", options={"heads": "one"}),
        MAIN.with_("labels", options={"heads": "one", "gt_weight": 1.0}),
        MAIN.with_("teacher-only", options={"heads": "one", "gt_weight": 0.0}),
        MAIN.with_("untouched", engine={"steps": 0}),
        BIASED,
        BIASED_ONE,
        *(BIASED_ONE.with_(f"biased, one head, lambda {w:g}", options={"gt_weight": w}) for w in BIASED_WEIGHTS),
        BIASED_ONE.with_("labels-50", options={"gt_weight": 1.0}),
        BIASED_ONE.with_("biased, teacher-only", options={"gt_weight": 0.0}),
    ),
    claims=(
        claim("two-heads", "Two heads beat one", "dho", ">=", "one-head", 0.005, "table 1"),
        claim("unlabelled", "Teacher and unlabelled images help the labels", "dho", ">=", "labels", 0.05, "table 1"),
        claim("beats-teacher", "Labels add to what the teacher says", "dho", ">=", "teacher-only", 0.005, "table 1"),
        claim("learns", "Training beats the untouched network", "dho", ">=", "untouched", 0.5),
        claim(
            "biased-two-heads",
            "Under a biased teacher two heads beat one",
            "biased",
            ">=",
            "biased, one head",
            0.02,
            "table 1",
        ),
        *(
            claim(
                f"biased-lambda-{w:g}",
                f"There a single head with weight {w:g} of the labels does not come within a point",
                "biased",
                ">=",
                f"biased, one head, lambda {w:g}",
                0.01,
                "table 13",
            )
            for w in BIASED_WEIGHTS
        ),
        claim(
            "biased-conflict",
            "There two heads lessen the conflict of the gradients",
            "biased",
            ">=",
            "biased, one head",
            0.2,
            metric="health/gradient_cosine",
        ),
        claim(
            "biased-unlabelled",
            "A biased teacher and unlabelled images help 50 labels per class",
            "biased",
            ">=",
            "labels-50",
            0.005,
            "table 1",
        ),
        claim(
            "biased-teacher",
            "50 labels per class correct what the teacher confuses",
            "biased",
            ">=",
            "biased, teacher-only",
            0.1,
            "table 1",
        ),
    ),
    note="The text-image teacher has seen 20,000 of the 60,000 training images with captions; some of the unlabelled "
    "and held-out ones may be among them; the test images are not. The biased teacher has learnt from the 10,000 "
    "training images, with 60% of the labels of three classes wrong, each time as the same other class; the student "
    "sees 50 true labels per class, for 600 steps.",
)

PROOFS = (
    IMAGE,
    Proof(
        "dho",
        "mechanism",
        "digits-semi",
        arms=(
            FOUR,
            ONE,
            SINGLE_4,
            SINGLE_1,
            *heads_of(FOUR),
            *WEIGHTED,
            LABELS,
            TAUGHT,
            ONE.with_("dho-1, fixed mixture", options={"mixture": "fixed"}),
            FOUR.with_("dho-4, fixed mixture", options={"mixture": "fixed"}),
            RANDOM,
            *heads_of(RANDOM),
            RANDOM.with_("random-errors, fixed mixture", options={"mixture": "fixed"}),
            CAPTIONS,
            # A sixth of its steps tune the teacher; the student has as many as elsewhere.
            CAPTIONS.with_("captions, few-shot", options={"cache": "tuned"}, engine={"steps": 720}),
            FOUR.with_("untouched", engine={"steps": 0}),
            TAUGHT.with_("shuffled-teacher", teacher="shuffled"),
            FOUR.with_("untrained-teacher", teacher="untrained"),
        ),
        claims=(
            claim(
                "two-heads-1",
                "With one label per class two heads beat one",
                "dho-1",
                ">=",
                "one-head-1",
                0.05,
                "table 1",
            ),
            claim(
                "two-heads-4",
                "With four labels per class two heads beat one",
                "dho-4",
                ">=",
                "one-head-4",
                0.05,
                "table 1",
            ),
            *(
                claim(
                    f"any-lambda-{w:g}",
                    f"A single head with weight {w:g} of the labels does not come within a point",
                    "dho-4",
                    ">=",
                    f"one-head-4, lambda {w:g}",
                    0.01,
                    "table 13",
                )
                for w in WEIGHTS
            ),
            claim(
                "conflict-1",
                "Two heads lessen the conflict of the gradients, one label per class",
                "dho-1",
                ">=",
                "one-head-1",
                0.2,
                metric="health/gradient_cosine",
            ),
            claim(
                "conflict-4",
                "Two heads lessen the conflict of the gradients, four labels per class",
                "dho-4",
                ">=",
                "one-head-4",
                0.2,
                metric="health/gradient_cosine",
            ),
            claim(
                "label-head",
                "The mixture is no worse than the labels' head",
                "dho-4",
                ">=",
                "dho-4, label head",
                -0.005,
                "figure 6",
            ),
            claim(
                "teacher-head",
                "The mixture is no worse than the teacher's head",
                "dho-4",
                ">=",
                "dho-4, teacher head",
                -0.005,
                "figure 6",
            ),
            claim(
                "mixing",
                "Where the teacher errs at random, the mixture beats the labels' head",
                "random-errors",
                ">=",
                "random-errors, label head",
                0.005,
                "figure 6",
            ),
            claim(
                "mixing-fixed",
                "There the fixed mixture beats the labels' head too",
                "random-errors, fixed mixture",
                ">=",
                "random-errors, label head",
                0.0,
                "figure 6",
            ),
            claim(
                "mixing-teacher",
                "There it is no worse than the teacher's head",
                "random-errors",
                ">=",
                "random-errors, teacher head",
                -0.005,
                "figure 6",
            ),
            claim(
                "unlabelled",
                "A biased teacher and unlabelled images help the labels",
                "dho-4",
                ">=",
                "labels-4",
                0.03,
                "table 1",
            ),
            claim("captions", "So does a text-image teacher", "captions", ">=", "labels-4", 0.03, "table 1"),
            claim(
                "few-shot",
                "A text-image teacher that knows the labelled images teaches more than one that knows texts alone",
                "captions, few-shot",
                ">=",
                "captions",
                0.005,
                "table 1",
            ),
            claim(
                "beats-teacher",
                "Labels correct what the teacher confuses",
                "dho-4",
                ">=",
                "teacher-only",
                0.1,
                "table 1",
            ),
            claim(
                "fixed-1",
                "The fixed mixture beats one head too, one label per class",
                "dho-1, fixed mixture",
                ">=",
                "one-head-1",
                0.02,
            ),
            claim(
                "fixed-4",
                "The fixed mixture beats one head too, four labels per class",
                "dho-4, fixed mixture",
                ">=",
                "one-head-4",
                0.02,
            ),
            claim("learns", "Training beats the untouched network", "dho-4", ">=", "untouched", 0.5),
            claim(
                "control-untrained",
                "Control: an untrained teacher teaches less than a biased one",
                "dho-4",
                ">=",
                "untrained-teacher",
                0.03,
            ),
            Claim(
                "control-shuffled",
                "Control: what a student learns from the teacher alone goes with the teacher's answers",
                "",
                "accuracy",
                "shuffled-teacher",
                "<=",
                0.5,
                "teacher-only",
            ),
        ),
        note="A biased teacher leaves most of the gain to the labels' head, which learns features from it; what mixing "
        "adds is asked of the teacher whose errors are random. Accuracies are in shares of 1.",
    ),
)
