"""Fashion-MNIST for classifiers: under wrong labels, or with few."""

from __future__ import annotations

from torch import nn

from stillroom.bench import bench
from stillroom.bench.labels import CLASSES, FewLabelsBench, LabelledImagesBench
from stillroom.data.source import load_data
from stillroom.folders.image_networks import make_classifier
from stillroom.folders.shipped import ASSETS
from stillroom.networks.prompt_classifier import PromptClassifier


@bench("fashion-labels")
class FashionLabelsBench(LabelledImagesBench):
    """Fashion-MNIST and a small ResNet: 10,000 images to train on where the whole set is installed (half of the shipped
    sample elsewhere), 40% of their labels redrawn, 2,000 held out (a tenth), and the test split."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        source = load_data("fashion", "train")
        pool, held_out = min(10_000, source.n // 2), min(2_000, source.n // 10)
        test = load_data("fashion", "test")
        self.split(source.array, source.labels, source.classes, pool, held_out, test)

    def student(self) -> nn.Module:
        """A small ResNet."""
        return make_classifier("resnet-small", 1, CLASSES)


@bench("fashion-semi")
class FashionSemiBench(FewLabelsBench, FashionLabelsBench):
    """Fashion-MNIST, few of it labelled, a small ResNet, and the shipped text-image teacher."""

    kinds = ("captions",)

    def teacher(self, kind: str) -> nn.Module:
        return PromptClassifier.load(ASSETS / "fashion-clip", self.clean.classes)
