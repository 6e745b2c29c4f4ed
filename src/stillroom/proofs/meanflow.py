"""meanflow: one step and two of the same weights, on points and on pictures."""

from __future__ import annotations

from stillroom.proofs.flow_maps import proofs

PROOFS = proofs("meanflow", {"apart": 0.5}, "jump")
