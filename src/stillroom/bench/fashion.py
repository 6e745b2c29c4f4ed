"""The image bench: 28x28 pictures in ten classes, a shipped teacher, a frozen extractor, one protocol for all scores.

The protocol. A generator draws N images with labels in the proportions of the test split. They are compared, as uint8,
with the *test* split: what a generator learns is the training split, so against that a copier would look perfect;
against held-out images it can at best reach the floor. The floor is the same score of N real training images.
N = 10,000 is the standard, N = 5,000 serves proofs; N is part of every distance's name, because a Frechet distance
falls with N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.cache import _writable, cache_folder, cached_tensors
from stillroom.data.source import ASSETS, ArrayData, load_data
from stillroom.errors import UserError
from stillroom.evaluation import metrics
from stillroom.evaluation.extractor import Extractor, load_extractor, save_extractor, train_extractor

SHAPE = (1, 28, 28)
STANDARD_N = 10_000
PROOF_N = 5_000
NEIGHBOURS = 1_000
"""Samples whose nearest training neighbour is sought: the search over all pixels of all pairs is the slowest score."""

EXTRACTOR_IMAGES = 720_000
"""Images that a new extractor sees (the shipped one's twelve epochs of Fashion-MNIST), within 4 to 40 epochs."""


class FashionBench:
    """``data``: ``fashion``, ``mnist`` or a folder of 28x28 grey images in classes (see
    :func:`~stillroom.data.source.load_data`). Any set but fashion gets an extractor of its own, trained on first use
    and kept in the cache; ``report`` is told so. Data, extractor and statistics load when first asked for."""

    def __init__(self, data: str | Path = "fashion", report: Callable[[str], None] = print) -> None:
        self.source, self.report = data, report

    @cached_property
    def train(self) -> ArrayData:
        return self._labelled("train")

    @cached_property
    def test(self) -> ArrayData:
        return self._labelled("test")

    def _labelled(self, split: str) -> ArrayData:
        data = load_data(self.source, split, shape=SHAPE)
        if len(data.classes) < 2:
            raise UserError(
                f"{data.origin}: the bench needs classes", cure="put the images into one sub-folder per class"
            )
        return data

    @property
    def teacher_dir(self) -> Path:
        """The shipped class-conditional teacher of Fashion-MNIST (see ``stillroom teach``)."""
        return ASSETS / "fashion-teacher"

    @cached_property
    def extractor(self) -> Extractor:
        """The frozen feature extractor of this data set."""
        if self.train.name == "fashion" and str(self.source) == "fashion":
            return load_extractor(ASSETS / "fashion-extractor")
        folder = cache_folder() / "extractors" / self.train.fingerprint[:16]
        if (folder / "config.json").exists():
            return load_extractor(folder)
        self.report(f"No extractor for {self.train.origin} yet: training one (once, a few minutes), kept in {folder}")
        epochs = min(max(round(EXTRACTOR_IMAGES / self.train.n), 4), 40)
        extractor = train_extractor(self.train, self.test, epochs=epochs, report=self.report)
        if not _writable(lambda: save_extractor(extractor, folder)):
            self.report(f"The cache {folder} cannot be written: the extractor will be trained again next time")
        return extractor

    # --- protocol -------------------------------------------------------------------------------------------------
    def labels(self, n: int) -> Tensor:
        """``[n]`` int64: the labels to draw, in the test split's proportions (balanced for fashion), in a fixed mixed
        order, so that any leading part is nearly balanced as well."""
        ordered = self.test.labels.sort().values
        chosen = ordered[torch.arange(n) * self.test.n // n]
        return chosen[torch.randperm(n, generator=torch.Generator().manual_seed(0))]

    def size(self, n: int = STANDARD_N) -> int:
        """The N to score at: ``n``, or the number of training images where the set is smaller (the shipped sample),
        for no floor can be drawn beyond that."""
        return min(n, self.train.n)

    def score(self, images: Tensor, labels: Tensor, n: int | None = None) -> dict[str, Any]:
        """All scores of ``images [N, 1, 28, 28]``, float in [-1, 1] or uint8, asked for as ``labels [N]``.

        ``n``: only the first n. The result holds ``fd``; ``kid`` and ``kid_sd`` (over subsets); ``precision``,
        ``recall``, ``density``, ``coverage`` (k = 5, equal numbers of real and generated); ``class_agreement`` and
        ``class_histogram_tv`` by the extractor; ``nearest_train_feature`` and ``nearest_train_pixel`` (root mean square
        grey levels of 255) of the first 1,000, each with ``..._test``, the same for held-out real images: far below it
        means memorised; ``n``, ``extractor``, ``reference``; and ``names``: how each number is to be called in print.
        """
        n = len(images) if n is None else n
        if n > len(images) or len(labels) < n:
            raise ValueError(f"scores at N={n} need {n} images and labels, got {len(images)} and {len(labels)}")
        pixels = metrics.to_uint8(images[:n].cpu())
        features = self.extractor(pixels)
        held_out = {f"{key}_test": value for key, value in self._test_nearest.items()}
        nearest = self._nearest(pixels[:NEIGHBOURS], features[:NEIGHBOURS])
        return {**self._compared(features, labels[:n].cpu()), **nearest, **held_out, **self._named(n)}

    def _compared(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        reference, logits = self.test_features, self.extractor.logits(features)
        kid, kid_sd = metrics.kid(features, reference)
        equal = min(len(features), len(reference))
        return {
            "fd": metrics.frechet_distance(features, reference),
            "kid": kid,
            "kid_sd": kid_sd,
            **metrics.precision_recall_density_coverage(reference[self._spread(equal)], features[:equal]),
            "class_agreement": metrics.class_agreement(logits, labels),
            "class_histogram_tv": metrics.class_histogram_tv(logits, labels),
        }

    def _named(self, n: int) -> dict[str, Any]:
        return {"n": n, "extractor": self.extractor.name, "reference": self.test.origin, "names": self.names(n)}

    def names(self, n: int) -> dict[str, str]:
        """How the feature-space scores are called: the extractor and N belong to the number."""
        at = f"{self.extractor.name}, N={n}"
        words = {"fd": "FD", "kid": "KID", "precision": "Precision", "recall": "Recall"}
        words |= {"density": "Density", "coverage": "Coverage"}
        return {key: f"{word}-{at}" for key, word in words.items()}

    def floor(self, n: int = STANDARD_N) -> dict[str, Any]:
        """:meth:`score` of ``n`` real training images: what a perfect generator gets at this N. The nearest-train
        scores are left out, for these images are the training set."""
        if n > self.train.n:
            raise UserError(
                f"a floor at N={n} needs {n} training images; {self.train.origin} has {self.train.n}",
                cure=f"score at N={self.train.n} or less, or install the full set (Debian: dataset-fashion-mnist)",
            )

        def measure() -> dict[str, Tensor]:
            chosen = torch.randperm(self.train.n, generator=torch.Generator().manual_seed(1))[:n]
            found = self._compared(self.train_features[chosen], self.train.labels[chosen])
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}

        stored = self._cached(f"floor-{n}-{self.train.fingerprint[:16]}-{self.test.fingerprint[:16]}", measure)
        return {**{key: float(value) for key, value in stored.items()}, **self._named(n)}

    # --- reference statistics -------------------------------------------------------------------------------------
    @cached_property
    def test_features(self) -> Tensor:
        """``[N, 64]`` float64 features of the test split, from the cache where it has them."""
        return self._features(self.test)

    @cached_property
    def train_features(self) -> Tensor:
        """``[N, 64]`` float64 features of the training split, from the cache where it has them."""
        return self._features(self.train)

    def _features(self, data: ArrayData) -> Tensor:
        return self._cached(f"features-{data.fingerprint[:16]}", lambda: {"x": self.extractor(data.array)})[
            "x"
        ].double()

    @cached_property
    def _test_nearest(self) -> dict[str, float]:
        def measure() -> dict[str, Tensor]:
            chosen = self._spread(NEIGHBOURS)
            found = self._nearest(self.test.array[chosen], self.test_features[chosen])
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}

        stored = self._cached(f"nearest-{self.train.fingerprint[:16]}-{self.test.fingerprint[:16]}", measure)
        return {key: float(value) for key, value in stored.items()}

    def _nearest(self, pixels: Tensor, features: Tensor) -> dict[str, float]:
        grey = metrics.nearest_train_distance(pixels, self.train.array) / (pixels[0].numel() ** 0.5)
        return {
            "nearest_train_feature": metrics.nearest_train_distance(features, self.train_features),
            "nearest_train_pixel": grey,
        }

    def _spread(self, n: int) -> Tensor:
        """``n`` rows of the test split, in a fixed random order."""
        return torch.randperm(self.test.n, generator=torch.Generator().manual_seed(2))[:n]

    def _cached(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return cached_tensors(f"{key} {self.extractor.card.sha256}", make)

    # --- in words -------------------------------------------------------------------------------------------------
    def bench_card(self, scores: Mapping[str, Mapping[str, Any]] | None = None, n: int = STANDARD_N) -> str:
        """Markdown: what the bench is made of, the protocol, the floor at :meth:`size` ``(n)``, and a row for each of
        ``scores`` (name -> what :meth:`score` gave, e.g. the teacher's)."""
        n = self.size(n)
        card = self.extractor.card
        rows = {"real images (floor)": self.floor(n), **(scores or {})}
        columns = {
            "fd": "FD",
            "kid": "KID",
            "precision": "precision",
            "recall": "recall",
            "density": "density",
            "coverage": "coverage",
            "class_agreement": "class agreement",
            "class_histogram_tv": "class histogram TV",
        }
        lines = [
            f"# Bench: {self.train.name}",
            "",
            f"- Training split: {self.train.origin}",
            f"- Reference: {self.test.origin}",
            f"- Classes: {', '.join(self.train.classes)}",
            f"- Extractor: {self.extractor.name}, {card.features} features, {card.accuracy:.2%} of test images right; "
            f"trained on {card.origin} ({card.epochs} epochs, seed {card.seed}, {card.seconds:.0f} s)",
            f"- Protocol: N generated images, labels in the test split's proportions, against the {self.test.n:,} test "
            "images; kernel distance over 100 subsets of at most 1,000; k = 5 neighbours",
            "",
            f"| images | N | {' | '.join(columns.values())} |",
            f"| --- | ---: | {' | '.join('---:' for _ in columns)} |",
        ]
        for name, row in rows.items():
            lines.append(f"| {name} | {row['n']:,} | {' | '.join(f'{row[key]:.4g}' for key in columns)} |")
        return "\n".join(lines) + "\n"
