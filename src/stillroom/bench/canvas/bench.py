"""Digits on a larger canvas, for image encoders that train in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.bench import bench
from stillroom.bench.canvas.painting import Canvases, painted
from stillroom.bench.encoders import EncoderBench, LabelledEncoderBench, Scores, TwoTeacherBench
from stillroom.data.source import LABELS, ArrayData
from stillroom.evaluation.probes import dense_probe, patch_targets
from stillroom.evaluation.scores import Score
from stillroom.networks.vit import encoder_of
from stillroom.tasks.encode.model import ImageEncoder


class Canvas(EncoderBench):
    """scikit-learn's 8x8 digits, twice as large, anywhere on a canvas of 20x20 pixels, at 0.6 to 1.4 of their contrast,
    with noise of 0.15: 25 patches. 1,200 digits train, painted anew for every batch; 597 others are the test, on one
    canvas each. Teachers that learn labels see five canvases of each digit.

    ``dense``: for every test image and every labelled one what each pixel belongs to, ``[N, 20, 20]``: the background
    (0) or one of the quarters of the digit's box (1 to 4).
    """

    mask_ratio = 0.76  # 6 of 25 patches stay
    steps = 3000
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
        names = [str(i) for i in range(10)]
        self.dense: dict[str, Tensor] = {}

        def part(rows: Tensor, seed: int, what: str) -> ArrayData:
            images, self.dense[what] = painted(ink[rows], seed)
            return ArrayData(images, {LABELS: labels[rows]}, names, "canvas", f"canvas: {len(rows):,} {what} images")

        many = train.repeat(self.copies)
        self.train = Canvases(ink[many], labels[many], names, 1, f"{len(train):,} training digits")
        self.probe, self.test = part(train, 2, "labelled"), part(test, 3, "test")


@bench("fresh-canvas")
class CanvasBench(Canvas):
    """Digits on a larger canvas, without labels, and a masked autoencoder."""


@bench("fresh-canvas-labels")
class CanvasLabelsBench(Canvas, LabelledEncoderBench):
    """Digits on a larger canvas, with labels, and a masked autoencoder before and after fine-tuning."""


@bench("fresh-canvas-two")
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

