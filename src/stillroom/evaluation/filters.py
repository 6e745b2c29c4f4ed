"""Filters of synthetic samples: what a data set keeps. Own ones are added by :func:`register_filter`, from anywhere or
from an installed package under the entry-point group ``stillroom.filters``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.data.source import ASSETS
from stillroom.errors import UserError, nearest
from stillroom.evaluation.metrics import to_uint8
from stillroom.registry import Registry

NOT_JUDGED = -1.0
"""What a store records as the score of a sample that a filter has nothing to say about; such a sample is kept."""


class Rule(Protocol):
    """What a filter does: a score per sample, higher is better, or None where it has nothing to say.

    A rule that works with a model should name it in an attribute ``version``, which a store's plan records.
    """

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Iterable[float | None]:
        """images: float32 ``[N, 3, H, W]`` in [-1, 1], finite except for ``readable``. Returns N scores."""
        ...


@runtime_checkable
class AcrossRule(Protocol):
    """A rule that compares samples with one another. It is asked twice: for a mark of each sample, and, when all are
    there, for the scores of all marks in the order of the plan."""

    def marks(self, images: Tensor, captions: Sequence[str]) -> Sequence[str]: ...

    def scores(self, marks: Sequence[str], threshold: float) -> Sequence[float]: ...


@dataclass(frozen=True)
class Filter:
    """A rule and its threshold: a sample is kept if its score is at least that, or None."""

    name: str
    threshold: float
    rule: Any

    @property
    def across(self) -> bool:
        return isinstance(self.rule, AcrossRule)

    def describe(self) -> dict[str, Any]:
        """What a store's plan says of it."""
        return {"threshold": self.threshold, "version": str(getattr(self.rule, "version", ""))}

    def __call__(self, images: Tensor, captions: Sequence[str]) -> list[float | None]:
        """N scores. Raises UserError if the rule gives anything but N finite numbers (or None)."""
        scores = [None if score is None else float(score) for score in self.rule(images, captions)]
        if len(scores) != len(captions) or not all(score is None or math.isfinite(score) for score in scores):
            raise UserError(
                f"filter {self.name!r} gave {len(scores)} scores for {len(captions)} samples, or one not finite",
                cure="a filter gives one finite number per sample, or None",
            )
        return scores

    def keeps(self, score: float | None) -> bool:
        return score is None or score >= self.threshold


_FILTERS: Registry[tuple[float, Any]] = Registry("filter", "filters")


def register_filter(name: str, threshold: float = 0.5) -> Callable[[Any], Any]:
    """Make a filter known by its name: a function ``(images, captions) -> scores``, or a class whose instances are
    called like that (or have ``marks`` and ``scores``, :class:`AcrossRule`); a class is made only when it is used."""

    def add(rule: Any) -> Any:
        _FILTERS.add(name, (threshold, rule), key=lambda entry: entry[1])
        return rule

    return add


def filters() -> dict[str, float]:
    """All known filters with their usual thresholds: stillroom's own and those that installed packages offer."""
    return {name: threshold for name, (threshold, _) in _FILTERS.known().items()}


def make_filters(wanted: Iterable[str | Filter] | Mapping[str, float]) -> list[Filter]:
    """Filters from names (``"parser"``, ``"dedup=6"``), a mapping name -> threshold, or ready ones; in this order.

    Raises UserError for an unknown or repeated name and for a threshold that is no number.
    """
    if isinstance(wanted, Mapping):
        wanted = [f"{name}={threshold}" for name, threshold in wanted.items()]
    made: list[Filter] = []
    for one in wanted:
        if not isinstance(one, Filter):
            name, has_threshold, text = one.partition("=")
            known = filters()
            if name not in known:
                raise UserError(f"unknown filter {name!r}{nearest(name, known)}", cure=f"filters: {', '.join(known)}")
            try:
                threshold = float(text) if has_threshold else known[name]
                if not math.isfinite(threshold):
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"filter {one!r}: {text!r} is no threshold", cure="write parser=0.5 or the like"
                ) from None
            rule = _FILTERS.found[name][1]
            one = Filter(name, threshold, rule() if isinstance(rule, type) else rule)
        if one.name in (other.name for other in made):
            raise UserError(f"filter {one.name!r} is named twice", cure="name each filter once")
        made.append(one)
    return made


# --- stillroom's own --------------------------------------------------------------------------------------------------
@register_filter("readable", threshold=1.0)
def readable(images: Tensor, captions: Sequence[str]) -> list[float]:
    """The range of an image in grey levels (0 to 255); -1 if it is not finite. At least 1: an image that is not one
    flat colour."""
    finite = images.flatten(1).isfinite().all(1)
    flat = images.nan_to_num(0.0, 0.0, 0.0).flatten(1)
    spread = (flat.amax(1) - flat.amin(1)) * 127.5
    return torch.where(finite, spread, torch.tensor(-1.0)).tolist()


