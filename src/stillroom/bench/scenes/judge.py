"""SceneEval: whether pictures show what their captions ask for, and what is wrong where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stillroom.data.scenes.captions import CATEGORIES, Caption, Scene, satisfied
from stillroom.evaluation.scene_parser import Reading

MISTAKES = ("too few", "too many", "a digit twice", "another digit", "colours exchanged", "another colour", "place")


def scene_eval(captions: Sequence[Caption], reading: Reading) -> dict[str, float]:
    """``sceneeval`` (mean of the categories) and ``sceneeval_<category>`` for each category that ``captions`` hold."""
    kept: dict[str, list[bool]] = {}
    for caption, found in zip(captions, reading.scenes(), strict=True):
        kept.setdefault(caption.category, []).append(satisfied(caption, found))
    shares = {category: sum(kept[category]) / len(kept[category]) for category in CATEGORIES if category in kept}
    return {"sceneeval": sum(shares.values()) / len(shares)} | {f"sceneeval_{k}": v for k, v in shares.items()}


def mistake(caption: Caption, found: Scene) -> str:
    """What is wrong, the first of :data:`MISTAKES` that holds; empty where the picture obeys. ``a digit twice``: of the
    digits asked for, one more often and another not at all. ``colours exchanged``: the digits and the colours that are
    asked for, each in another's."""
    if satisfied(caption, found):
        return ""
    wanted, drawn = sorted(want.digit for want in caption.wants), sorted(thing.digit for thing in found.things)
    if len(drawn) != len(wanted):
        return "too few" if len(drawn) < len(wanted) else "too many"
    if drawn != wanted:
        return "a digit twice" if set(drawn) < set(wanted) else "another digit"
    asked = [want.colour for want in caption.wants if want.colour is not None]
    pairs = {(want.digit, want.colour) for want in caption.wants}
    if not asked or {(thing.digit, thing.colour) for thing in found.things} == pairs:
        return "place"
    return "colours exchanged" if sorted(thing.colour for thing in found.things) == sorted(asked) else "another colour"


def mistakes(captions: Sequence[Caption], reading: Reading) -> dict[str, float]:
    """The share of the pictures with each of :data:`MISTAKES`."""
    counts = Counter(mistake(*pair) for pair in zip(captions, reading.scenes(), strict=True))
    return {kind: counts[kind] / len(captions) for kind in MISTAKES}
