"""28x28 pictures in ten classes: a shipped teacher, a frozen extractor, one protocol for all scores.

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

from stillroom.bench import bench
from stillroom.bench.base import NO_FOLDERS, card_rows, read_card, shown, table
from stillroom.bench.classes import ClassBench
from stillroom.cache import cache_folder, code_of, kept, kept_json
from stillroom.data.source import ArrayData, load_data
from stillroom.errors import UserError
from stillroom.evaluation import metrics
from stillroom.evaluation.extractor import Extractor, load_extractor, train_extractor
from stillroom.evaluation.scores import Score, named
from stillroom.files import digest
from stillroom.folders.shipped import ASSETS
from stillroom.task import IN_MEMORY, say
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.class_images.task import class_count

SHAPE = (1, 28, 28)
STANDARD_N = 10_000
PROOF_N = 5_000
NEIGHBOURS = 1_000
"""Samples whose nearest training neighbour is sought: the search over all pixels of all pairs is the slowest score."""

EXTRACTOR_IMAGES = 720_000
"""Images that a new extractor sees (the shipped one's twelve epochs of Fashion-MNIST), within 4 to 40 epochs."""


@bench("fashion")
class ClassImagesBench(ClassBench):
    """Class-conditional images of 28x28 grey pixels: Fashion-MNIST, MNIST, or a folder in classes (see
    :func:`~stillroom.data.source.load_data`). Any set but fashion gets an extractor of its own, trained on first use
    and kept in the cache; ``report`` is told so. Data, extractor and statistics load when first asked for."""

    scores = (
        Score(
            "fd", "FD", "lower", label="Fréchet distance", alarm=3.0,
            advice="more steps first; then the learning rates",
        ),
        Score("kid", "KID", "lower"),
        Score("precision", "Precision"),
        Score("recall", "Recall"),
        Score("density", "Density"),
        Score(
            "coverage", "Coverage", alarm=0.6, advice="a lower guidance scale, or a GAN term on real images",
        ),
        Score("class_agreement", "Class agreement"),
        Score("class_histogram_tv", "Class histogram, total variation", "lower"),
    )  # fmt: skip
    teaches = ("fashion",)
    teacher_dir = ASSETS / "fashion-teacher"

    def __init__(self, seed: int = 0, source: str | Path = "fashion", report: Callable[[str], None] = say) -> None:
        super().__init__(seed)
        self.source, self.report = str(source), report

    @classmethod
    def serves(cls, task: str, source: str, data: Any) -> bool:
        """Images of this size in two classes or more, which have a test split: not those given as objects."""
        return task == cls.task and source != IN_MEMORY and data.shape == SHAPE and len(data.classes) >= 2

    @classmethod
    def reads(cls, source: str) -> bool:
        return source == "mnist" or Path(source).expanduser().exists()

    @classmethod
    def over(cls, source: str, data: Any = None) -> ClassImagesBench:
        made = cls(source=source)
        if data is not None:
            made.train = data
        return made

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.size(PROOF_N)

    def size(self, n: int = STANDARD_N) -> int:
        """The N to score at: ``n``, or the number of training images where the set is smaller (the shipped sample),
        for no floor can be drawn beyond that."""
        return min(n, self.train.n)

    @cached_property
    def train(self) -> ArrayData:  # type: ignore[override]
        return self._labelled("train")

    @cached_property
    def test(self) -> ArrayData:
        return self._labelled("test")

    def _labelled(self, split: str) -> ArrayData:
        data = load_data(self.source, split, shape=SHAPE)
        if split == "test" and "train" in vars(self):  # which may have been given in a teacher's order
            data = data.by_names(self.train.classes, "the classes of the training images")
        if len(data.classes) < 2:
            raise UserError(
                f"{data.origin}: the bench needs classes", cure="put the images into one sub-folder per class"
            )
        return data

    @cached_property
    def extractor(self) -> Extractor:
        """The frozen feature extractor of this data set."""
        if self.train.name == "fashion" and self.source == "fashion":
            return load_extractor(ASSETS / "fashion-extractor")
        name = f"{self.train.fingerprint[:16]}-{code_of(train_extractor)[:8]}"
        folder = cache_folder() / "extractors" / name
        if (folder / "config.json").exists():
            return load_extractor(folder)
        self.report(f"No extractor for {self.train.origin} yet: training one (once, a few minutes), kept in {folder}")
        epochs = min(max(round(EXTRACTOR_IMAGES / self.train.n), 4), 40)
        extractor = train_extractor(self.train, self.test, epochs=epochs, report=self.report)
        try:
            extractor.save(folder)
        except (OSError, UserError):  # a cache that cannot be written costs time, not results
            self.report(f"The cache {folder} cannot be written: the extractor will be trained again next time")
        return extractor

    # --- protocol -------------------------------------------------------------------------------------------------
    def labels(self, n: int) -> Tensor:
        """``[n]`` int64: the labels to draw, in the test split's proportions (balanced for fashion), in a fixed mixed
        order, so that any leading part is nearly balanced as well."""
        ordered = self.test.labels.sort().values
        chosen = ordered[torch.arange(n) * self.test.n // n]
        return chosen[torch.randperm(n, generator=torch.Generator().manual_seed(0))]

    def judge(self, samples: Tensor, labels: Tensor) -> dict[str, Any]:
        """All scores of ``samples [N, 1, 28, 28]``, float in [-1, 1] or uint8, asked for as ``labels [N]``.

        The result holds ``fd``; ``kid`` and ``kid_sd`` (over subsets); ``precision``, ``recall``, ``density``,
        ``coverage`` (k = 5, equal numbers of real and generated); ``class_agreement`` and ``class_histogram_tv`` by the
        extractor; ``nearest_train_feature`` and ``nearest_train_pixel`` (root mean square grey levels of 255) of the
        first 1,000, each with ``..._test``, the same for held-out real images: far below it means memorised; ``n``,
        ``extractor``, ``reference``.
        """
        if len(samples) != len(labels):
            raise ValueError(f"every image needs a label, got {len(samples)} and {len(labels)}")
        pixels = metrics.to_uint8(samples.cpu())
        features = self.extractor(pixels)
        held_out = {f"{key}_test": value for key, value in self._test_nearest.items()}
        nearest = self._nearest(pixels[:NEIGHBOURS], features[:NEIGHBOURS])
        return {**self._compared(features, labels.cpu()), **nearest, **held_out, **self.about(len(samples))}

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

    def about(self, n: int) -> dict[str, Any]:
        """What scores at N are measured with."""
        return {"n": n, "extractor": self.extractor.name, "reference": self.test.origin}

    def called(self, n: int) -> tuple[Score, ...]:
        """The scores as they are called at N: extractor and N belong to those made of features."""
        at = f"{self.extractor.name}, N={n}"
        return named(self.scores, {s.key: f"{s.name}-{at}" for s in self.scores if not s.key.startswith("class_")})

    def floor_of(self, n: int = STANDARD_N) -> dict[str, Any]:
        """:meth:`judge` of ``n`` real training images: what a perfect generator gets at this N. The nearest-train
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

        stored = self._once("floor", measure, n, self.train.fingerprint, self.test.fingerprint)
        return {**{key: float(value) for key, value in stored.items()}, **self.about(n)}

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
        found = self._once("features", lambda: {"x": self.extractor(data.array)}, data.fingerprint)
        return found["x"].double()

    @cached_property
    def _test_nearest(self) -> dict[str, float]:
        def measure() -> dict[str, Tensor]:
            chosen = self._spread(NEIGHBOURS)
            found = self._nearest(self.test.array[chosen], self.test_features[chosen])
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}

        stored = self._once("nearest", measure, NEIGHBOURS, self.train.fingerprint, self.test.fingerprint)
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

    def _once(self, what: str, make: Callable[[], dict[str, Tensor]], *parts: object) -> dict[str, Tensor]:
        return kept(f"fashion/{what}", make, code=[metrics, Extractor], parts=[self.extractor.card.sha256, *parts])

    # --- models ---------------------------------------------------------------------------------------------------
    def compare(
        self, everyone: Mapping[str, Any], n: int, seed: int, folders: Mapping[str, Path] = NO_FOLDERS
    ) -> dict[str, Any]:
        n, earlier, found = self.size(n), [], {}
        for who, model in everyone.items():
            found[who], known = self._known(model, folders[who], n, seed) if who in folders else ({}, False)
            if known:
                earlier.append(who)
            elif not found[who]:
                say(f"scoring {n:,} samples of {who}")
                found[who] = self._drawn(model, n, seed)
        found["floor"] = self.floor_of(n)
        return shown(self.called(n), found, **self.about(n), earlier=earlier)

    def try_out(self, model: ImageGenerator) -> None:
        """The test split is read; an extractor that must be trained first comes after the run."""
        self.labels(1)

    def _drawn(self, model: ImageGenerator, n: int, seed: int) -> dict[str, Any]:
        labels = self.labels(n)
        return self.judge(model.sample(labels if class_count(model.denoiser) else n, seed=seed), labels)

    def _known(self, model: ImageGenerator, folder: Path, n: int, seed: int) -> tuple[dict[str, Any], bool]:
        """A shipped or stored model's scores, and whether they were measured earlier: a teacher takes tens of
        evaluations per sample, so they come from its own card where that has them, and are else kept in the cache, by
        its very files."""
        expected = self.about(n)
        for row in read_card(folder).get("samplers", ()):
            known = row["scores"]
            if row["sampler"] == model.sampler.to_dict() and all(known[key] == v for key, v in expected.items()):
                return dict(known), True
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
        parts = [self.train.fingerprint, self.test.fingerprint, self.extractor.name, n, seed, *map(digest, files)]
        measured = False

        def measure() -> dict[str, Any]:
            nonlocal measured
            measured = True
            say(f"scoring the teacher (once; {model.sampler.nfe} network evaluations for each of {n:,} samples)")
            return self._drawn(model, n, seed)

        code = [metrics, Extractor, type(model), type(model.sampler)]
        return kept_json("fashion/teacher", measure, code=code, parts=parts), not measured

    # --- in words -------------------------------------------------------------------------------------------------
    def card(self, n: int = STANDARD_N, more: Mapping[str, Mapping[str, Any]] | None = None) -> str:
        """What the bench is made of, the protocol, the floor at :meth:`size` ``(n)``, a row for each sampler of the
        shipped teacher, and for each of ``more`` (name -> what :meth:`judge` gave)."""
        n, card = self.size(n), self.extractor.card
        rows: dict[str, Mapping[str, Any]] = {"real images (floor)": self.floor_of(n)}
        if self.source == "fashion":
            rows |= card_rows("teacher", read_card(self.teacher_dir))
        rows |= more or {}
        columns = {score.key: score.name for score in self.scores}
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
        ]
        return "\n".join([*lines, *table(rows, columns)]) + "\n"
