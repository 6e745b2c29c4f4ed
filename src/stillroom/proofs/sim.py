"""SIM: Pseudo-Huber against the squared distance, at small and large learning rates."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import image_arms, image_claims, longer_arm, longer_claim, recorded_arm
from stillroom.proofs.points import RESTING, TIMES, control_claims, engine, resting_critic_claim


def points(name: str, lr: float, **options: object) -> Arm:
    return Arm(
        name,
        "sim",
        options={
            "t_init": 1.0,
            "c": 0.03,
            "fake_loss": "v",
            **TIMES,
            **options,
        },
        engine=engine(1000, generator={"lr": lr, "name": "sgd", "betas": [0.0, 0.0]}, critic={"lr": 1e-3}),
    )


ADAM = {"optim": {"generator": {"lr": 1e-4, "name": "adam", "betas": [0.0, 0.999]}}}
MAIN = points("sim", 1e-4).with_("sim", engine=ADAM)
L2 = {"distance": "l2"}
"""The squared distance instead, and nothing else: of x0-predictions at unit weight too."""
FAST = {"optim": {"generator": {"lr": 5e-4}}}
EARLY = {"steps": 300}

MECHANISM = Proof(
    "sim",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        MAIN.with_("l2", options=L2),
        MAIN.with_("huber-early", engine=EARLY),
        MAIN.with_("l2-early", options=L2, engine=EARLY),
        MAIN.with_("huber-5x-lr", engine=FAST),
        MAIN.with_("l2-5x-lr", options=L2, engine=FAST),
        points("huber-sgd-0.01", 1e-2),
        points("l2-sgd-0.01", 1e-2, **L2),
        points("huber-sgd-0.1", 1e-1),
        points("l2-sgd-0.1", 1e-1, **L2),
        points("huber-sgd-1", 1.0),
        points("l2-sgd-1", 1.0, **L2),
        MAIN.with_("untouched", engine={"steps": 0}),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
        MAIN.with_("resting-critic", engine=RESTING),
    ),
    claims=(
        Claim(
            "early",
            "Fast: after 300 steps of Adam at the rate of 1e-4 Pseudo-Huber is nearer than the squared distance",
            "section 4",
            "ced",
            "huber-early",
            "<=",
            0.8,
            "l2-early",
        ),
        Claim("ordinary", "So it is after all 1,000 steps", "section 4", "ced", "sim", "<=", 0.8, "l2"),
        Claim(
            "ordinary-5x",
            "So it is after 1,000 steps at five times the rate",
            "section 4",
            "ced",
            "huber-5x-lr",
            "<=",
            0.8,
            "l2-5x-lr",
        ),
        Claim(
            "robust-0.01",
            "With plain SGD at the rate of 0.01 Pseudo-Huber beats the squared distance",
            "section 4",
            "ced",
            "huber-sgd-0.01",
            "<=",
            0.8,
            "l2-sgd-0.01",
        ),
        Claim("robust-0.1", "The same at 0.1", "section 4", "ced", "huber-sgd-0.1", "<=", 0.8, "l2-sgd-0.1"),
        Claim("robust-1", "The same at 1", "section 4", "ced", "huber-sgd-1", "<=", 0.8, "l2-sgd-1"),
        *control_claims("sim"),
        resting_critic_claim("sim"),
    ),
    note="Both distances are of x0-predictions and have unit weight over noise levels: nothing but the distance "
    "differs. Plain SGD shows the size of their gradients, which Adam divides out: at equal rates Pseudo-Huber takes "
    "the longer steps near the end.",
)

SIM = recorded_arm("sim")
LONGER = longer_arm("sim")
FIVEFOLD = {"optim": {"generator": {"lr": 5 * SIM.engine["optim"]["generator"]["lr"]}}}
IMAGE = Proof(
    "sim",
    "image",
    "fashion",
    arms=(
        SIM,
        SIM.with_("huber-5x-lr", engine=FIVEFOLD),
        SIM.with_("l2-5x-lr", options=L2, engine=FIVEFOLD),
        LONGER,
        *image_arms(SIM),
    ),
    claims=(
        Claim(
            "robust",
            "At five times the learning rate Pseudo-Huber beats the squared distance",
            "section 4",
            "fd",
            "huber-5x-lr",
            "<=",
            0.8,
            "l2-5x-lr",
        ),
        *image_claims("sim"),
        longer_claim(LONGER),
    ),
)

PROOFS = (IMAGE, MECHANISM)
