"""Flash-DMD: a fake score that follows by average, where the discriminator acts, preferences beside distillation."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm
from stillroom.proofs.points import engine

UPDATES = 400
"""Of the student, on points."""
RAW = engine(UPDATES, all={"lr": 5e-4, "weight_decay": 0.0})
del RAW["ema"], RAW["export"]  # an average of the student would hide how it swings
POINTS = Arm(
    "flash-dmd",
    "flash-dmd",
    options={"student_steps": 1, "placement": "summed", "gan_weight": 0.0, "critic_turns": 1, "coupling": 0.97},
    engine=RAW,
)
TWICE: dict[str, Any] = {"options": {"critic_turns": 2}, "engine": {"steps": 2 * UPDATES}}
FIVE: dict[str, Any] = {"options": {"critic_turns": 5, "coupling": 1.0}, "engine": {"steps": 5 * UPDATES}}
FREE = {"coupling": 1.0}

DISTILLED, PREFERRED = 150, 200
"""Updates of the student before preferences, and by preferences."""
TWO = POINTS.with_(
    "two steps",
    options={
        "student_steps": 2,
        "critic_turns": 2,
        "reward": "stillroom.bench.ring.bench:outward",
        "rewarded": "predictions",
        "beta": 5.0,
    },
    engine={"steps": 2 * DISTILLED},
)
RL: dict[str, Any] = {"rl_share": PREFERRED / (2 * DISTILLED + PREFERRED)}
LONGER = {"steps": 2 * DISTILLED + PREFERRED}

MECHANISM = Proof(
    "flash-dmd",
    "mechanism",
    "ring",
    arms=(
        POINTS,
        POINTS.with_("coupling 0.9", options={"coupling": 0.9}),
        POINTS.with_("no coupling", options=FREE),
        POINTS.with_("two critic updates", **TWICE),
        POINTS.with_("two critic updates, no coupling", options={**TWICE["options"], **FREE}, engine=TWICE["engine"]),
        POINTS.with_("five critic updates, no coupling", **FIVE),
        POINTS.with_("untouched", engine={"steps": 0}),
        POINTS.with_("shuffled-teacher", teacher="shuffled"),
        TWO,
        TWO.with_("preferences", options=RL, engine=LONGER),
        TWO.with_("preferences alone", options={**RL, "rl_turns": 0}, engine=LONGER),
    ),
    claims=(
        Claim(
            "coupling",
            "With one critic update for one of the student, coupling the fake score to it ends 1.5 times nearer to the "
            "data, at equal updates",
            "the ablation of TTUR",
            "ced",
            "flash-dmd",
            "<=",
            0.67,
            "no coupling",
        ),
        Claim(
            "coupling-stronger",
            "So it does with a stronger coupling, 0.9",
            "the ablation of TTUR",
            "ced",
            "coupling 0.9",
            "<=",
            0.67,
            "no coupling",
        ),
        Claim(
            "coupling-two",
            "With two critic updates the coupling helps by a fifth",
            "the ablation of TTUR",
            "ced",
            "two critic updates",
            "<=",
            0.8,
            "two critic updates, no coupling",
        ),
        Claim(
            "in-place-of-five",
            "Two critic updates with coupling end within 1.5 times the distance of five without, at half the cost",
            "the comparison with DMD2",
            "ced",
            "two critic updates",
            "<=",
            1.5,
            "five critic updates, no coupling",
        ),
        Claim(
            "rewards",
            "Preferences for points far out, learnt while distillation goes on, spread the points by a twentieth",
            "the joint stage",
            "std",
            "preferences",
            ">=",
            1.05,
            "two steps",
        ),
        Claim(
            "rewards-alone",
            "Preferences alone do so too",
            "the joint stage",
            "std",
            "preferences alone",
            ">=",
            1.05,
            "two steps",
        ),
        Claim(
            "distillation-holds",
            "But without distillation the distance to the data is twice as large",
            "the joint stage",
            "ced",
            "preferences alone",
            ">=",
            2.0,
            "preferences",
        ),
        Claim(
            "learns",
            "One step beats the untouched copy of the teacher",
            "",
            "ced",
            "flash-dmd",
            "<=",
            0.75,
            "untouched",
        ),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for the wrong class ruins the student",
            "",
            "ced",
            "shuffled-teacher",
            ">=",
            3.0,
            "flash-dmd",
        ),
    ),
    note="Points have no texture, so that nothing is said here of the discriminator and of where it acts.",
)

MAIN = recipe_arm("flash-dmd")
STEPS = MAIN.engine["steps"]
SUMMED = {"placement": "summed"}
IMAGE = Proof(
    "flash-dmd",
    "image",
    "scenes-steps",
    arms=(
        MAIN,
        MAIN.with_("summed", options=SUMMED),
        MAIN.with_("matching-alone", options={**SUMMED, "gan_weight": 0.0}),
        MAIN.with_("no coupling", options=FREE),
        # DMD2's five critic updates cost 20.5 network calls for each of the student, ours 9
        MAIN.with_(
            "five critic updates, equal calls",
            options={**SUMMED, **FREE, "gan_weight": 0.0, "critic_turns": 5},
            engine={"steps": 5 * round(STEPS * 9 / 20.5)},
        ),
        MAIN.with_("preferences", options={"rl_share": 0.333}, engine={"steps": STEPS * 3 // 2}),
        MAIN.with_("preferences alone", options={"rl_share": 0.333, "rl_turns": 0}, engine={"steps": STEPS * 3 // 2}),
        MAIN.with_("untouched", engine={"steps": 0}),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
    ),
    claims=(
        Claim(
            "equal-calls",
            "At as many network calls it is a tenth nearer to real pictures than matching with five critic updates",
            "the comparison with DMD2",
            "fd",
            "flash-dmd",
            "<=",
            0.9,
            "five critic updates, equal calls",
        ),
        Claim(
            "split",
            "The discriminator at late steps, matching at noisy ones: no farther than both at every step",
            "ablation C",
            "fd",
            "flash-dmd",
            "<=",
            1.0,
            "summed",
        ),
        Claim(
            "gan-adds",
            "And a tenth nearer than matching alone",
            "ablation A",
            "fd",
            "flash-dmd",
            "<=",
            0.9,
            "matching-alone",
        ),
        Claim(
            "texture",
            "Matching alone has less of the real pictures' Laplacian energy",
            "its remark on matching alone",
            "sharpness",
            "matching-alone",
            "<=",
            0.95,
            "flash-dmd",
        ),
        Claim("coupling", "The coupling helps", "ablation B", "fd", "flash-dmd", "<=", 0.95, "no coupling"),
        Claim(
            "rewards",
            "Preferences for agreement with the caption show more of what is asked for, by two points",
            "the joint stage",
            "sceneeval",
            "preferences",
            ">=",
            1.0,
            "flash-dmd",
            offset=0.02,
        ),
        Claim(
            "distillation-holds",
            "Without distillation beside them the distance is twice as large",
            "the joint stage",
            "fd",
            "preferences alone",
            ">=",
            2.0,
            "preferences",
        ),
        Claim(
            "learns",
            "Four steps show three tenths more of what is asked for than the untouched copy's",
            "",
            "sceneeval",
            "flash-dmd",
            ">=",
            1.0,
            "untouched",
            offset=0.3,
        ),
        Claim(
            "control-shuffled",
            "Control: of a teacher that answers for other captions at most a tenth is right",
            "",
            "sceneeval",
            "shuffled-teacher",
            "<=",
            bound=0.1,
        ),
    ),
)

PROOFS = (IMAGE, MECHANISM)
