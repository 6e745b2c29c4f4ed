"""Worlds for image encoders, scored by probes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench.encoders import CanvasBench, FashionEncodersBench
from stillroom.data.source import ArrayData
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.evaluation.probes import NAMES
from stillroom.networks.vit import encoder_of
from stillroom.tasks.encode.model import ImageEncoder

PLAIN = tuple(NAMES)


class EncoderWorld:
    """Images without labels, a masked autoencoder trained on them, and probes."""

    name: str
    metrics: tuple[str, ...] = PLAIN
    bench: Any

    def at(self, seed: int) -> EncoderWorld:
        return self

    def teacher(self) -> tuple[nn.Module, ...]:
        """The student's network, then the masked autoencoder."""
        return self.bench.network(self.bench.student, int(torch.randint(2**31, ()))), self.bench.teacher

    def network(self, **wanted: Any) -> nn.Module:
        """The masked teacher itself."""
        return encoder_of(self.bench.teacher)

    def data(self, **wanted: Any) -> ArrayData:
        if wanted:
            raise UserError(
                f"this world has one set of data, not {', '.join(wanted)}", cure="leave the arm's data away"
            )
        return self.bench.train

    def mislead(self, method: Any, data: ArrayData) -> ArrayData:
        """Every teacher sees, in place of an image, the next one of the batch."""

        def other(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].roll(1, 0), *args[1:])

        for teacher in method.teachers().values():
            encoder_of(teacher).register_forward_pre_hook(other)
        return data

    def worst(self, metric: str) -> float:
        return 0.0

    def generator(self, network: nn.Module, sampler: Sampler) -> ImageEncoder:
        return ImageEncoder(network, sampler)

    def draw(self, generator: ImageEncoder, n: int) -> Tensor:
        return ImageEncoder(encoder_of(generator.network)).features(self.bench.test.images(slice(n)))

    def score(self, generator: ImageEncoder, seed: int) -> dict[str, Any]:
        return dict(self.bench.score(generator.network))

    def floor(self) -> dict[str, Any]:
        return dict(self.bench.floor())


class CanvasWorld(EncoderWorld):
    """Digits on a larger canvas."""

    name = "canvas"

    def __init__(self) -> None:
        self.bench = CanvasBench()


class LabelledEncoderWorld(EncoderWorld):
    """The same with a classifier, the masked teacher fine-tuned, for students that end as classifiers: ``accuracy`` on
    test images, ``accuracy_occluded`` on those with a third of their patches covered."""

    metrics: tuple[str, ...] = (*PLAIN, "accuracy", "accuracy_occluded")

    def teacher(self) -> tuple[nn.Module, ...]:
        return (*super().teacher(), self.bench.tutor)

    def network(self, **wanted: Any) -> nn.Module:
        return self.bench.tutor

    def score(self, generator: ImageEncoder, seed: int) -> dict[str, Any]:
        return super().score(generator, seed) | self.bench.recognition(generator.network)


class TwoTeacherWorld(EncoderWorld):
    """A supervised encoder beside the masked one. ``collapse``: how alike the heads of the last layer look;
    ``collapse_gap``: how far that is from the masked teacher."""

    metrics: tuple[str, ...] = (*PLAIN, "collapse", "collapse_gap")

    def teacher(self) -> tuple[nn.Module, ...]:
        seed = int(torch.randint(2**31, ()))
        return self.bench.network(self.bench.twin, seed), self.bench.supervised(self.bench.twin), self.bench.teacher

    def network(self, **wanted: Any) -> nn.Module:
        """The masked teacher, or with ``teacher: supervised`` the other one."""
        return encoder_of(self.bench.supervised(self.bench.twin) if wanted else self.bench.teacher)

    def worst(self, metric: str) -> float:
        return float("inf") if metric.startswith("collapse") else 0.0

    def score(self, generator: ImageEncoder, seed: int) -> dict[str, Any]:
        return super().score(generator, seed) | self.bench.diversity(generator.network)


class FashionEncodersWorld(EncoderWorld):
    """Fashion-MNIST."""

    name = "fashion-encoders"

    def __init__(self) -> None:
        self.bench = FashionEncodersBench()


class CanvasLabelsWorld(LabelledEncoderWorld):
    """Digits on a larger canvas, with labels."""

    name = "canvas-labels"

    def __init__(self) -> None:
        self.bench = CanvasBench()


class FashionEncodersLabelsWorld(LabelledEncoderWorld):
    """Fashion-MNIST, with labels."""

    name = "fashion-encoders-labels"

    def __init__(self) -> None:
        self.bench = FashionEncodersBench()


class CanvasTwoWorld(TwoTeacherWorld):
    """Digits on a larger canvas; ``dense``: whether single patches know which quarter of a digit they belong to."""

    name = "canvas-two"
    metrics: tuple[str, ...] = (*TwoTeacherWorld.metrics, "dense")

    def __init__(self) -> None:
        self.bench = CanvasBench()

    def score(self, generator: ImageEncoder, seed: int) -> dict[str, Any]:
        return super().score(generator, seed) | self.bench.dense_score(generator.network)


class FashionTwoWorld(TwoTeacherWorld):
    """Fashion-MNIST."""

    name = "fashion-two"

    def __init__(self) -> None:
        self.bench = FashionEncodersBench()
