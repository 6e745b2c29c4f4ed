"""Phased DMD: a random last step inside a phase keeps the diversity that one over the whole path costs."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import card_sampler, recipe_arm
from stillroom.proofs.points import engine

RATES = {"generator": {"lr": 5e-4, "weight_decay": 0.0}, "critic": {"lr": 5e-4, "weight_decay": 0.0}}
ENGINE = {**engine(1000, **RATES), "schedule": "cosine"}
POINTS = Arm("phased-dmd", "phased-dmd", options={"measured": 32}, engine=ENGINE)
WHOLE = POINTS.with_("one phase", options={"phases": 1})

MECHANISM = Proof(
    "phased-dmd",
    "mechanism",
    "clusters",
    arms=(
        POINTS,
        WHOLE,
        WHOLE.with_("one phase, two experts", options={"experts": 2}),
        Arm("dmd2", "dmd2", options={"student_steps": 4, "gan_weight": 0.0, "critic_turns": 5}, engine=ENGINE),
        POINTS.with_("biased target", options={"target": "biased"}),
        POINTS.with_("fake score goes on", options={"restart": False}),
        POINTS.with_("own interval", options={"nested": False}),
        POINTS.with_("untouched", engine={"steps": 0}),
        POINTS.with_("shuffled-teacher", teacher="shuffled"),
        Arm("teacher-50", sampler={"name": "ode", "solver": "euler", "steps": 50}),
    ),
    claims=(
        Claim(
            "diversity",
            "Four places in each class: two phases of two steps share the samples more evenly among them than one "
            "phase of four, at as many updates of student and fake score",
            "diversity against a random last step over the whole path",
            "balance",
            "phased-dmd",
            ">=",
            1.0,
            "one phase",
            offset=0.005,
        ),
        Claim(
            "distance",
            "And end a tenth nearer to the data",
            "FID to the base model",
            "ced",
            "phased-dmd",
            "<=",
            0.9,
            "one phase",
        ),
        Claim(
            "capacity",
            "It is not the second network: two experts by noise that are trained in one phase are a tenth further from "
            "the data",
            "",
            "ced",
            "phased-dmd",
            "<=",
            0.9,
            "one phase, two experts",
        ),
        Claim(
            "capacity-diversity",
            "Nor do these share their samples as evenly",
            "",
            "balance",
            "phased-dmd",
            ">=",
            1.0,
            "one phase, two experts",
            offset=0.005,
        ),
        Claim(
            "dmd2",
            "Against DMD2 in four steps, with fresh noise between them: a tenth nearer to the data",
            "its tables' baseline",
            "ced",
            "phased-dmd",
            "<=",
            0.9,
            "dmd2",
        ),
        Claim(
            "unbiased",
            "Where the fake score takes x_s for clean data, the first phase ends at least twice as far from the "
            "teacher's path",
            "its one-dimensional toy",
            "last/end_gap_1",
            "biased target",
            ">=",
            2.0,
            "phased-dmd",
        ),
        Claim(
            "unbiased-end",
            "And the student ends further from the data, for all that the second phase repairs",
            "its one-dimensional toy",
            "ced",
            "biased target",
            ">=",
            1.1,
            "phased-dmd",
        ),
        Claim(
            "restart",
            "A fake score that goes on from the phase before is no better than one that begins as the teacher again",
            "the fake score anew in every phase",
            "ced",
            "phased-dmd",
            "<=",
            1.0,
            "fake score goes on",
        ),
        Claim(
            "nested",
            "Noise up to noise alone is no worse than noise up to where the phase begins",
            "nested intervals",
            "ced",
            "phased-dmd",
            "<=",
            1.0,
            "own interval",
        ),
        Claim(
            "learns",
            "The student halves the distance of the untouched copies of the teacher in the same four steps",
            "",
            "ced",
            "phased-dmd",
            "<=",
            0.5,
            "untouched",
        ),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for the wrong class ruins the student",
            "",
            "ced",
            "shuffled-teacher",
            ">=",
            5.0,
            "phased-dmd",
        ),
    ),
    note="All arms begin as a nearly exact teacher, whose four steps find every place already: coverage cannot show "
    "here, evenness does.",
)

MAIN = recipe_arm("phased-dmd")
IMAGE = Proof(
    "phased-dmd",
    "image",
    "fashion",
    arms=(
        MAIN,
        MAIN.with_("one phase", options={"phases": 1}),
        MAIN.with_("biased target", options={"target": "biased"}),
        MAIN.with_("untouched", engine={"steps": 0}),
        Arm("teacher", sampler=card_sampler("fashion-teacher")),
    ),
    claims=(
        Claim(
            "diversity",
            "Two phases of two steps cover two of a hundred more of the real pictures than one phase of four",
            "diversity against a random last step over the whole path",
            "recall",
            "phased-dmd",
            ">=",
            1.0,
            "one phase",
            offset=0.02,
        ),
        Claim(
            "distance",
            "And are no further from them",
            "FID to the base model",
            "fd",
            "phased-dmd",
            "<=",
            1.0,
            "one phase",
        ),
        Claim(
            "unbiased",
            "Taking x_s for clean data in the first phase costs a tenth of the distance",
            "its one-dimensional toy",
            "fd",
            "biased target",
            ">=",
            1.1,
            "phased-dmd",
        ),
        Claim(
            "learns",
            "The student beats the untouched copies of the teacher in the same four steps by three tenths",
            "",
            "fd",
            "phased-dmd",
            "<=",
            0.7,
            "untouched",
        ),
        Claim(
            "near-teacher",
            "The student's distance is at most 1.2 times that of the teacher's best many-step sampling",
            "",
            "fd",
            "phased-dmd",
            "<=",
            1.2,
            "teacher",
        ),
    ),
)

PROOFS = (IMAGE, MECHANISM)
