"""SiD-LSG: guidance in the fake score (on two overlapping classes), more steps, the uniform mixture over steps."""

from __future__ import annotations

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import image_arms, image_claims, recorded_arm
from stillroom.proofs.points import TIMES, engine

POINTS = Arm(
    "none",
    "sid-lsg",
    options={
        "t_init": 1.0,
        "fake_loss": "v",
        "condition_drop": 0.1,
        **TIMES,
    },
    engine=engine(1000, generator={"lr": 2e-4}, critic={"lr": 1e-3}),
)

MECHANISM = Proof(
    "sid-lsg",
    "mechanism",
    "pair",
    arms=(
        POINTS,
        POINTS.with_("zero-cfg", options={"guidance": "zero-cfg"}),
        POINTS.with_("anti-cfg", options={"guidance": "anti-cfg"}),
        POINTS.with_("anti-cfg-own-scale", options={"guidance": "anti-cfg", "kappa_3": 1.0}),
        POINTS.with_("anti-cfg-fisher", options={"guidance": "anti-cfg", "alpha": 0.5}),
        POINTS.with_("long-3", options={"guidance": "long", "guidance_scale": 3.0}),
        POINTS.with_("untouched", engine={"steps": 0}),
        POINTS.with_("shuffled-teacher", teacher="shuffled"),
    ),
    claims=(
        Claim(
            "unguided-accuracy-low",
            "Without guidance the class accuracy is the data's (0.841) and not more than 0.03 above",
            "2404.04057",
            "accuracy",
            "none",
            "<=",
            bound=0.871,
        ),
        Claim(
            "unguided-accuracy-high",
            "... and not more than 0.03 below",
            "2404.04057",
            "accuracy",
            "none",
            ">=",
            bound=0.811,
        ),
        Claim(
            "zero-cfg",
            "Zero-CFG reaches an accuracy of 0.97 with no guidance on the teacher",
            "2505.12674",
            "accuracy",
            "zero-cfg",
            ">=",
            bound=0.97,
        ),
        Claim("anti-cfg", "So does Anti-CFG", "2505.12674", "accuracy", "anti-cfg", ">=", bound=0.97),
        Claim(
            "anti-cfg-own-scale",
            "So does Anti-CFG where the fake score keeps a scale of 1 in its own error (kappa_3)",
            "",
            "accuracy",
            "anti-cfg-own-scale",
            ">=",
            bound=0.97,
        ),
        Claim(
            "anti-cfg-fisher",
            "So does Anti-CFG at alpha = 0.5",
            "",
            "accuracy",
            "anti-cfg-fisher",
            ">=",
            bound=0.97,
        ),
        Claim(
            "order-1",
            "Zero-CFG shifts the classes further apart than no guidance",
            "2505.12674",
            "shift",
            "zero-cfg",
            ">=",
            1.2,
            "none",
        ),
        Claim(
            "order-2",
            "Anti-CFG shifts them further than Zero-CFG",
            "2505.12674",
            "shift",
            "anti-cfg",
            ">=",
            1.05,
            "zero-cfg",
        ),
        Claim(
            "across",
            "Zero-CFG leaves the other axis alone (standard deviation at least 0.9)",
            "2505.12674",
            "std_across",
            "zero-cfg",
            ">=",
            bound=0.9,
        ),
        Claim(
            "control-shuffled",
            "Control: a teacher that answers for the wrong class gives the wrong class",
            "",
            "accuracy",
            "shuffled-teacher",
            "<=",
            0.5,
            "none",
        ),
    ),
)

SID = recorded_arm("sid-lsg")
FOUR = SID.with_("sid-4-steps", options={"student_steps": 4})
LONG = SID.with_("sid-lsg-10000", engine={"steps": 10_000})
NEAR = recorded_arm("sid-lsg-long").with_("sid-lsg-long", engine={"compile": True})  # the same, only faster
IMAGE = Proof(
    "sid-lsg",
    "image",
    "fashion",
    arms=(SID, LONG, NEAR, FOUR, *image_arms(SID)),
    claims=(
        Claim(
            "four-steps",
            "Four steps beat one at the same number of updates",
            "2505.12674",
            "fd",
            "sid-4-steps",
            "<=",
            0.8,
            "sid-lsg",
        ),
        Claim(
            "longer",
            "More updates (10,000) take the one-step student a third closer to real images",
            "",
            "fd",
            "sid-lsg-10000",
            "<=",
            0.67,
            "sid-lsg",
        ),
        Claim(
            "near-teacher-longer",
            "After 10,000 updates its distance is at most 1.2 times that of the teacher's best many-step sampling",
            "",
            "fd",
            "sid-lsg-10000",
            "<=",
            1.2,
            "teacher",
        ),
        Claim(
            "near-teacher-long",
            "By the long recipe (12,000 updates) its distance is at most 1.2 times that of the teacher's best "
            "many-step sampling",
            "",
            "fd",
            "sid-lsg-long",
            "<=",
            1.2,
            "teacher",
        ),
        *image_claims("sid-lsg"),
    ),
)

PROOFS = (IMAGE, MECHANISM)
