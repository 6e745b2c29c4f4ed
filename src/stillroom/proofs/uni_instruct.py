"""Uni-Instruct: which divergence, and what the density ratio and the GAN add to the score part."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import image_arms, image_claims, recorded_arm
from stillroom.proofs.points import TIMES, control_claims, engine

POINTS = Arm(
    "uni-instruct",
    "uni-instruct",
    options={
        "divergence": "jeffreys",
        "gan_head": "mlp",
        "gan_weight": 0.01,
        "critic_gan_weight": 1.0,
        "t_init": 1.0,
        "fake_loss": "v",
        **TIMES,
    },
    engine=engine(1000, generator={"lr": 2e-4}, critic={"lr": 1e-3}),
)
PLAIN = {"divergence": "reverse_kl", "gan_weight": 0.0}

MECHANISM = Proof(
    "uni-instruct",
    "mechanism",
    "ring",
    arms=(
        POINTS,
        POINTS.with_("forward-kl", options={"divergence": "forward_kl"}),
        POINTS.with_("reverse-kl-no-gan", options=PLAIN),
        POINTS.with_("chi2", options={"divergence": "chi2"}),
        POINTS.with_("untouched", engine={"steps": 0}),
        POINTS.with_("shuffled-teacher", teacher="shuffled"),
    ),
    claims=(
        Claim(
            "gan",
            "Jeffreys with GAN beats reverse KL without GAN",
            "ablation, CIFAR-10",
            "ced",
            "uni-instruct",
            "<=",
            0.95,
            "reverse-kl-no-gan",
        ),
        Claim(
            "good-family",
            "Forward KL is as good as Jeffreys within a quarter",
            "ablation, CIFAR-10",
            "ced",
            "forward-kl",
            "<=",
            1.25,
            "uni-instruct",
        ),
        Claim(
            "chi2-worse",
            "The chi-squared divergence is worse than Jeffreys",
            "ablation, CIFAR-10",
            "ced",
            "chi2",
            ">=",
            1.0,
            "uni-instruct",
        ),
        *control_claims("uni-instruct"),
    ),
)

UNI = recorded_arm("uni-instruct")
IMAGE = Proof(
    "uni-instruct",
    "image",
    "fashion",
    arms=(UNI, recorded_arm("sid-lsg"), *image_arms(UNI)),
    claims=(
        Claim(
            "gan",
            "Jeffreys with GAN beats reverse KL without GAN (which is SiD at alpha = 1)",
            "ablation, CIFAR-10",
            "fd",
            "uni-instruct",
            "<=",
            0.95,
            "sid-lsg",
        ),
        *image_claims("uni-instruct"),
    ),
)

PROOFS = (IMAGE, MECHANISM)
