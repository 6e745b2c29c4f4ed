"""SANA-Sprint: consistency and latent GAN together and apart, with and without the last time, and fed larger times."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.flow_maps import TEACHER, TEACHER_1, beats_one_step
from stillroom.proofs.image import recipe_arm

DENSE = {"retime_share": 0.25, "time_scale": 100.0}  # this network multiplies what it is fed by a thousandth, and
# reads waves of up to 100 radians per unit of that: a tenth of the teacher's own times is dense
LONG = 4000  # steps of retiming
MAIN = Arm(
    "sana-sprint",
    "sana-sprint",
    options={
        "guidance": [],
        "gan_width": 32,
        "data_std": 0.73,
        # what matters on this ring is a twelfth as large as the ring
        "gan_times": {"law": "log-normal", "low": 0.0007, "high": 0.9993, "mean": -2.3, "std": 0.8},
        **DENSE,
    },
    engine={
        "steps": 800,
        "batch": 128,
        "warmup": 50,
        "log_every": 50,
        "optim": {
            "retime": {"lr": 2e-3},
            "generator": {"lr": 5e-4, "betas": (0.5, 0.99), "clip_norm": 0.0},
            "critic": {"lr": 2e-3, "betas": (0.0, 0.99), "clip_norm": 0.0},
        },
        "ema": [{"name": "ema", "of": "student", "decay": 0.98}],
        "export": "ema",
    },
)


def as_it_is(arm: Arm, name: str, **options: Any) -> Arm:
    """Without retiming, in as many steps of the student."""
    engine = {**arm.engine, "steps": round(arm.engine["steps"] * (1 - arm.options["retime_share"]))}
    engine["optim"] = {turn: optim for turn, optim in engine["optim"].items() if turn != "retime"}
    return Arm(name, arm.method, options={**arm.options, "retime_share": 0.0, **options}, engine=engine)


def without_gan(arm: Arm, name: str) -> Arm:
    """sCM alone: the discriminator's turn is not there, nor its optimizer."""
    engine = dict(arm.engine)
    engine["optim"] = {turn: optim for turn, optim in engine["optim"].items() if turn != "critic"}
    values = {**arm.options, "gan_weight": 0.0}
    return Arm(name, arm.method, options=values, engine=engine)


def several(arm: Arm, steps: int) -> Arm:
    """The finished student of ``arm``, asked in so many steps."""
    return arm.with_(f"{steps} steps", options={"steps": steps}, engine={"steps": 0}, after=arm)


HYBRID = Claim(
    "hybrid",
    "Consistency with the latent GAN beats consistency alone by a third, at one step",
    "Table 3",
    "ced",
    "sana-sprint",
    "<=",
    0.7,
    "scm",
)