@register_filter("dedup", threshold=4.0)
class Dedup:
    """The distance of an image to the nearest one before it in the plan: that of their 64-bit difference hashes, in
    bits, or 64 where their thumbnails differ. At least 4: not nearly an earlier image.

    The hash sees no colour and little of a picture that is mostly flat ground; hence the thumbnails, 8x8 grey and 4x4
    colour.
    """

    version = "dhash64-1"
    tolerance = 8
    """Largest difference between cells of two thumbnails, in levels of 0 to 255, at which images are alike."""

    def marks(self, images: Tensor, captions: Sequence[str]) -> list[str]:
        """16 hexadecimal digits of hash and 224 of thumbnails each."""
        levels = (images.double() + 1) * 127.5
        grey, colour = F.adaptive_avg_pool2d(_grey(images), (8, 8)), F.adaptive_avg_pool2d(levels, (4, 4))
        cells = torch.cat([grey.flatten(1), colour.flatten(1)], 1).round().clamp(0, 255).to(torch.uint8)
        return [
            f"{value:016x}{bytes(row.tolist()).hex()}"
            for value, row in zip(difference_hash(images), cells, strict=True)
        ]

    def scores(self, marks: Sequence[str], threshold: float) -> list[float]:
        """64 wherever no earlier kept image is nearer than ``threshold``: distances beyond that are not worked out."""
        hashes = np.array([int(mark[:16], 16) for mark in marks], np.uint64)
        cells = np.frombuffer(bytes.fromhex("".join(mark[16:] for mark in marks)), np.uint8).reshape(-1, 112)
        reach = max(math.ceil(threshold) - 1, 0)
        # two hashes that differ in at most `reach` bits agree in at least one of reach + 1 bands
        edges = np.linspace(0, 64, min(reach, 63) + 2).round().astype(int)
        bands = [(int(low), (1 << int(high - low)) - 1) for low, high in zip(edges[:-1], edges[1:], strict=True)]
        kept: dict[tuple[int, int], list[int]] = {}
        scores = []
        for row, value in enumerate(map(int, hashes)):
            keys = [(band, value >> low & mask) for band, (low, mask) in enumerate(bands)]
            near = np.array(sorted({other for key in keys for other in kept.get(key, ())}), int)
            distance = 64
            if len(near):
                bits = _popcount(hashes[near] ^ hashes[row])
                alike = (np.abs(cells[near].astype(int) - cells[row]) <= self.tolerance).all(1)
                distance = int(np.where(alike, bits, 64).min())
            scores.append(float(distance))
            if distance >= threshold:
                for key in keys:
                    kept.setdefault(key, []).append(row)
        return scores


def difference_hash(images: Tensor) -> list[int]:
    """64 bits per image: whether each cell of an 8x9 grey thumbnail is at least one level brighter than the cell to its
    right. The margin keeps rounding noise on flat ground from setting bits."""
    cells = F.adaptive_avg_pool2d(_grey(images), (8, 9))
    bits = (cells[..., :-1] - cells[..., 1:] >= 1.0).flatten(1).numpy()
    return [int.from_bytes(np.packbits(row).tobytes(), "big") for row in bits]


def _grey(images: Tensor) -> Tensor:
    """``[N, 1, H, W]`` float64 in levels of 0 to 255."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    return ((images.double() + 1) * 127.5 * weights).sum(1, keepdim=True)


def _popcount(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(values[:, None].view(np.uint8), axis=1).sum(1)


@register_filter("parser", threshold=1.0)
class Obeys:
    """1 if the scenes parser finds in the image exactly what the caption asks for (the check of SceneEval), else 0.
    Captions that are not of the scenes grammar are not judged."""

    def __init__(self) -> None:
        from stillroom.evaluation.scene_parser import load_parser

        self.parser = load_parser(ASSETS / "scenes-parser")
        self.version = self.parser.name

    def __call__(self, images: Tensor, captions: Sequence[str]) -> list[float | None]:
        from stillroom.data.scenes.captions import Caption, parse_caption, satisfied

        wanted: list[Caption | None] = []
        for caption in captions:
            try:
                wanted.append(parse_caption(caption))
            except UserError:
                wanted.append(None)
        scores: list[float | None] = [None] * len(captions)
        judged = {row: want for row, want in enumerate(wanted) if want is not None}
        if judged:
            found = self.parser.read(to_uint8(images[list(judged)])).scenes()
            for (row, want), scene in zip(judged.items(), found, strict=True):
                scores[row] = float(satisfied(want, scene))
        return scores
