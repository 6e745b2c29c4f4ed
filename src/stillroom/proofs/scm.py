"""scm: one step and two of the same weights, on points and on pictures."""

from __future__ import annotations

from stillroom.proofs.flow_maps import proofs

PROOFS = proofs("scm", {"tangent_warmup": 0.2}, "consistency")
