"""scm: one step and two of the same weights, on points and on pictures."""

from __future__ import annotations

from stillroom.proofs.flow_maps import TUNED, proofs

PROOFS = proofs(
    "scm",
    {"tangent_warmup": 0.2},
    "consistency",
    {"lr": 5e-4, "betas": (0.5, 0.99)},
    TUNED + "one step was no nearer there than the teacher's own.",
)
