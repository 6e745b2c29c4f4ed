"""MSD: students for parts of the classes against one for all, at equal updates for each and at equal updates in all."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import card_sampler, recipe_arm
from stillroom.proofs.points import engine

MATCH, DISTIL = 600, 600
RATES = {
    "match": {"lr": 5e-3, "weight_decay": 0.0},
    "generator": {"lr": 2e-3, "betas": (0.0, 0.999), "weight_decay": 0.0},
    "critic": {"lr": 1e-3, "betas": (0.0, 0.999), "weight_decay": 0.0},
}


def steps(match: int, distil: int, students: int = 4) -> dict[str, int]:
    """Of a run in which each of the students has so many of each kind."""
    return {"steps": students * (match + distil)}


SHARES = {"matching_share": float(MATCH), "distilling_share": float(DISTIL)}
ENGINE = {**engine(1, **RATES), "schedule": "cosine", "batch": 128}
FOUR = Arm(
    "msd",
    "msd",
    options={"students": 4, "critic_turns": 2, **SHARES},
    engine={**ENGINE, **steps(MATCH, DISTIL)},
    student="small",
)
ONE = FOUR.with_("one student", options={"students": 1}, engine=steps(MATCH, DISTIL, 1))
MORE = FOUR.with_("one student, all updates", options={"students": 1})
PLAIN = {"matching_share": 0.0, "distilling_share": 1.0}

MECHANISM = Proof(
    "msd",
    "mechanism",
    "clusters",
    arms=(
        FOUR,
        ONE,
        MORE,
        ONE.with_("one student, without matching", options=PLAIN, engine=steps(0, DISTIL, 1)),
        ONE.with_("one student, without matching, all its updates", options=PLAIN),
        FOUR.with_("random parts", options={"partition": "random"}),
        FOUR.with_("tiny", student="tiny"),
        MORE.with_("tiny, one student, all updates", student="tiny"),
        ONE.with_("untouched", engine={"steps": 0}),
        ONE.with_("shuffled-teacher", teacher="shuffled"),
        Arm("teacher-50", sampler={"name": "ode", "solver": "euler", "steps": 50}),
    ),
    claims=(
        Claim(
            "equal-latency",
            "Four small students end 15% nearer to the data than one, each after as many updates as that one",
            "Table 3",
            "ced",
            "msd",
            "<=",
            0.85,
            "one student",
        ),
        Claim(
            "room",
            "There is something to gain: the one small student is at least three times as far as the teacher",
            "",
            "ced",
            "one student",
            ">=",
            3.0,
            "teacher-50",
        ),
        Claim(
            "total-updates",
            "They are ahead of one student that has all the updates of the four, too",
            "Table 3: four students of batch 32 against one of 128",
            "ced",
            "msd",
            "<=",
            1.0,
            "one student, all updates",
        ),
        Claim(
            "capacity",
            "Six wide, a quarter of the weights: four students are ahead of one with all their updates",
            "",
            "ced",
            "tiny",
            "<=",
            1.0,
            "tiny, one student, all updates",
        ),
        Claim(
            "capacity-coverage",
            "And these four leave fewer places out: five of a hundred more are covered",
            "",
            "covered",
            "tiny",
            ">=",
            1.0,
            "tiny, one student, all updates",
            offset=0.05,
        ),
        Claim(
            "matching",
            "A small student without teacher-score matching ends 1.4 times as far after as much distillation",
            "section 4.3; Table 1's small students",
            "ced",
            "one student, without matching",
            ">=",
            1.4,
            "one student",
        ),
        Claim(
            "matching-updates",
            "And is still behind where it has the steps of the matching for distillation; one in two updates it",
            "",
            "ced",
            "one student, without matching, all its updates",
            ">=",
            1.0,
            "one student",
        ),
        Claim(
            "random-parts",
            "Which classes a student has matters little: parts drawn at random cost at most a fifth",
            "Table 3: 2.39 by K-means, 2.37 by runs of classes",
            "ced",
            "random parts",
            "<=",
            1.2,
            "msd",
        ),
        Claim("learns", "The students learn", "", "ced", "msd", "<=", 0.25, "untouched"),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for the wrong class ruins the student",
            "",
            "ced",
            "shuffled-teacher",
            ">=",
            3.0,
            "one student",
        ),
    ),
    note="Students have 1,842 weights (sixteen wide) or 452 (six wide), the teacher 105,090. None is trained until it "
    "gets no better, so that what four students gain over one with all their updates is not yet room alone. Classes "
    "have no order here: consecutive ones are as random a part as any, and parts by likeness cannot be asked about.",
)

MAIN = recipe_arm("msd")
HALF = MAIN.engine["steps"] // 2
IMAGE = Proof(
    "msd",
    "image",
    "fashion",
    arms=(
        MAIN,
        MAIN.with_("one student", options={"students": 1}, engine={"steps": HALF}),
        MAIN.with_("untouched", engine={"steps": 0}),
        MAIN.with_("shuffled-teacher", teacher="shuffled", options={"students": 1}, engine={"steps": HALF}),
        Arm("teacher", sampler=card_sampler("fashion-teacher")),
    ),
    claims=(
        Claim(
            "equal-latency",
            "Two students, each for five classes, end a twentieth nearer than one after as many updates as each has",
            "Table 1",
            "fd",
            "msd",
            "<=",
            0.95,
            "one student",
        ),
        Claim(
            "learns", "The students beat the untouched copies of the teacher", "", "fd", "msd", "<=", 0.5, "untouched"
        ),
        Claim(
            "near-teacher",
            "Their distance is at most 1.2 times that of the teacher's best many-step sampling",
            "",
            "fd",
            "msd",
            "<=",
            1.2,
            "teacher",
        ),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for the wrong class ruins the student",
            "",
            "class_agreement",
            "shuffled-teacher",
            "<=",
            0.3,
            "one student",
        ),
    ),
    note="Students here are the teacher's copies: nothing needs matching, and one student may have room enough.",
)

PROOFS = (IMAGE, MECHANISM)
