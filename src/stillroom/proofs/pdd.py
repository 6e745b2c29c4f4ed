"""Parallel decoding distillation: many heads against one, and what the teacher's step is taken with."""

from __future__ import annotations

from dataclasses import replace

from stillroom.proofs.base import Claim
from stillroom.proofs.flow_maps import proofs

IMAGE, RING = proofs("pdd", {"heads": 16, "shortest": 4, "longest": 16}, "regress")
MAIN = RING.arms[0]
MECHANISM = replace(
    RING,
    arms=(
        *RING.arms,
        MAIN.with_("one head", options={"heads": 1, "shortest": 1, "longest": 1}),
        MAIN.with_("euler", options={"solver": "euler"}),
    ),
    claims=(
        *RING.claims,
        Claim(
            "heads",
            "Sixteen heads give a nearer single step than one, which learns one step of the teacher's own solver",
            "section 3.2",
            "ced",
            "pdd",
            "<=",
            0.5,
            "one head",
        ),
        Claim(
            "midpoint",
            "Targets of the midpoint rule are no worse than Euler's",
            "Tables 2 to 4",
            "ced",
            "pdd",
            "<=",
            1.0,
            "euler",
        ),
    ),
)

PROOFS = (IMAGE, MECHANISM)