MECHANISM = Proof(
    "sana-sprint",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        without_gan(MAIN, "scm"),
        MAIN.with_("ladd", options={"scm_weight": 0.0}),
        MAIN.with_("no-max-time", options={"at_max": 0.0}),
        as_it_is(MAIN, "own-times"),
        MAIN.with_("times-x1000", options={"time_scale": 1e5}),
        MAIN.with_("times-x1000-ladd", options={"time_scale": 1e5, "scm_weight": 0.0}),
        # what the others retime in is too short for such times: they are off by a tenth of the velocity
        MAIN.with_(
            "times-x1000-long",
            options={"time_scale": 1e5, "retime_share": LONG / (LONG + 600)},
            engine={"steps": LONG + 600},
        ),
        several(MAIN, 2),
        several(MAIN, 4),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
        as_it_is(MAIN, "ladd-one-step", scm_weight=0.0, at_max=1.0),
        TEACHER_1,  # a copy that is not retimed yet draws nothing: no start to compare with
    ),
    claims=(
        HYBRID,
        Claim(
            "ladd-learns",
            "The latent GAN alone, asked from noise alone, comes nearer the data than one step of its teacher",
            "LADD, arXiv 2403.12015",
            "ced",
            "ladd-one-step",
            "<=",
            0.7,
            TEACHER_1.name,
        ),
        Claim(
            "beats-ladd",
            "It does not lose to the latent GAN alone",
            "Table 3",
            "ced",
            "sana-sprint",
            "<=",
            1.0,
            "ladd",
        ),
        Claim(
            "max-time",
            "Half of the GAN's samples from noise alone beat none, at one step, by a tenth",
            "Table 6",
            "ced",
            "sana-sprint",
            "<=",
            0.9,
            "no-max-time",
        ),
        Claim(
            "dense-times",
            "A network that reads times a thousandfold learns far worse in as many steps",
            "Fig. 3, section 3.2",
            "ced",
            "times-x1000",
            ">=",
            2.0,
            "sana-sprint",
        ),
        Claim(
            "dense-times-learnt",
            "Given twenty times the steps the teacher's copy learns to read them: to two hundredths of its velocity's "
            "mean square",
            "",
            "last/retime_error",
            "times-x1000-long",
            "<=",
            bound=0.03,
        ),
        Claim(
            "dense-times-long",
            "And even from such a teacher the student learns far worse",
            "Fig. 3, section 3.2",
            "ced",
            "times-x1000-long",
            ">=",
            2.0,
            "sana-sprint",
        ),
        Claim(
            "own-times",
            "The teacher's own times, ten times as large here, are not dense enough",
            "section 3.2",
            "ced",
            "own-times",
            ">=",
            1.5,
            "sana-sprint",
        ),
        Claim(
            "dense-times-steep",
            "Its tangents are at least twice as long",
            "Fig. 3",
            "health/tangent",
            "times-x1000",
            ">=",
            2.0,
            "sana-sprint",
        ),
        Claim(
            "dense-times-derivative",
            "It is the derivative that suffers: with the GAN alone the same times do less harm by half",
            "",
            "ced",
            "times-x1000",
            ">=",
            2.0,
            "times-x1000-ladd",
        ),
        Claim(
            "more-steps",
            "The same weights hold at two steps what they reach at one",
            "Table 2",
            "ced",
            "2 steps",
            "<=",
            1.1,
            "sana-sprint",
        ),
        beats_one_step("sana-sprint", "ced", "The student beats its teacher's own single step"),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for the wrong class ruins the student, though it sees real data",
            "",
            "ced",
            "shuffled-teacher",
            ">=",
            2.0,
            "sana-sprint",
        ),
    ),
    note="On points a discriminator alone does not collapse, as it does at the paper's size.",
)

SPRINT = recipe_arm("sana-sprint")
IMAGE = Proof(
    "sana-sprint",
    "image",
    "fashion",
    arms=(
        SPRINT,
        without_gan(SPRINT, "scm"),
        SPRINT.with_("ladd", options={"scm_weight": 0.0}),
        several(SPRINT, 2),
        several(SPRINT, 4),
        TEACHER_1,
        TEACHER,
    ),
    claims=(
        Claim(
            "hybrid",
            "Consistency with the latent GAN beats consistency alone at one step by a third",
            "Table 3",
            "fd",
            "sana-sprint",
            "<=",
            0.7,
            "scm",
        ),
        Claim(
            "beats-ladd",
            "And the latent GAN alone",
            "Table 3",
            "fd",
            "sana-sprint",
            "<=",
            0.9,
            "ladd",
        ),
        Claim(
            "near-teacher",
            "The one-step student's distance is at most that of the teacher's best many-step sampling",
            "",
            "fd",
            "sana-sprint",
            "<=",
            1.0,
            "teacher",
        ),
        Claim(
            "two-steps",
            "The same weights hold at two steps what they reach at one",
            "Table 2",
            "fd",
            "2 steps",
            "<=",
            1.0,
            "sana-sprint",
        ),
        Claim(
            "more-steps",
            "The same weights are better at four steps than at one",
            "Table 2",
            "fd",
            "4 steps",
            "<=",
            1.0,
            "sana-sprint",
        ),
        beats_one_step("sana-sprint", "fd", "The one-step student beats its teacher's own single step"),
    ),
    note="The arms without the last time (p = 0) and with larger times are of the proof on points alone: each would be "
    "one more training on pictures.",
)

PROOFS = (IMAGE, MECHANISM)
