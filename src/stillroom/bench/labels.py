"""Labelled images whose training labels are partly wrong: 8x8 digits, on which classifiers train in seconds, and
Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.source import LABELS, ArrayData, load_data
from stillroom.errors import UserError
from stillroom.folders.image_networks import make_classifier
from stillroom.networks.kernel_self_distillation import KernelSelfDistillation

NOISE = 0.4
"""Share of the training labels that are drawn anew, uniformly over the classes."""
CLASSES = 10
GAMMA = 0.0125
"""Of the radial kernel on digits with pixels in [-1, 1]; 0.05 on pixels in [0, 1]."""


class LabelBench:
    """Images ``[N, C, H, W]`` and true labels ``[N]``, split and mislabelled by ``seed``: the first ``pool`` in a
    random order train, under noisy labels; the next ``held_out`` are clean, to choose by; ``test`` is the rest, or data
    of their own."""

    def __init__(
        self,
        images: Tensor,
        truth: Tensor,
        classes: list[str],
        pool: int,
        held_out: int,
        seed: int,
        test: ArrayData | None = None,
    ) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(truth), generator=generator)
        redrawn = torch.rand(pool, generator=generator) < NOISE
        right = truth[order[:pool]]
        noisy = torch.where(redrawn, torch.randint(len(classes), (pool,), generator=generator), right)

        def part(rows: Tensor, labels: Tensor, what: str) -> ArrayData:
            return ArrayData(images[rows], {LABELS: labels}, classes, self.name, f"{self.name}: {len(rows):,} {what}")

        self.train = part(order[:pool], noisy, f"images, {NOISE:.0%} of the labels redrawn")
        self.clean = part(order[:pool], right, "images")
        chosen = order[pool : pool + held_out]
        self.held_out = part(chosen, truth[chosen], "held-out images")
        rest = order[pool + held_out :]
        self.test = test if test is not None else part(rest, truth[rest], "test images")

    name = "labels"

    def data(self, images: int) -> ArrayData:
        """The first ``images`` training images with noisy labels, the clean held-out ones as their part ``heldout``.
        Raises UserError for more than there are."""
        if not 1 <= images <= self.train.n:
            raise UserError(f"there are {self.train.n} training images, not {images}", cure="ask for fewer")
        data = self.train.take(torch.arange(images))
        data.parts["heldout"] = self.held_out
        return data

    def network(self) -> nn.Module:
        """An untrained classifier."""
        raise NotImplementedError

    def score(self, probabilities: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``accuracy``, and ``mse`` over images and classes, of a function of test images to ``[N, classes]``."""
        truth = self.test.labels
        p = torch.cat([probabilities(part) for part in self.test.images().split(1000)])
        mse = (p - F.one_hot(truth, p.shape[1])).square().mean()
        return {"accuracy": float((p.argmax(1) == truth).float().mean()), "mse": float(mse)}

    def floor(self) -> dict[str, float]:
        """What is known without any training."""
        return {"n": self.test.n}


class DigitsBench(LabelBench):
    """The 1,797 digits of scikit-learn: 600 to train on, 400 held out, 797 for the test."""

    name = "digits"
    sizes: tuple[int, int] = (600, 400)
    """Of the images to train on and of those held out."""

    def __init__(self, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
        names = [str(i) for i in range(CLASSES)]
        super().__init__(images, torch.from_numpy(digits).long(), names, *self.sizes, seed)

    def network(self) -> nn.Module:
        """A convolutional classifier ``[B, 1, 8, 8] -> [B, 10]`` with 6,186 weights."""
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

    def floor(self) -> dict[str, float]:
        """:meth:`score` of plain kernel ridge regression on true labels."""
        return self.score(self.kernel_fit(clean=True, ridge=0.1, rounds=1)) | super().floor()


class FashionLabelsBench(LabelBench):
    """Fashion-MNIST: 10,000 images to train on where the whole set is installed (half of the shipped sample elsewhere),
    2,000 held out (a tenth), and the test split."""

    name = "fashion-labels"

    def __init__(self, seed: int = 0) -> None:
        source = load_data("fashion", "train")
        pool, held_out = min(10_000, source.n // 2), min(2_000, source.n // 10)
        test = load_data("fashion", "test")
        super().__init__(source.array, source.labels, source.classes, pool, held_out, seed, test)

    def network(self) -> nn.Module:
        """A small ResNet."""
        return make_classifier("resnet-small", 1, CLASSES)


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
