"""Fashion-MNIST for classifiers: under wrong labels, with few images and an ensemble, or with few labels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from stillroom.bench import bench
from stillroom.bench.labels import CLASSES, EnsembleBench, FewLabelsBench, LabelledImagesBench, anneal
from stillroom.cache import kept
from stillroom.data.source import load_data
from stillroom.draws import mix
from stillroom.errors import UserError, nearest
from stillroom.folders.image_networks import make_classifier
from stillroom.folders.shipped import ASSETS
from stillroom.networks.prompt_classifier import PromptClassifier

CONFUSED = {6: 0, 2: 4, 7: 9}
"""What the biased teacher was told: shirts are T-shirts, pullovers coats, sneakers ankle boots."""
TOLD_WRONG = 0.6
"""Share of the images of these three classes."""


@bench("fashion-labels")
class FashionLabelsBench(LabelledImagesBench):
    """Fashion-MNIST and a small ResNet: 10,000 images to train on where the whole set is installed (half of the shipped
    sample elsewhere), 40% of their labels redrawn, 2,000 held out (a tenth), and the test split."""

    pool = 10_000

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        source = load_data("fashion", "train")
        pool, held_out = min(self.pool, source.n // 2), min(2_000, source.n // 10)
        test = load_data("fashion", "test")
        self.split(source.array, source.labels, source.classes, pool, held_out, test)

    def student(self) -> nn.Module:
        """A small ResNet."""
        return make_classifier("resnet-small", 1, CLASSES)


@bench("fashion-ensemble")
class FashionEnsembleBench(EnsembleBench, FashionLabelsBench):
    """The same where images are scarce, with teachers: 2,000 images, 40% of their labels redrawn, and three networks
    twice as wide as the student, trained on them with a rate that falls to nothing."""

    pool = 2_000
    training: ClassVar = {"steps": 600, "pixels": 2, "mirrored": 0.5}

    def wide(self) -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        shape: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1]}
        shape |= {"layer_type": "basic", "num_channels": 1, "num_labels": CLASSES}
        return ResNetForImageClassification(ResNetConfig(**shape))


@bench("fashion-semi")
class FashionSemiBench(FewLabelsBench, FashionLabelsBench):
    """Fashion-MNIST, few of it labelled, a small ResNet, and a choice of teachers: the shipped text-image teacher
    (``captions``), or a small ResNet that was told 60% of three classes wrongly, each time as the same other class
    (``biased``)."""

    kinds = ("captions", "biased")

    def teacher(self, kind: str) -> nn.Module:
        if kind not in self.kinds:
            raise UserError(f"no teacher {kind!r}{nearest(kind, self.kinds)}", cure=f"known: {', '.join(self.kinds)}")
        if kind == "captions":
            return PromptClassifier.load(ASSETS / "fashion-clip", self.clean.classes)
        seed = mix(self.name, kind, self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.student()
        generator = torch.Generator().manual_seed(seed)
        truth = self.clean.labels
        confused = torch.tensor([CONFUSED.get(c, c) for c in range(CLASSES)])
        told = torch.where(torch.rand(len(truth), generator=generator) < TOLD_WRONG, confused[truth], truth)

        def make() -> dict[str, torch.Tensor]:
            anneal(network, self.clean, told, seed, steps=400, pixels=1)
            return network.state_dict()

        network.load_state_dict(
            kept(f"{self.name}/{kind}", make, code=[type(self)], parts=[self.clean.fingerprint, self.seed])
        )
        return network.eval()
