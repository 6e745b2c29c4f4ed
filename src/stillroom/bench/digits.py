"""Digits: 8x8 handwritten digits under noisy labels, the world of classifiers that train in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.source import LABELS, ArrayData
from stillroom.errors import UserError
from stillroom.methods.classifier.gt_self_distill import KernelSelfDistillation

CLASSES = 10
POOL, HELD_OUT = 600, 400
"""Images to train on, with noisy labels, and clean ones to choose by; the remaining 797 are the test."""
NOISE = 0.4
"""Share of the training labels that are drawn anew, uniformly over the classes."""
GAMMA = 0.0125
"""Of the radial kernel on pixels in [-1, 1]; 0.05 on pixels in [0, 1]."""


class DigitsBench:
    """The 1,797 digits of scikit-learn, split and mislabelled by ``seed``."""

    def __init__(self, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits), generator=generator)
        images = torch.from_numpy(pixels).float()[order].reshape(-1, 1, 8, 8) / 8 - 1
        truth = torch.from_numpy(digits).long()[order]
        redrawn = torch.rand(POOL, generator=generator) < NOISE
        noisy = torch.where(redrawn, torch.randint(CLASSES, (POOL,), generator=generator), truth[:POOL])
        names = [str(i) for i in range(CLASSES)]

        def part(rows: slice, labels: Tensor, origin: str) -> ArrayData:
            return ArrayData(images[rows], {LABELS: labels}, names, "digits", origin)

        end = POOL + HELD_OUT
        self.clean = part(slice(POOL), truth[:POOL], f"digits: {POOL} images")
        self.train = part(slice(POOL), noisy, f"digits: {POOL} images, {NOISE:.0%} of the labels redrawn")
        self.held_out = part(slice(POOL, end), truth[POOL:end], f"digits: {HELD_OUT} held-out images")
        self.test = part(slice(end, None), truth[end:], f"digits: {len(truth) - end} test images")

    def data(self, images: int = POOL) -> ArrayData:
        """The first ``images`` training images with noisy labels, the clean held-out ones as their part ``heldout``.
        Raises UserError for more than there are."""
        if not 1 <= images <= POOL:
            raise UserError(f"there are {POOL} training digits, not {images}", cure=f"ask for 1 to {POOL}")
        data = self.train.take(torch.arange(images))
        data.parts["heldout"] = self.held_out
        return data

    @staticmethod
    def network() -> nn.Module:
        """An untrained convolutional classifier ``[B, 1, 8, 8] -> [B, 10]`` with 6,186 weights."""
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, CLASSES),
        )  # fmt: skip

    def kernel_fit(self, images: int = 400, clean: bool = False, **settings: Any) -> KernelClassifier:
        """Kernel self-distillation on the first ``images`` training images; ``settings`` are the estimator's. A weight
        chosen by validation sees the held-out images."""
        source = (self.clean if clean else self.train).take(torch.arange(images))
        estimator = KernelSelfDistillation(gamma=GAMMA, **settings)
        held_out = rows(self.held_out) if estimator.gt_weight == "validation" else None
        return KernelClassifier(estimator.fit(*rows(source), validation=held_out))

    def score(self, probabilities: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``accuracy``, and ``mse`` over images and classes, of a function of test images to ``[N, 10]``."""
        p, truth = probabilities(self.test.images()), self.test.labels
        mse = (p - F.one_hot(truth, CLASSES)).square().mean()
        return {"accuracy": float((p.argmax(1) == truth).float().mean()), "mse": float(mse)}

    def floor(self) -> dict[str, float]:
        """:meth:`score` of plain kernel ridge regression on true labels."""
        return self.score(self.kernel_fit(clean=True, ridge=0.1, rounds=1)) | {"n": self.test.n}


class KernelClassifier(nn.Module):
    """A fitted estimator as a network: images ``[B, 1, 8, 8]`` to scores ``[B, 10]`` that estimate one-hot labels."""

    def __init__(self, estimator: KernelSelfDistillation) -> None:
        super().__init__()
        self.estimator = estimator
        self.dual = nn.Parameter(torch.from_numpy(estimator.eigenvectors_ @ estimator.components_), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.estimator.predict(images.flatten(1).double().numpy())).float() + 1 / CLASSES


def rows(data: ArrayData) -> tuple[Any, Any]:
    """Pixels ``[N, 64]`` and one-hot labels minus their mean 0.1, ``[N, 10]``, as arrays."""
    targets = F.one_hot(data.labels, CLASSES) - 1 / CLASSES
    return data.images().flatten(1).double().numpy(), targets.double().numpy()
