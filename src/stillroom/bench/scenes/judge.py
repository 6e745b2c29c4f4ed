"""SceneEval: whether pictures show what their captions ask for."""

from __future__ import annotations

from collections.abc import Sequence

from stillroom.data.scenes.captions import CATEGORIES, Caption, satisfied
from stillroom.evaluation.scene_parser import Reading


def scene_eval(captions: Sequence[Caption], reading: Reading) -> dict[str, float]:
    """``sceneeval`` (mean of the categories) and ``sceneeval_<category>`` for each category that ``captions`` hold."""
    kept: dict[str, list[bool]] = {}
    for caption, found in zip(captions, reading.scenes(), strict=True):
        kept.setdefault(caption.category, []).append(satisfied(caption, found))
    shares = {category: sum(kept[category]) / len(kept[category]) for category in CATEGORIES if category in kept}
    return {"sceneeval": sum(shares.values()) / len(shares)} | {f"sceneeval_{k}": v for k, v in shares.items()}
