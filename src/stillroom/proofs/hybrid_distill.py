"""Hybrid Distill: both teachers against either alone, for classes and for single patches, and with patches dropped."""

from __future__ import annotations

from typing import Any

from stillroom.proofs.base import Arm, Claim, Proof
from stillroom.proofs.image import recipe_arm

ENGINE = {"steps": 800, "batch": 64, "warmup": 30, "schedule": "cosine", "log_every": 100}


def points(name: str, **options: Any) -> Arm:
    return Arm(name, "hybrid-distill", options={"theta": 0.0, **options}, engine=ENGINE)


BOTH = points("both")
MECHANISM = Proof(
    "hybrid-distill",
    "mechanism",
    "canvas-two",
    arms=(
        BOTH,
        points("both-and-dropping", theta=0.3),
        points("features-alone", beta=0.0),
        points("relations-alone", alpha=0.0),
        points("relations-as-products", relation="smooth_l1"),
        BOTH.with_("random-teachers", teacher="untrained"),
        BOTH.with_("shuffled-teachers", teacher="shuffled"),
        BOTH.with_("untouched", engine={"steps": 0}),
        Arm("masked-teacher", sampler={"name": "forward"}),
        Arm("supervised-teacher", sampler={"name": "forward"}, data={"teacher": "supervised"}),
    ),
    claims=(
        Claim(
            "class-kept", "Relations of the masked teacher cost the classes nothing", "abstract", "probe", "both", ">=",
            right="features-alone", offset=-0.01,
        ),
        Claim(
            "dense", "They say more of single patches than the discriminative teacher alone", "abstract", "dense",
            "both", ">=", right="features-alone", offset=0.02,
        ),
        Claim(
            "dense-control", "Control: of single patches, teachers that see another image say less", "", "dense",
            "both", ">=", right="shuffled-teachers", offset=0.02,
        ),
        Claim(
            "diverse", "Attention heads come nearer to the masked teacher's diversity than with features alone",
            "section 3", "collapse_gap", "both", "<=", right="features-alone",
        ),
        Claim(
            "dropping", "10 of the 25 patches are enough", "section 3", "probe", "both-and-dropping", ">=",
            right="both", offset=-0.01,
        ),
        Claim(
            "control-random", "Control: untrained teachers do not do it", "", "probe", "both", ">=",
            right="random-teachers", offset=0.05,
        ),
        Claim(
            "control-shuffled", "Control: teachers that see another image do not", "", "probe", "both", ">=",
            right="shuffled-teachers", offset=0.05,
        ),
    ),
    note="Single patches are asked which quarter of the digit they show. A probe that knows nothing but a patch's "
    "place on the canvas gets 68 % of them, more than any network here: what the claim `dense` shows is that places "
    "are kept.",
)  # fmt: skip


def short(name: str, **options: Any) -> Arm:
    return points(name, **options).with_(name, engine={"steps": 500})


FRESH = Proof(
    "hybrid-distill",
    "mechanism",
    "fresh-canvas-two",
    arms=(
        short("both"),
        short("features-alone", beta=0.0),
        short("both").with_("shuffled-teachers", teacher="shuffled"),
        short("both-and-dropping", theta=0.15),
        short("both").with_("untouched", engine={"steps": 0}),
        Arm("masked-teacher", sampler={"name": "forward"}),
        Arm("supervised-teacher", sampler={"name": "forward"}, data={"teacher": "supervised"}),
    ),
    claims=(
        Claim(
            "class-kept", "Relations of the masked teacher cost the classes nothing", "abstract", "probe", "both", ">=",
            right="features-alone", offset=-0.01,
        ),
        Claim(
            "dense", "Single patches say more of the whole image than with the discriminative teacher alone",
            "abstract", "height", "both", ">=", right="features-alone", offset=0.02,
        ),
        Claim(
            "dense-control", "Control: with teachers that see another image they say less", "", "height", "both", ">=",
            right="shuffled-teachers", offset=0.02,
        ),
        Claim(
            "diverse", "Attention heads come nearer to the masked teacher's diversity than with features alone",
            "section 3", "collapse_gap", "both", "<=", right="features-alone",
        ),
        Claim(
            "dropping", "17 of the 25 patches are enough", "section 3", "probe", "both-and-dropping", ">=",
            right="both", offset=-0.01,
        ),
        Claim(
            "control-shuffled", "Control: of classes, teachers that see another image say less", "", "probe", "both",
            ">=", right="shuffled-teachers", offset=0.05,
        ),
    ),
    note="500 steps. Single patches are asked how far down their image's digit lies, of which their place says "
    "nothing. Left out for their cost: untrained teachers, relations alone and relations compared as products.",
)  # fmt: skip

MAIN = recipe_arm("hybrid-distill").with_("hybrid-distill", engine={"steps": 300, "warmup": 15})
WHOLE = MAIN.with_("both", options={"theta": 0.0})
IMAGE = Proof(
    "hybrid-distill",
    "image",
    "fashion-two",
    arms=(
        MAIN,
        WHOLE,
        WHOLE.with_("features-alone", options={"beta": 0.0}),
        MAIN.with_("untouched", engine={"steps": 0}),
    ),
    claims=(
        Claim(
            "class-kept", "Relations of the masked teacher cost the classes nothing", "abstract", "probe", "both", ">=",
            right="features-alone", offset=-0.01,
        ),
        Claim(
            "dropping", "Dropping two thirds of the patches costs at most two points", "section 3", "probe",
            "hybrid-distill", ">=", right="both", offset=-0.02,
        ),
        Claim(
            "learns", "Training beats the untouched network", "", "probe", "hybrid-distill", ">=", right="untouched",
            offset=0.02,
        ),
    ),
    note="300 steps of the recipe's 1,000.",
)  # fmt: skip

PROOFS = (IMAGE, FRESH, MECHANISM)
