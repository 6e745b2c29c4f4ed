"""Proofs: each method against the baselines its paper argues against, with the claim checked as an inequality."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from stillroom.errors import UserError, nearest

if TYPE_CHECKING:
    from stillroom.proofs.base import Proof


def proofs() -> dict[str, tuple[Proof, ...]]:
    """All proofs by method slug: one per level (mechanism, image or text)."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "PROOFS"):
            found[module.PROOFS[0].method] = module.PROOFS
    return dict(sorted(found.items()))


def get_proofs(slug: str) -> tuple[Proof, ...]:
    known = proofs()
    if slug not in known:
        raise UserError(f"no proof for method {slug!r}{nearest(slug, known)}", cure=f"known: {', '.join(known)}")
    return known[slug]
