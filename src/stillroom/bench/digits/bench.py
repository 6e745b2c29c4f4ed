"""8x8 digits, on which classifiers train in seconds: under wrong labels, or with few and a teacher that is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.bench import bench
from stillroom.bench.digits.teachers import MISCAPTIONED, WORDS, caption_teacher, fit
from stillroom.bench.labels import CLASSES, EnsembleBench, FewLabelsBench, LabelledImagesBench, Recogniser
from stillroom.data.source import ArrayData
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError, nearest
from stillroom.networks.recognition import ForwardPass

if TYPE_CHECKING:
    from stillroom.networks.kernel_self_distillation import KernelSelfDistillation

GAMMA = 0.0125
"""Of the radial kernel on digits with pixels in [-1, 1]; 0.05 on pixels in [0, 1]."""
TEACHERS = ("biased", "random", "captions", "untrained")
CONFUSED = {4: 9, 7: 1, 3: 8, 5: 6}
"""What the biased teacher was told, in 60% of the cases."""
REDRAWN = 0.65
"""Share of the random teacher's labels that were drawn anew."""


@bench("digits")
class DigitsBench(LabelledImagesBench):
    """The 1,797 digits of scikit-learn and a small convolutional network: 600 to train on, 40% of their labels redrawn,
    400 held out, 797 for the test. An arm without a method is kernel ridge regression, refitted as its data say."""

    sizes = (600, 400)
    """Of the images to train on and of those held out."""

    def __init__(self, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        super().__init__(seed)
        pixels, digits = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
        names = [str(i) for i in range(CLASSES)]
        self.split(images, torch.from_numpy(digits).long(), names, *self.sizes)

    def student(self) -> nn.Module:
        """A convolutional classifier ``[B, 1, 8, 8] -> [B, 10]`` with 6,186 weights."""
        return larger_network()

    def network(self, images: int = 400, clean: bool = False, **settings: Any) -> nn.Module:
        """Kernel self-distillation on the first ``images`` training images; ``settings`` are the estimator's. A weight
        chosen by validation sees the held-out images."""
        from stillroom.networks.kernel_self_distillation import KernelSelfDistillation  # a second of imports

        source = (self.clean if clean else self.train).take(torch.arange(images))
        estimator = KernelSelfDistillation(gamma=GAMMA, **settings)
        held_out = rows(self.held_out) if estimator.gt_weight == "validation" else None
        return KernelClassifier(estimator.fit(*rows(source), validation=held_out))

    def model(self, network: nn.Module, sampler: Sampler) -> Recogniser:
        return Recogniser(network, sampler, estimates=isinstance(network, KernelClassifier))

    def floor(self) -> dict[str, Any]:
        """Plain kernel ridge regression on true labels."""
        kernel = self.network(clean=True, ridge=0.1, rounds=1)
        return self.score(self.model(kernel, ForwardPass()), self.seed) | super().floor()


@bench("digits-ensemble")
class DigitsEnsembleBench(EnsembleBench, DigitsBench):
    """The digits with teachers: a small student, and three networks of twice its channels, trained on the same 600
    images, 40% of whose labels are redrawn, with a rate that falls to nothing."""

    training: ClassVar = {"steps": 300, "pixels": 1}

    def student(self) -> nn.Module:
        """A convolutional classifier ``[B, 1, 8, 8] -> [B, 10]`` with 32 features and 3,706 weights."""
        return smaller_network()

    def wide(self) -> nn.Module:
        return larger_network()


@bench("digits-semi")
class SemiDigitsBench(FewLabelsBench, DigitsBench):
    """The digits of scikit-learn, few of them labelled, a small convolutional student, and a choice of teachers: 1,000
    to train on, 200 held out, 597 for the test."""

    sizes = (1000, 200)
    kinds = ("biased", "random", "captions")

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        for part in (self.train, self.clean, self.held_out, self.test):
            part.classes = list(WORDS)

    def student(self) -> nn.Module:
        """A convolutional classifier ``[B, 1, 8, 8] -> [B, 10]`` with 32 features and 3,706 weights."""
        return smaller_network()

    def teacher(self, kind: str = "biased") -> nn.Module:
        """A teacher trained here. ``biased``: on labels of which 60% of 4, 7, 3 and 5 are 9, 1, 8 and 6, and 5% random;
        ``random``: on labels two thirds of which are random; ``captions``: a CLIPModel on images with captions, 20% of
        which name a random digit; ``untrained``: none of this."""
        if kind not in TEACHERS:
            raise UserError(f"no teacher {kind!r}{nearest(kind, TEACHERS)}", cure=f"known: {', '.join(TEACHERS)}")
        generator = torch.Generator().manual_seed(self.seed)
        truth, n = self.clean.labels, self.clean.n
        anything = torch.randint(CLASSES, (n,), generator=generator)
        chance = torch.rand(n, generator=generator)
        if kind == "captions":
            told = torch.where(chance < MISCAPTIONED, anything, truth)
            return caption_teacher(self.clean.images(), told, self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = larger_network()
        if kind == "biased":
            confused = torch.tensor([CONFUSED.get(c, c) for c in range(CLASSES)])
            told = torch.where(chance < 0.6, confused[truth], truth)
            told = torch.where(torch.rand(n, generator=generator) < 0.05, anything, told)
        else:
            told = torch.where(chance < REDRAWN, anything, truth)
        if kind != "untrained":
            fit(network, self.clean.images(), told, generator, steps=300 if kind == "biased" else 600)
        return network.eval()


def smaller_network() -> nn.Module:
    """An untrained convolutional classifier ``[B, 1, 8, 8] -> [B, 10]`` with 32 features and 3,706 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def larger_network() -> nn.Module:
    """An untrained convolutional classifier ``[B, 1, 8, 8] -> [B, 10]`` with 6,186 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, CLASSES),
    )  # fmt: skip


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
