"""Hyper-SD: segments of growing length, the discriminator, feedback by an adapter of its own, one-step scores."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.flow_maps import TEACHER, TEACHER_1, beats_one_step
from stillroom.proofs.image import recipe_arm
from stillroom.proofs.points import control_claims

STEPS = 1200
SEGMENTED = Arm(
    "segments",
    "hyper-sd",
    options={
        "mse": (1.0, 1.0, 1.0, 1.0),
        "adversarial": (0.0, 0.0, 0.0, 0.0),
        "offset_noise": 0.0,
        "measured": 2,
    },
    engine={
        "steps": STEPS,
        "batch": 256,
        "warmup": 20,
        "schedule": "cosine",
        "log_every": 50,
        "optim": {"all": {"lr": 1e-3}},
    },
)
WHOLE = {"segments": (1,), "grids": (64,), "mse": (1.0,), "adversarial": (0.0,)}
JUDGED = {"adversarial": (0.0, 0.001, 0.003, 0.01)}
ADVERSARIAL = SEGMENTED.with_("hyper-sd", options=JUDGED)
FED = {
    "feedback_share": 0.2,
    "feedback_steps": 1,
    "reward": "stillroom.bench.ring.bench:likelihood",
    "reward_margin": 2.0,
}
ONE = {"consistency_share": 0.6, "one_step_share": 0.4}


def longer(count: int, where: str, against: str) -> Claim:
    """The paper's Table 3 at one number of steps."""
    steps = f"{count} step{'s' if count > 1 else ''}"
    return Claim(
        where,
        f"After 8, 4, 2 and 1 segments the student's {steps} end nearer to the teacher's path than after as many "
        "updates with one segment throughout",
        "Table 3",
        f"health/gap_{count}",
        "segments",
        "<=",
        0.95,
        against,
    )


MECHANISM = Proof(
    "hyper-sd",
    "mechanism",
    "ring",
    arms=(
        ADVERSARIAL,
        SEGMENTED,
        SEGMENTED.with_("one segment", options=WHOLE),
        SEGMENTED.with_(
            "eight segments",
            options={"segments": (8,), "grids": (64,), "mse": (1.0,), "adversarial": (0.0,)},
            engine={"steps": STEPS // 4},
        ),
        ADVERSARIAL.with_("feedback", options=FED, engine={"steps": STEPS * 6 // 5}),
        ADVERSARIAL.with_("one-step scores", options=ONE),
        ADVERSARIAL.with_("one-step scores, teacher's", options={**ONE, "real": "teacher"}),
        ADVERSARIAL.with_("untouched", engine={"steps": 0}),
        ADVERSARIAL.with_("shuffled-teacher", teacher="shuffled"),
    ),
    claims=(
        longer(1, "segments-1", "one segment"),
        longer(2, "segments-2", "one segment"),
        Claim(
            "own-steps",
            "After the stage of eight segments, a quarter of the updates, eight steps end nearer to the teacher's path "
            "than after all stages: each stage's student is the best at its own number of steps",
            "TSCD, Figure 2; Table 4 claims the contrary of one student for all",
            "health/gap_8",
            "eight segments",
            "<=",
            1.0,
            "segments",
        ),
        Claim(
            "adversarial",
            "The adversarial term makes one step sharp: a fifth nearer to the data than squared distances alone",
            "the adversarial metric of TSCD",
            "ced",
            "hyper-sd",
            "<=",
            0.8,
            "segments",
        ),
        Claim(
            "feedback-rewards",
            "Feedback by a reward, here the likelihood of a point in its class, brings two of a hundred more points "
            "into their modes",
            "Table 3, its last rows",
            "in_mode",
            "feedback",
            ">=",
            1.0,
            "hyper-sd",
            offset=0.02,
        ),
        Claim(
            "feedback-keeps",
            "And costs at most a tenth of the distance to the data",
            "human feedback learning",
            "ced",
            "feedback",
            "<=",
            1.1,
            "hyper-sd",
        ),
        Claim(
            "one-step",
            "At equal updates, two fifths of them for one-step score distillation bring one step a fifth nearer to the "
            "data",
            "Table 5",
            "ced",
            "one-step scores",
            "<=",
            0.8,
            "hyper-sd",
        ),
        Claim(
            "real",
            "The consistent student is the better real score: a tenth nearer than with the teacher's",
            "Figure 3",
            "ced",
            "one-step scores",
            "<=",
            0.9,
            "one-step scores, teacher's",
        ),
        *control_claims("hyper-sd"),
    ),
    note="The teacher is nearly exact here and asked without guidance; the whole training is seconds long.",
)

MAIN = recipe_arm("hyper-sd")
CONSISTENT = MAIN.with_("consistent", options={"consistency_share": 1.0, "one_step_share": 0.0})
PLAIN = {"mse": (1.0,) * 4, "adversarial": (0.0,) * 4}
REWARDED = {"feedback_share": 0.1, "feedback_targets": ("to_q", "to_v"), "feedback_steps": 1}
IMAGE = Proof(
    "hyper-sd",
    "image",
    "fashion",
    arms=(
        MAIN,
        CONSISTENT,
        CONSISTENT.with_("segments", options=PLAIN),
        CONSISTENT.with_("one segment", options=WHOLE),
        CONSISTENT.with_("feedback", options=REWARDED, engine={"steps": MAIN.engine["steps"] * 11 // 10}),
        MAIN.with_("teacher as real score", options={"real": "teacher", "real_guidance": 1.5}),
        MAIN.with_("untouched", engine={"steps": 0}),
        TEACHER_1,
        TEACHER,
    ),
    claims=(
        Claim(
            "segments-1",
            "8, 4, 2 and 1 segments beat one segment throughout at one step, by squared distances alone",
            "Table 3",
            "fd",
            "segments",
            "<=",
            0.95,
            "one segment",
        ),
        Claim(
            "adversarial",
            "The adversarial term brings one step a fifth nearer to the data",
            "the adversarial metric of TSCD",
            "fd",
            "consistent",
            "<=",
            0.8,
            "segments",
        ),
        Claim(
            "feedback-rewards",
            "Feedback by agreement with the class raises the agreement that another classifier sees by a point",
            "Table 3, its last rows",
            "class_agreement",
            "feedback",
            ">=",
            1.0,
            "consistent",
            offset=0.01,
        ),
        Claim(
            "feedback-keeps",
            "And costs at most a tenth of the distance to the data",
            "human feedback learning",
            "fd",
            "feedback",
            "<=",
            1.1,
            "consistent",
        ),
        Claim(
            "one-step",
            "One-step score distillation at equal updates brings one step a fifth nearer to the data",
            "Table 5",
            "fd",
            "hyper-sd",
            "<=",
            0.8,
            "consistent",
        ),
        Claim(
            "real",
            "The consistent student is the better real score",
            "Figure 3",
            "fd",
            "hyper-sd",
            "<=",
            0.9,
            "teacher as real score",
        ),
        Claim(
            "learns", "One step beats the untouched copy of the teacher", "", "fd", "hyper-sd", "<=", 0.5, "untouched"
        ),
        beats_one_step("hyper-sd", "fd", "And the teacher's own one step", claim="teacher-1"),
    ),
)

PROOFS = (IMAGE, MECHANISM)
