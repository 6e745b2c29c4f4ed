"""What the mechanism-level proofs on points share: engine settings, time laws, and the claims on the controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillroom.proofs.base import Claim

TIMES = {
    "generator_times": {"law": "uniform", "low": 0.02, "high": 0.98},
    "critic_times": {"law": "uniform", "low": 0.0, "high": 1.0},
}


def engine(steps: int, **optim: Mapping[str, Any]) -> dict[str, Any]:
    """Batch 256, a short warm-up and a fast average; ``optim`` by turn."""
    return {
        "steps": steps,
        "batch": 256,
        "warmup": 50,
        "log_every": 50,
        "optim": optim,
        "ema": [{"name": "ema", "of": "student", "decay": 0.98}],
        "export": "ema",
    }


def shuffled_claim(name: str, factor: float = 5.0) -> Claim:
    """On the control by a teacher that answers for the wrong class."""
    statement = "Control: a teacher that answers for the wrong class ruins the student"
    return Claim("control-shuffled", statement, "", "ced", "shuffled-teacher", ">=", factor, name)


def control_claims(name: str, learns: float = 0.5) -> tuple[Claim, ...]:
    """The student against the untouched copy, and the shuffled teacher that must ruin it."""
    return (
        Claim(
            "learns",
            "The student beats the untouched copy of the teacher at one step",
            "",
            "ced",
            name,
            "<=",
            learns,
            "untouched",
        ),
        shuffled_claim(name),
    )


RESTING = {"optim": {"critic": {"until": 0.2}}}
"""The engine of the second control: the fake score follows the student over the first fifth of the steps, then rests.
(One that never learns, or learns real data, stays what it is copied from, the teacher: the difference of the two is 0
and nothing moves.)"""


def resting_critic_claim(name: str) -> Claim:
    """The claim on the second control, an arm of the engine :data:`RESTING`."""
    statement = "Control: where the fake score follows over the first fifth of the steps only, the student is far worse"
    return Claim("control-critic", statement, "", "ced", "resting-critic", ">=", 2.0, name)
