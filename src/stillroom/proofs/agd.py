"""AGD: adapters trained on the states of guided paths, against noised data, all weights, and no guidance at all."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm

STATES = "health/held_out_gap"
ENDS = "health/end_gap"
MEASURED = {"held_out": 160, "held_out_low": 4.0, "measure_every": 100}

MAIN = Arm(
    "agd",
    "agd",
    options={
        "width": 16,
        "paths": 600,
        "path_steps": 50,
        "eta": 0.0,
        "stored_precision": "float32",
        "steps": 50,
        "scale": 2.0,
        **MEASURED,
    },
    engine={
        "steps": 800,
        "batch": 256,
        "warmup": 50,
        "schedule": "cosine",
        "log_every": 100,
        "optim": {"imitate": {"lr": 2e-3}},
    },
)
NONE: dict[str, Any] = {"options": {"taught": "plain"}, "engine": {"steps": 200}}


def claims(full: bool) -> tuple[Claim, ...]:
    """What both levels say of states, and of what there was to learn."""
    states = Claim(
        "states",
        "At guidance scales from 4 on, adapters trained on the states of guided paths are nearer the guided teacher on "
        "such states than the same adapters trained on noised data",
        "the ablation of trajectories",
        STATES,
        "agd",
        "<=",
        0.6,
        "noised",
    )
    ends = Claim(
        "ends",
        "So are the samples, from the same noise",
        "the ablation of trajectories",
        ENDS,
        "agd",
        "<=",
        0.6,
        "noised",
    )
    guides = Claim(
        "guides",
        "The adapters do what guidance does: without them the distance is ten times as large",
        "abstract",
        STATES,
        "agd",
        "<=",
        0.1,
        "none",
    )
    every = Claim(
        "full",
        "Adapters are at most twice as far as all weights tuned in the same steps",
        "the comparison with tuning the entire model",
        STATES,
        "agd",
        "<=",
        2.0,
        "full",
    )
    return (states, ends, guides, every) if full else (states, ends, guides)


MECHANISM = Proof(
    "agd",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        MAIN.with_("noised", options={"states": "noised"}),
        MAIN.with_("full", options={"tune": "all"}),
        MAIN.with_("none", **NONE),
        MAIN.with_("untouched", engine={"steps": 0}),
        # of all weights, which are a copy of the right ones: adapters would sit on the wrong teacher itself
        MAIN.with_("full, shuffled-teacher", options={"tune": "all"}, teacher="shuffled"),
    ),
    claims=(
        *claims(full=True),
        Claim(
            "control-shuffled",
            "Control: all weights, tuned to answers for the wrong class, are ruined",
            "",
            "ced",
            "full, shuffled-teacher",
            ">=",
            2.0,
            "full",
        ),
    ),
)

AGD = recipe_arm("agd").with_("agd", options={**MEASURED, "held_out": 100, "steps": 10})
GUIDED = {"name": "ode", "solver": "euler", "steps": 10}
IMAGE = Proof(
    "agd",
    "image",
    "fashion",
    arms=(
        AGD,
        AGD.with_("noised", options={"states": "noised"}),
        AGD.with_("untouched", engine={"steps": 0}),
        AGD.with_("none", options=NONE["options"], engine={"steps": 100}),
        Arm("teacher, two calls a step", sampler={**GUIDED, "guidance": 1.5}),
        Arm("teacher, no guidance", sampler=GUIDED),
    ),
    claims=(
        *claims(full=False),
        Claim(
            "classes",
            "With half of the calls the student's pictures are as often of their class as the guided teacher's, to two "
            "points",
            "abstract",
            "class_agreement",
            "agd",
            ">=",
            1.0,
            "teacher, two calls a step",
            offset=-0.02,
        ),
        Claim(
            "quality",
            "And no farther from real pictures than 1.1 times the guided teacher's at as many steps",
            "abstract",
            "fd",
            "agd",
            "<=",
            1.1,
            "teacher, two calls a step",
        ),
    ),
)

PROOFS = (IMAGE, MECHANISM)
