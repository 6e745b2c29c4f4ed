"""Worlds of labelled images: what classifiers' proofs run in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench.labels import DigitsBench, FashionLabelsBench, KernelClassifier
from stillroom.bench.semi import FashionSemiBench, SemiDigitsBench
from stillroom.data.source import ArrayData
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError

Scores = dict[str, Any]


class LabelledWorld:
    """Images to be recognised, some of whose training labels are wrong; every seed splits and mislabels them anew.

    ``mse``: of probabilities (or a regression's scores) and the true labels, one-hot, over images and classes.
    """

    name: str
    metrics = ("accuracy", "mse")
    bench: Any

    def teacher(self) -> Any:
        return self.bench.network()

    def data(self, images: int = 0) -> ArrayData:
        return self.bench.data(images or self.bench.train.n)

    def network(self, **wanted: Any) -> nn.Module:
        raise UserError("this world has no trained network", cure="give every arm a method")

    def mislead(self, method: Any, data: ArrayData) -> ArrayData:
        def wrong(teacher: nn.Module, _: Any, output: Any) -> Any:
            if teacher.training:  # it still learns, and what it will tell the student is what counts
                return output
            if isinstance(output, Tensor):
                return output.roll(1, dims=-1)
            output.logits = output.logits.roll(1, dims=-1)
            return output

        for teacher in method.teachers().values():
            teacher.register_forward_hook(wrong)
        return data

    def worst(self, metric: str) -> float:
        return 0.0 if metric == "accuracy" else math.inf

    def generator(self, network: Any, sampler: Sampler) -> Any:
        def probabilities(images: Tensor) -> Tensor:
            outputs = sampler.sample(network, images)
            return outputs if isinstance(network, KernelClassifier) else outputs.softmax(-1)

        return probabilities

    def draw(self, generator: Any, n: int) -> Tensor:
        return generator(self.bench.test.images(slice(n)))

    def score(self, generator: Any, seed: int) -> Scores:
        return dict(self.bench.score(generator))

    def floor(self) -> Scores:
        return dict(self.bench.floor())


class DigitsWorld(LabelledWorld):
    """8x8 digits and a small convolutional network. An arm without a method is kernel ridge regression, refitted as its
    data say."""

    name = "digits"

    def __init__(self, seed: int = 0) -> None:
        self.bench = DigitsBench(seed)

    def at(self, seed: int) -> DigitsWorld:
        return DigitsWorld(seed)

    def network(self, **settings: Any) -> nn.Module:
        return self.bench.kernel_fit(**settings)


class FashionLabelsWorld(LabelledWorld):
    """Fashion-MNIST and a small ResNet."""

    name = "fashion-labels"

    def __init__(self, seed: int = 0) -> None:
        self.bench = FashionLabelsBench(seed)

    def at(self, seed: int) -> FashionLabelsWorld:
        return FashionLabelsWorld(seed)


class SemiDigitsWorld(LabelledWorld):
    """8x8 digits, few of them labelled, a small convolutional student, and a choice of teachers."""

    name = "digits-semi"
    teachers: tuple[str, ...] = ("biased", "random", "captions")
    bench: SemiDigitsBench | FashionSemiBench

    def __init__(self, seed: int = 0) -> None:
        self.bench = SemiDigitsBench(seed)

    def at(self, seed: int) -> SemiDigitsWorld:
        return SemiDigitsWorld(seed)

    def teacher(self, kind: str = "") -> tuple[nn.Module, nn.Module]:
        """The student's network and a teacher of this kind, by default the world's first."""
        with torch.random.fork_rng():
            torch.manual_seed(self.bench.seed)
            return self.bench.network(), self.bench.teacher(kind or self.teachers[0])

    def floor(self) -> Scores:
        scores = {f"{kind} teacher": self._accuracy(kind) for kind in self.teachers}
        return dict(super().floor()) | scores

    def _accuracy(self, kind: str) -> float:
        teacher = self.bench.teacher(kind)
        with torch.no_grad():
            return self.bench.score(lambda images: teacher(images).softmax(-1))["accuracy"]


class FashionSemiWorld(SemiDigitsWorld):
    """Fashion-MNIST, few of it labelled, a small ResNet, and the shipped text-image teacher."""

    name = "fashion-semi"
    teachers = ("captions",)

    def __init__(self, seed: int = 0) -> None:
        self.bench = FashionSemiBench(seed)

    def at(self, seed: int) -> FashionSemiWorld:
        return FashionSemiWorld(seed)
