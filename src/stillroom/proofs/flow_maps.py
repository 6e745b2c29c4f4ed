"""What the proofs of small methods that learn a teacher's jumps share: their arms and claims on points and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import card_sampler, recipe_arm
from stillroom.proofs.points import shuffled_claim

TEACHER_1 = Arm("teacher-1", sampler={"name": "few-step", "times": (1.0,)})
"""The teacher's own single step."""
TEACHER = Arm("teacher", sampler=card_sampler("fashion-teacher"))
"""Its best many, on pictures."""
RATE = {"lr": 1e-3}
TUNED = (
    "Rates and betas were chosen in two rounds at seed 100. An earlier recording, untuned, at a rate of 1e-3 with "
    "betas of 0.9 and 0.999, was discarded: "
)


def beats_one_step(name: str, metric: str, statement: str, paper: str = "", claim: str = "learns") -> Claim:
    """The student is half as far as its teacher's own single step."""
    return Claim(claim, statement, paper, metric, name, "<=", 0.5, TEACHER_1.name)


def claims(name: str, metric: str) -> tuple[Claim, ...]:
    """The student against its own start and its teacher's one step, and its own two steps."""
    return (
        beats_one_step(name, metric, "One step of the student beats one of its teacher"),
        Claim(
            "more-steps",
            "Two steps of the same weights are no farther than one",
            "",
            metric,
            "2 steps",
            "<=",
            1.0,
            name,
        ),
    )


def proofs(
    name: str, options: Mapping[str, Any], turn: str, optim: Mapping[str, Any] = RATE, note: str = ""
) -> tuple[Proof, Proof]:
    """Of a method that is called as its one turn's optimizer and the option ``steps`` say. options, optim, note: on
    points."""
    engine = {
        "steps": 600,
        "batch": 128,
        "warmup": 50,
        "schedule": "cosine",
        "log_every": 50,
        "optim": {turn: dict(optim)},
        "ema": [{"name": "ema", "of": "student", "decay": 0.98}],
        "export": "ema",
    }
    main, image = Arm(name, name, options=dict(options), engine=engine), recipe_arm(name)

    def two(arm: Arm) -> Arm:
        return arm.with_("2 steps", options={"steps": 2}, engine={"steps": 0}, after=arm)

    return (
        Proof(
            name,
            "image",
            "fashion",
            (image, two(image), TEACHER_1, TEACHER),
            claims(name, "fd"),
        ),
        Proof(
            name,
            "mechanism",
            "ring",
            (main, two(main), main.with_("shuffled-teacher", teacher="shuffled"), TEACHER_1),
            (
                *claims(name, "ced"),
                shuffled_claim(name, 2.0),
            ),
            note=note,
        ),
    )
