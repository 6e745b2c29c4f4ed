"""Fashion-MNIST, or other labelled images, for image encoders."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from stillroom.bench import bench
from stillroom.bench.encoders import EncoderBench, LabelledEncoderBench, TwoTeacherBench
from stillroom.data.source import ArrayData, load_data
from stillroom.task import IN_MEMORY, say

LABELLED, TESTED = 3000, 2000
"""Images for the probes, and for the scores of a proof."""


class FashionEncoders(EncoderBench):
    """Fashion-MNIST, 49 patches of 4x4 pixels: the training images without their labels, 3,000 of them labelled for the
    probes, and 2,000 test images."""

    tuning = 200
    source = "fashion"

    @cached_property
    def train(self) -> ArrayData:  # type: ignore[override]
        return load_data(self.source, "train")

    @cached_property
    def probe(self) -> ArrayData:  # type: ignore[override]
        return self.train.take(torch.arange(min(LABELLED, self.train.n)))

    @cached_property
    def test(self) -> ArrayData:  # type: ignore[override]
        test = load_data(self.source, "test")
        return test.take(torch.arange(min(TESTED, test.n)))


@bench("fashion-encoders")
class ImageEncodersBench(FashionEncoders):
    """Fashion-MNIST without labels, and a masked autoencoder. Runs on other labelled images are judged by the same
    probes, on as many test images as they ask for."""

    trains = ("fashion-mae", "fashion-mae-tuned", "fashion-supervised")

    @classmethod
    def serves(cls, task: str, source: str, data: Any) -> bool:
        """Images in classes, which have a test split: not those given as objects."""
        return task == cls.task and source != IN_MEMORY and bool(data.classes)

    @classmethod
    def over(cls, source: str, data: Any = None) -> ImageEncodersBench:
        made = cls()
        made.source = source
        made.train = data if data is not None else load_data(source, "train")
        test = load_data(source, "test", made.train.shape)
        made.test = test.by_names(made.train.classes, "the classes of the training images")
        return made

    def trained(self, name: str) -> nn.Module:
        say(f"teacher {name} (trained on first use, then kept)")
        if name == "fashion-supervised":
            return self.supervised(self.twin)
        return self.teacher if name == "fashion-mae" else self.tutor


@bench("fashion-encoders-labels")
class FashionEncodersLabelsBench(FashionEncoders, LabelledEncoderBench):
    """Fashion-MNIST with labels, and a masked autoencoder before and after fine-tuning."""


@bench("fashion-two")
class FashionTwoBench(FashionEncoders, TwoTeacherBench):
    """Fashion-MNIST, a masked autoencoder and a supervised encoder."""
