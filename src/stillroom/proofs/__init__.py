"""Proofs: each method against the baselines its paper argues against, with the claim checked as an inequality."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from stillroom.errors import UserError, nearest
from stillroom.registry import offered

if TYPE_CHECKING:
    from stillroom.proofs.base import Proof


def proofs() -> dict[str, tuple[Proof, ...]]:
    """All proofs by method slug, one per level (mechanism, image or text): stillroom's own and those that installed
    packages offer, as tuples, under ``stillroom.proofs``."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    known = [module.PROOFS for module in modules if hasattr(module, "PROOFS")]
    known += list(offered("stillroom.proofs"))
    return dict(sorted((found[0].method, found) for found in known))


def get_proofs(slug: str) -> tuple[Proof, ...]:
    known = proofs()
    if slug not in known:
        raise UserError(f"no proof for method {slug!r}{nearest(slug, known)}", cure=f"known: {', '.join(known)}")
    return known[slug]
