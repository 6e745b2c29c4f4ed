"""ayf: one step and two of the same weights, on points and on pictures."""

from __future__ import annotations

from stillroom.proofs.flow_maps import TUNED, proofs

PROOFS = proofs(
    "ayf",
    {"tangent_warmup": 0.2},
    "align",
    {"lr": 5e-4, "betas": (0.5, 0.99)},
    TUNED + "one seed of three was no nearer there than its teacher.",
)
