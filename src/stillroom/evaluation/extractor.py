"""A small feature extractor for a bench whose images no public network was made for.

It is trained once on the bench's training split, then frozen; distances name it by the hash of its weights, because a
Frechet distance means nothing without its feature space. It classifies and reconstructs: the labels alone would let its
features drop all that does not tell classes apart (blur, brightness, texture), which is what a generator gets wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.source import LABELS, ArrayData
from stillroom.evaluation.judges import FEATURES, Judge, load_judge, saved_hash, scaled


@dataclass(frozen=True)
class ExtractorCard:
    """What is known of a trained extractor; saved beside its weights."""

    data: str
    data_hash: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    accuracy: float
    reconstruction: float
    epochs: int
    seed: int
    seconds: float
    features: int = FEATURES
    origin: str = ""
    sha256: str = ""


class _Net(nn.Module):
    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        rows, columns = math.ceil(height / 4), math.ceil(width / 4)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 5, 2, 2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * rows * columns, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
        )
        self.classify = nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Linear(FEATURES, classes))
        self.rebuild = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, channels * height * width))


class Extractor(Judge[ExtractorCard]):
    """Frozen features of uint8 images at their native size: ``[N, C, H, W]`` uint8 in, ``[N, 64]`` float64 out."""

    @torch.no_grad()
    def forward(self, images: Tensor, batch: int = 500) -> Tensor:
        shape, who = self.card.shape, f"extractor {self.card.data!r}"
        return torch.cat([self.net.body(scaled(part, shape, who)) for part in images.split(batch)]).double()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """``[N, classes]`` from features, so that images are read once."""
        return self.net.classify(features.float()).double()


def train_extractor(
    train: ArrayData,
    test: ArrayData,
    seed: int = 0,
    epochs: int = 12,
    batch: int = 128,
    lr: float = 2e-3,
    reconstruction_weight: float = 1.0,
    report: Callable[[str], None] = lambda line: None,
) -> Extractor:
    """Train on ``train`` (labels, plus reconstruction), state the accuracy on ``test``, freeze.

    AdamW, one-cycle learning rate, images shifted by up to two pixels; the last epoch is kept, not the best. The loss
    is cross-entropy (label smoothing 0.05) plus ``reconstruction_weight`` times the mean squared error per pixel, in
    [-1, 1], of the image rebuilt from the 64 features.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _train(train, test, seed, epochs, batch, lr, reconstruction_weight, report)


def _train(
    train: ArrayData,
    test: ArrayData,
    seed: int,
    epochs: int,
    batch: int,
    lr: float,
    reconstruction_weight: float,
    report: Callable[[str], None],
) -> Extractor:
    began = time.perf_counter()
    batch = min(batch, train.n)
    per_epoch = train.n // batch
    shape: Any = train.shape
    net = _Net(shape, len(train.classes))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * per_epoch)
    net.train()
    for step in range(epochs * per_epoch):
        rows = train.batch(seed, step, batch)
        images = _shifted(rows["x"])
        features = net.body(images)
        guess = F.cross_entropy(net.classify(features), rows["cond"][LABELS], label_smoothing=0.05)
        rebuilt = F.mse_loss(net.rebuild(features), images.flatten(1))
        optimizer.zero_grad(set_to_none=True)
        (guess + reconstruction_weight * rebuilt).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % per_epoch == 0:
            done = (step + 1) // per_epoch
            report(f"extractor epoch {done}/{epochs}: cross-entropy {guess:.3f}, reconstruction {rebuilt:.4f}")
    net.eval()
    with torch.no_grad():
        features = torch.cat([net.body(test.images(i)) for i in torch.arange(test.n).split(500)])
        right = net.classify(features).argmax(1) == test.labels
        error = F.mse_loss(net.rebuild(features), test.images().flatten(1))
    card = ExtractorCard(
        data=train.name,
        data_hash=train.fingerprint,
        shape=shape,
        classes=tuple(train.classes),
        accuracy=round(float(right.double().mean()), 4),
        reconstruction=round(float(error), 4),
        epochs=epochs,
        seed=seed,
        seconds=round(time.perf_counter() - began, 1),
        origin=train.origin,
        sha256=saved_hash(net),
    )
    report(f"extractor {card.data}@{card.sha256[:8]}: {card.accuracy:.1%} of {test.n:,} test images right")
    return Extractor(net, card)


def _shifted(images: Tensor, reach: int = 2) -> Tensor:
    """Each image moved by its own whole-pixel shift, the border repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * reach + 1, (2, count, 1, 1))
    rows = down + torch.arange(height)[None, :, None]
    columns = right + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def load_extractor(folder: Path) -> Extractor:
    """The frozen extractor that was saved in ``folder``, after its SHA-256 was checked against the card."""
    card, weights = load_judge(folder, ExtractorCard, "extractor")
    net = _Net(card.shape, len(card.classes))
    net.load_state_dict(weights)
    return Extractor(net, card)
