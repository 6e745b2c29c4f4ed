"""The text-to-image bench: captioned scenes of handwritten digits, a judge that reads them, one protocol for scores.

The protocol. N captions, fixed by a seed, the categories in turn; a generator draws one picture for each. *SceneEval*:
the share of pictures in which the frozen parser finds exactly what the caption asks for and nothing else; by category,
and overall as the mean of the categories, as GenEval counts (arXiv:2310.11513). It is never called
GenEval: other objects, another judge, a stricter rule. The ceiling is the SceneEval of real pictures of the same
captions in handwriting the parser was not trained on; what it lacks to 1 are the parser's own mistakes.

Distances compare the pictures, as uint8, in the parser's features, with real pictures of the same captions in held-out
handwriting (at least 5,000). The floor is the same score of N real pictures in training handwriting. N is part of every
distance's name. N = 1,200 is the standard: 200 captions of each of six categories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.cache import cached_tensors
from stillroom.data.scenes.captions import (
    CATEGORIES,
    Caption,
    all_captions,
    categories,
    parse_caption,
    satisfied,
    seeded,
)
from stillroom.data.scenes.pictures import SHAPE, scene_set
from stillroom.data.source import ASSETS
from stillroom.errors import UserError
from stillroom.evaluation import metrics
from stillroom.evaluation.scene_parser import Reading, SceneParser, load_parser, save_parser, train_scene_parser

__all__ = ["PARSER_DIR", "STANDARD_N", "ScenesBench", "scene_eval", "teach_parser", "train_scene_parser"]

STANDARD_N = 1_200
REFERENCE = 5_000
"""Real pictures, at least, that distances compare with."""
SUBSETS = 50
"""Random subsets for the kernel distance."""
LEAST = 6
"""Pictures that distances need: one more than the neighbours of precision and its kin."""
PARSER_DIR = ASSETS / "scenes-parser"


def scene_eval(captions: Sequence[Caption], reading: Reading) -> dict[str, float]:
    """``sceneeval`` (mean of the categories) and ``sceneeval_<category>`` for each category that ``captions`` hold."""
    kept: dict[str, list[bool]] = {}
    for caption, found in zip(captions, reading.scenes(), strict=True):
        kept.setdefault(caption.category, []).append(satisfied(caption, found))
    shares = {category: sum(kept[category]) / len(kept[category]) for category in CATEGORIES if category in kept}
    return {"sceneeval": sum(shares.values()) / len(shares)} | {f"sceneeval_{k}": v for k, v in shares.items()}


class ScenesBench:
    """The scenes world with its judge. Parser and statistics load when first asked for; ``report`` is told what takes
    long."""

    def __init__(self, report: Callable[[str], None] = print) -> None:
        self.report = report

    @cached_property
    def parser(self) -> SceneParser:
        """The shipped parser (see :func:`teach_parser`)."""
        return load_parser(PARSER_DIR)

    # --- protocol -----------------------------------------------------------------------------------------------------
    def captions(self, n: int = STANDARD_N, seed: int = 0, split: str = "train") -> list[Caption]:
        """``n`` captions, the categories of ``split`` in turn, so that any leading part is balanced as well. Inside a
        category captions are drawn without return, until all have come."""
        decks = []
        for category in categories(split):
            pool = all_captions(category, split)
            draws = seeded(f"bench captions {category} {split} {seed}")
            rounds = [torch.randperm(len(pool), generator=draws) for _ in range(n // len(pool) + 1)]
            decks.append([pool[i] for i in torch.cat(rounds).tolist()])
        return [decks[i % len(decks)][i // len(decks)] for i in range(n)]

    def score(
        self, images: Tensor, captions: Sequence[Caption | str], n: int | None = None, distances: bool = True
    ) -> dict[str, Any]:
        """All scores of ``images [N, 3, 32, 32]``, float in [-1, 1] or uint8, drawn for ``captions``.

        ``n``: only the first n. The result holds ``sceneeval`` and ``sceneeval_<category>``; ``fd``; ``kid`` and
        ``kid_sd`` (over subsets); ``precision``, ``recall``, ``density``, ``coverage`` (k = 5, equal numbers of real
        and generated); ``n``, ``extractor`` (the parser's name), ``reference``; and ``names``: how each number is to be
        called in print. ``distances=False`` leaves out all but SceneEval, for a quick look.
        """
        n = len(images) if n is None else n
        if n > len(images) or len(captions) < n:
            raise ValueError(f"scores at N={n} need {n} images and captions, got {len(images)} and {len(captions)}")
        if n < 1 or (distances and n < LEAST):
            raise UserError(f"{n} images are too few to score", cure=f"score {LEAST} or more")
        asked = [parse_caption(c) if isinstance(c, str) else c for c in captions[:n]]
        reading = self.parser.read(metrics.to_uint8(images[:n].cpu()))
        found: dict[str, Any] = scene_eval(asked, reading)
        if distances:
            found |= self._compared(reading.features, self._reference(asked).features)
        return found | self._named(n, asked, distances)

    def floor(self, n: int = STANDARD_N, seed: int = 0, split: str = "train") -> dict[str, Any]:
        """What a perfect generator gets for :meth:`captions` ``(n, seed, split)``: the distances of real pictures in
        training handwriting, and the SceneEval of real pictures in held-out handwriting (the ceiling: of training
        handwriting the parser would know each digit)."""
        asked = self.captions(n, seed, split)

        def measure() -> dict[str, Tensor]:
            self.report(f"measuring the floor of the scenes bench at N={n:,} (once)")
            reference = self._reference(asked)
            ceiling = scene_eval(asked, Reading(reference.digits[:n], reference.colours[:n], reference.features[:n]))
            real, _ = scene_set(n, seed + 1, "train", asked)
            found = ceiling | self._compared(self.parser(real), reference.features)
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}

        stored = cached_tensors(f"scenes floor {self._key(asked)}", measure)
        return {**{key: float(value) for key, value in stored.items()}, **self._named(n, asked)}

    def names(self, n: int, split: str = "") -> dict[str, str]:
        """How the scores are called: the parser and N belong to the number. ``split``: the captions' where it is not
        ``train``."""
        at = f"{self.parser.name}, N={n}" + (f", {split}" if split else "")
        words = {"sceneeval": "SceneEval"} | {
            f"sceneeval_{category}": f"SceneEval {category}" for category in CATEGORIES
        }
        words |= {"fd": "FD", "kid": "KID", "precision": "Precision", "recall": "Recall"}
        words |= {"density": "Density", "coverage": "Coverage"}
        return {key: f"{word}-{at}" for key, word in words.items()}

    def _named(self, n: int, captions: Sequence[Caption], distances: bool = True) -> dict[str, Any]:
        held = all(caption.belongs_to("heldout") for caption in captions)
        reference = f"{self._references(n):,} real scenes of the same captions in held-out handwriting"
        return {
            "n": n,
            "extractor": self.parser.name,
            **({"reference": reference} if distances else {}),
            "names": self.names(n, "held-out captions" if held else ""),
        }

    # --- distances ----------------------------------------------------------------------------------------------------
    def _compared(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        kid, kid_sd = metrics.kid(features, reference, subsets=SUBSETS)
        return {
            "fd": metrics.frechet_distance(features, reference),
            "kid": kid,
            "kid_sd": kid_sd,
            **metrics.precision_recall_density_coverage(reference[: len(features)], features),
        }

    @staticmethod
    def _references(n: int) -> int:
        """As many real pictures of every caption as give at least :data:`REFERENCE`."""
        return n * -(-REFERENCE // n)

    def _reference(self, captions: Sequence[Caption]) -> Reading:
        """The parser's reading of real pictures of ``captions`` in held-out handwriting, each caption as often as the
        others, in turn; from the cache where it has it."""

        def measure() -> dict[str, Tensor]:
            real, _ = scene_set(self._references(len(captions)), 0, "test", captions)
            reading = self.parser.read(real)
            return {"digits": reading.digits, "colours": reading.colours, "features": reading.features}

        return Reading(**cached_tensors(f"scenes reference {self._key(captions)}", measure))

    def _key(self, captions: Sequence[Caption]) -> str:
        texts = hashlib.sha256("\n".join(caption.text for caption in captions).encode()).hexdigest()
        return f"{texts} {self.parser.card.data_hash} {self.parser.card.sha256}"

    # --- in words -----------------------------------------------------------------------------------------------------
    def bench_card(self, scores: Mapping[str, Mapping[str, Any]] | None = None, n: int = STANDARD_N) -> str:
        """Markdown: what the bench is made of, the protocol, floor and ceiling at ``n``, and a row for each of
        ``scores`` (name -> what :meth:`score` gave, e.g. the teachers')."""
        card = self.parser.card
        rows = {"real images (ceiling and floor)": self.floor(n), **(scores or {})}
        columns = {"sceneeval": "SceneEval"} | {f"sceneeval_{category}": category for category in CATEGORIES}
        columns |= {"fd": "FD", "kid": "KID", "precision": "precision", "recall": "recall"}
        columns |= {"density": "density", "coverage": "coverage"}
        lines = [
            "# Bench: scenes",
            "",
            f"- World: {SHAPE[1]}x{SHAPE[2]} RGB, up to four digits in six colours; {card.origin}",
            f"- Captions: {sum(len(all_captions(category)) for category in CATEGORIES):,} in training, "
            f"{sum(len(all_captions(category, 'heldout')) for category in CATEGORIES):,} of held-out combinations; "
            f"categories: {', '.join(CATEGORIES)}",
            f"- Parser: {self.parser.name}, {card.features} features; on {card.test_scenes:,} scenes in held-out "
            f"handwriting {card.digit_accuracy:.2%} of digits, {card.colour_accuracy:.2%} of colours and "
            f"{card.scene_accuracy:.2%} of whole scenes right ({card.steps:,} steps, seed {card.seed}, "
            f"{card.seconds:.0f} s)",
            "- Protocol: N captions, the categories in turn, one picture each; SceneEval is strict (exactly what is "
            "asked for and nothing else), overall the mean of the categories; distances against at least "
            f"{REFERENCE:,} real pictures of the same captions in held-out handwriting; kernel distance over "
            f"{SUBSETS} subsets of at most 1,000; k = 5 neighbours",
            "",
            f"| images | N | {' | '.join(columns.values())} |",
            f"| --- | ---: | {' | '.join('---:' for _ in columns)} |",
        ]
        for name, row in rows.items():
            values = (f"{row[key]:.4g}" if key in row else "" for key in columns)
            lines.append(f"| {name} | {row['n']:,} | {' | '.join(values)} |")
        return "\n".join(lines) + "\n"


def teach_parser(
    out: str | Path | None = None, report: Callable[[str], None] = print, seed: int = 0, **training: Any
) -> SceneParser:
    """Train the bench's parser anew and write it with its card to ``out`` (default: the bench's own folder):
    ``stillroom teach scenes-parser``. ``training``: further arguments of
    :func:`~stillroom.evaluation.scene_parser.train_scene_parser`. Every score then bears another parser's name."""
    parser = train_scene_parser(seed=seed, report=report, **training)
    save_parser(parser, Path(out) if out else PARSER_DIR)
    return parser
