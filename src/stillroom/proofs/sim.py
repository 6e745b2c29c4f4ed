"""SIM: Pseudo-Huber against the raw squared distance of scores, at small and large learning rates."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import image_arms, image_claims, recorded_arm
from stillroom.proofs.points import TIMES, control_claims, engine, frozen_critic_claim


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
RAW = {"distance": "l2", "score_space": True}

MECHANISM = Proof(
    "sim",
    "mechanism",
    "ring",
    arms=(
        MAIN,
        points("huber-sgd-0.01", 1e-2),
        points("huber-sgd-0.1", 1e-1),
        points("raw-l2-sgd-0.01", 1e-2, **RAW),
        points("raw-l2-sgd-0.1", 1e-1, **RAW),
        MAIN.with_("untouched", engine={"steps": 0}),
        MAIN.with_("shuffled-teacher", teacher="shuffled"),
        MAIN.with_("frozen-critic", engine={"optim": {"critic": {"lr": 0.0}}}),
    ),
    claims=(
        Claim(
            "robust-0.01",
            "With plain SGD at learning rate 0.01 Pseudo-Huber beats the raw squared score distance",
            "section 4",
            "ced",
            "huber-sgd-0.01",
            "<=",
            0.8,
            "raw-l2-sgd-0.01",
        ),
        Claim(
            "robust-0.1",
            "The same at learning rate 0.1",
            "section 4",
            "ced",
            "huber-sgd-0.1",
            "<=",
            0.8,
            "raw-l2-sgd-0.1",
        ),
        *control_claims("sim"),
        frozen_critic_claim("sim"),
    ),
)

SIM = recorded_arm("sim")
FAST = {"optim": {"generator": {"lr": 5 * SIM.engine["optim"]["generator"]["lr"]}}}
IMAGE = Proof(
    "sim",
    "image",
    "fashion",
    arms=(
        SIM,
        SIM.with_("huber-5x-lr", engine=FAST),
        SIM.with_("raw-l2-5x-lr", options=RAW, engine=FAST),
        *image_arms(SIM),
    ),
    claims=(
        Claim(
            "robust",
            "At five times the learning rate Pseudo-Huber beats the raw squared score distance",
            "section 4",
            "fd",
            "huber-5x-lr",
            "<=",
            0.8,
            "raw-l2-5x-lr",
        ),
        *image_claims("sim"),
    ),
)

PROOFS = (IMAGE, MECHANISM)
