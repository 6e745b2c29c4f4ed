"""Digits on a larger canvas, for image encoders that train in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.bench import bench
from stillroom.bench.encoders import EncoderBench, LabelledEncoderBench, Scores, TwoTeacherBench
from stillroom.data.source import LABELS, ArrayData
from stillroom.evaluation.probes import dense_probe, patch_targets
from stillroom.evaluation.scores import Score
from stillroom.networks.vit import encoder_of
from stillroom.tasks.encode.model import ImageEncoder


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
        names = [str(i) for i in range(10)]
        self.dense: dict[str, Tensor] = {}

        def part(rows: Tensor, seed: int, what: str) -> ArrayData:
            images, self.dense[what] = painted(ink[rows], seed)
            return ArrayData(images, {LABELS: labels[rows]}, names, "canvas", f"canvas: {len(rows):,} {what} images")

        self.train = part(train.repeat(self.copies), 1, "training")
        self.probe, self.test = part(train, 2, "labelled"), part(test, 3, "test")


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


def painted(ink: Tensor, seed: int, side: int = 20) -> tuple[Tensor, Tensor]:
    """Digits ``[N, 1, 16, 16]`` (ink 0 to 1) on canvases ``[N, 1, side, side]``, pixels from -1 (none) to 1 or so;
    and what each pixel belongs to, ``[N, side, side]``."""
    generator = torch.Generator().manual_seed(seed)
    n, _, size, _ = ink.shape
    corner = torch.randint(side - size + 1, (n, 2), generator=generator)
    contrast = 0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator)
    images = 0.15 * torch.randn(n, 1, side, side, generator=generator) - 1
    belongs = torch.zeros(n, side, side, dtype=torch.long)
    half = size // 2
    quarter = torch.tensor([[1, 2], [3, 4]]).repeat_interleave(half, 0).repeat_interleave(half, 1)
    for i, (y, x) in enumerate(corner.tolist()):
        images[i, :, y : y + size, x : x + size] += 2 * ink[i] * contrast[i]
        belongs[i, y : y + size, x : x + size] = quarter
    return images, belongs
