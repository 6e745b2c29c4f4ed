"""Digits on a larger canvas, for image encoders that train in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.bench import bench
from stillroom.bench.canvas.painting import Canvases, painted
from stillroom.bench.encoders import ACCURACY, PROBES, EncoderBench, LabelledEncoderBench, Scores, TwoTeacherBench
from stillroom.data.source import LABELS, ArrayData
from stillroom.evaluation.probes import dense_probe, patch_targets
from stillroom.evaluation.scores import Score
from stillroom.networks.mae import patch_count
from stillroom.networks.vit import encoder_of
from stillroom.tasks.encode.model import ImageEncoder

DIGITS = "0123456789"


class Canvas(EncoderBench):
    """scikit-learn's 8x8 digits, twice as large, anywhere on a canvas of 20x20 pixels, at 0.6 to 1.4 of their contrast,
    with noise of 0.15: 25 patches. 1,200 digits, five times each on another place, train; 597 others are the test.

    ``dense``: for every test image and every labelled one what each pixel belongs to, ``[N, 20, 20]``: the background
    (0) or one of the quarters of the digit's box (1 to 4).
    """

    mask_ratio = 0.76  # 6 of 25 patches stay
    steps = 2400
    copies = 5

    def __init__(self, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        super().__init__(seed)
        pixels, digits = load_digits(return_X_y=True)
        ink = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
        ink = F.interpolate(ink, scale_factor=2, mode="bilinear")
        labels = torch.from_numpy(digits).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, test = order[:1200], order[1200:]
        self.dense: dict[str, Tensor] = {}

        def part(rows: Tensor, seed: int, what: str) -> ArrayData:
            images, self.dense[what] = painted(ink[rows], seed)
            return ArrayData(images, {LABELS: labels[rows]}, DIGITS, "canvas", f"canvas: {len(rows):,} {what} images")

        many = train.repeat(self.copies)
        self.train = self.learnt(ink[many], labels[many])
        self.probe, self.test = part(train, 2, "labelled"), part(test, 3, "test")

    def learnt(self, ink: Tensor, labels: Tensor) -> ArrayData:
        """What trains."""
        images, _ = painted(ink, 1)
        return ArrayData(images, {LABELS: labels}, DIGITS, "canvas", f"canvas: {len(ink):,} training images")


class FreshCanvas(Canvas):
    """The same, and the digits that train are painted anew for every batch. Teachers that learn labels see five fixed
    canvases of each."""

    steps = 6000

    def learnt(self, ink: Tensor, labels: Tensor) -> ArrayData:
        return Canvases(ink, labels, DIGITS, 1, f"{len(ink) // self.copies:,} training digits")


@bench("canvas")
class CanvasBench(Canvas):
    """Digits on a larger canvas, without labels, and a masked autoencoder."""


@bench("canvas-labels")
class CanvasLabelsBench(Canvas, LabelledEncoderBench):
    """Digits on a larger canvas, with labels, and a masked autoencoder before and after fine-tuning."""


@bench("canvas-two")
class CanvasTwoBench(Canvas, TwoTeacherBench):
    """Digits on a larger canvas, a masked autoencoder and a supervised encoder. ``dense``: the accuracy of a linear
    probe on single patches: which quarter of a digit each belongs to."""

    scores = (*TwoTeacherBench.scores, Score("dense", "Linear probe of single patches"))

    def score(self, model: ImageEncoder, seed: int) -> Scores:
        encoder = ImageEncoder(encoder_of(model.network))
        patch = encoder_of(model.network).config.patch_size
        seen, asked = (patch_targets(self.dense[what], patch) for what in ("labelled", "test"))
        dense = dense_probe(encoder, self.probe.images(), seen, self.test.images(), asked)
        return super().score(model, seed) | {"dense": dense}


@bench("fresh-canvas")
class FreshCanvasBench(FreshCanvas):
    """Digits painted anew for every batch, without labels, and a masked autoencoder."""


@bench("fresh-canvas-labels")
class FreshCanvasLabelsBench(FreshCanvas, LabelledEncoderBench):
    """Digits painted anew for every batch, with labels, and a masked autoencoder before and after fine-tuning.
    ``accuracy_occluded`` is with 2 of the 25 patches covered: with a third of them, classifiers of 20 labels per class
    guess."""

    covered = 2 / 25
    scores = (*PROBES, ACCURACY, Score("accuracy_occluded", "Accuracy, 2 of the 25 patches covered"))


@bench("fresh-canvas-two")
class FreshCanvasTwoBench(FreshCanvas, TwoTeacherBench):
    """Digits painted anew for every batch, a masked autoencoder and a supervised encoder. ``height``: the accuracy of a
    linear probe on single patches that is asked at which of the five heights its image's digit lies: place on the
    canvas alone says nothing of it."""

    scores = (
        *TwoTeacherBench.scores,
        Score("height", "How far down the digit lies, by a linear probe of single patches"),
    )

    def score(self, model: ImageEncoder, seed: int) -> Scores:
        encoder = ImageEncoder(encoder_of(model.network))
        patches = patch_count(encoder.network)
        seen, asked = (heights(self.dense[what])[:, None].expand(-1, patches) for what in ("labelled", "test"))
        found = dense_probe(encoder, self.probe.images(), seen, self.test.images(), asked)
        return super().score(model, seed) | {"height": found}


def heights(belongs: Tensor) -> Tensor:
    """The first row of each digit's box, ``[N]``, where ``belongs [N, H, W]`` is 0 outside of it."""
    return (belongs > 0).any(2).long().argmax(1)
