"""tcm: one step and two of the same weights, on points and on pictures."""

from __future__ import annotations

from stillroom.proofs.flow_maps import TUNED, proofs

PROOFS = proofs(
    "tcm",
    {"stages": 6},
    "agree",
    {"lr": 3e-4, "betas": (0.9, 0.99)},
    TUNED + "one step was a third nearer there than the teacher's own.",
)
