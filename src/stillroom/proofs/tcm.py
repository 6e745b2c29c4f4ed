"""tcm: one step and two of the same weights, on points and on pictures."""

from __future__ import annotations

from stillroom.proofs.flow_maps import proofs

PROOFS = proofs("tcm", {"stages": 6}, "agree")
