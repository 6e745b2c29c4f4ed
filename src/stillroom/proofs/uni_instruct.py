"""Uni-Instruct: which divergence, and what the density ratio and the GAN add to the score part."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import image_arms, image_claims, longer_arm, longer_claim, recorded_arm
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

LOW = POINTS.with_("jeffreys-low", options={"generator_times": {"law": "uniform", "low": 0.02, "high": 0.2}})
"""Asked at low noise alone, where the densities of student and data differ: above, their ratio is nearly 1 and all
divergences weigh samples alike."""
MISSING = LOW.with_("missing-forward-kl", options={"divergence": "forward_kl"}, student="inner")

MECHANISM = Proof(
    "uni-instruct",
    "mechanism",
    "ring",
    arms=(
        POINTS,
        POINTS.with_("forward-kl", options={"divergence": "forward_kl"}),
        POINTS.with_("reverse-kl-no-gan", options=PLAIN),
        POINTS.with_("chi2", options={"divergence": "chi2"}),
        LOW,
        LOW.with_("forward-kl-low", options={"divergence": "forward_kl"}),
        LOW.with_("reverse-kl-no-gan-low", options=PLAIN),
        LOW.with_("chi2-low", options={"divergence": "chi2"}),
        MISSING,
        MISSING.with_("missing-reverse-kl-no-gan", options=PLAIN),
        MISSING.with_("missing-untouched", engine={"steps": 0}),
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
        Claim(
            "gan-low",
            "At low noise alone: Jeffreys with GAN beats reverse KL without GAN",
            "ablation, CIFAR-10",
            "ced",
            "jeffreys-low",
            "<=",
            0.8,
            "reverse-kl-no-gan-low",
        ),
        Claim(
            "good-family-low",
            "At low noise alone: forward KL is as good as Jeffreys within a quarter",
            "ablation, CIFAR-10",
            "ced",
            "forward-kl-low",
            "<=",
            1.25,
            "jeffreys-low",
        ),
        Claim(
            "chi2-worse-low",
            "At low noise alone: the chi-squared divergence is worse than Jeffreys",
            "ablation, CIFAR-10",
            "ced",
            "chi2-low",
            ">=",
            1.0,
            "jeffreys-low",
        ),
        Claim(
            "missing-recovered",
            "From a student that never draws the outer mode of any class, forward KL with GAN wins back at least half "
            "of its share",
            "",
            "mode_balance",
            "missing-forward-kl",
            ">=",
            bound=0.25,
        ),
        Claim(
            "missing-recovered-more",
            "It wins back more than reverse KL without GAN does",
            "",
            "mode_balance",
            "missing-forward-kl",
            ">=",
            right="missing-reverse-kl-no-gan",
            offset=0.05,
        ),
        Claim(
            "missing-inside",
            "Nine tenths as many of its samples lie in a mode as of the student that had all modes at the start",
            "",
            "in_mode",
            "missing-forward-kl",
            ">=",
            0.9,
            "uni-instruct",
        ),
        *control_claims("uni-instruct"),
    ),
)

UNI = recorded_arm("uni-instruct")
LONGER = longer_arm("uni-instruct")
IMAGE = Proof(
    "uni-instruct",
    "image",
    "fashion",
    arms=(UNI, recorded_arm("sid-lsg"), LONGER, *image_arms(UNI)),
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
        longer_claim(LONGER),
    ),
)

PROOFS = (IMAGE, MECHANISM)
