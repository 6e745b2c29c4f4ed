"""Worlds for image encoders: digits on a larger canvas, and Fashion-MNIST. Their teachers are trained on first use and
kept in the cache."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.cache import cache_folder, cached_tensors
from stillroom.data.source import LABELS, ArrayData, load_data
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer, mix
from stillroom.evaluation.probes import (
    accuracy,
    attention_collapse,
    dense_probe,
    fine_tune,
    occluded,
    patch_targets,
    probe_scores,
)
from stillroom.methods.masked.dmae import DMAE
from stillroom.networks.mae import make_encoder
from stillroom.networks.recognition import class_logits
from stillroom.networks.vit import PooledClassifier, encoder_of
from stillroom.surgery.skeleton import unread
from stillroom.tasks.encode.model import ImageEncoder

Scores = dict[str, float]
TEACHER_SEED = 1000


class EncoderBench:
    """Unlabelled images ``train``, labelled ones ``probe`` for the probes, and ``test``. ``student`` and
    ``architecture`` name the networks of student and teacher."""

    name: str
    student = "mae-nano"
    twin = "mae-mini"  # of a student that learns from two teachers, and of the supervised one
    architecture = "mae-micro"
    mask_ratio = 0.75
    steps = 1200
    tuning = 300
    train: ArrayData
    probe: ArrayData
    test: ArrayData

    def network(self, name: str, seed: int = 0) -> nn.Module:
        """An untrained masked autoencoder for these images."""
        with torch.random.fork_rng():
            torch.manual_seed(mix("network", name, seed))
            return make_encoder(name, self.train.shape[0], self.train.shape[-1])

    @cached_property
    def teacher(self) -> nn.Module:
        """A masked autoencoder, decoder and all, trained here on pixels."""

        def make() -> dict[str, Tensor]:
            method = DMAE(DMAE.Options(alpha=0.0, mask_ratio=self.mask_ratio))
            method.build(self.network(self.architecture, TEACHER_SEED))
            engine = EngineConfig(
                steps=self.steps, batch=64, seed=TEACHER_SEED, schedule="cosine", warmup=self.steps // 20,
                optim={"pretrain": {"lr": 1.5e-3}},
                checkpoint_every=self.steps,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                Trainer(method, self.train, engine, Path(folder), show=False).fit()
            parts = {"vit": method.student, "decoder": method.decoder}
            return {f"{part}.{key}": v for part, net in parts.items() for key, v in net.state_dict().items()}

        key = f"mae {self.architecture} {self.mask_ratio} {self.steps}"
        return self._kept(self.network(self.architecture), key, make)

    @cached_property
    def tutor(self) -> nn.Module:
        """The teacher's encoder, fine-tuned on the labels of ``train``."""
        key = f"tutor {self.architecture} {self.mask_ratio} {self.steps}"
        return self._tuned(lambda: self.teacher, self.architecture, key, self.tuning)

    def supervised(self, architecture: str) -> nn.Module:
        """An encoder of this architecture, trained from nothing on the labels of ``train``, with its head."""
        return self._tuned(
            lambda: self.network(architecture, TEACHER_SEED),
            architecture,
            f"supervised {architecture}",
            2 * self.tuning,
        )

    def _tuned(self, start: Callable[[], nn.Module], architecture: str, key: str, steps: int) -> nn.Module:
        """The network that ``start`` gives, with a head, after ``steps`` on the labels of ``train``."""
        classes = len(self.probe.classes)

        def make() -> dict[str, Tensor]:
            images, labels = self.train.images(), self.train.labels
            return dict(fine_tune(start(), images, labels, classes, steps=steps, seed=TEACHER_SEED).state_dict())

        empty = PooledClassifier(encoder_of(self.network(architecture)), classes)
        return self._kept(empty, f"{key} {steps}", make)

    def _kept(self, empty: nn.Module, what: str, make: Callable[[], dict[str, Tensor]]) -> nn.Module:
        """``empty`` with the weights that ``make`` gives, made once; without them where weights are left unread."""
        if unread():
            return empty.eval()
        key = f"{self.name} {what} {self.train.fingerprint} {self.probe.fingerprint}"
        lock = cache_folder() / "statistics" / f"{self.name}-encoders.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # another worker may be at it
            tensors = cached_tensors(key, lambda: {k: v.detach().clone().contiguous() for k, v in make().items()})
        empty.load_state_dict(tensors)
        return empty.eval()

    def score(self, network: nn.Module) -> Scores:
        """:func:`~stillroom.evaluation.probes.probe_scores` of a student, beside the masked teacher."""
        return probe_scores(
            ImageEncoder(encoder_of(network)), self.probe, self.test, ImageEncoder(encoder_of(self.teacher))
        )

    def recognition(self, classifier: nn.Module) -> Scores:
        """``accuracy`` of a network of class logits on test images, and ``accuracy_occluded`` on covered ones.
        An encoder without a head guesses: one over the number of classes."""
        if encoder_of(classifier) is classifier:
            return dict.fromkeys(("accuracy", "accuracy_occluded"), 1 / len(self.test.classes))
        images, patch = self.test.images(), encoder_of(classifier).config.patch_size

        def logits(rows: Tensor) -> Tensor:
            return class_logits(classifier, rows)

        return {
            "accuracy": accuracy(logits, images, self.test.labels),
            "accuracy_occluded": accuracy(logits, occluded(images, patch), self.test.labels),
        }

    def diversity(self, network: nn.Module) -> Scores:
        """``collapse`` of the last layer's attention, and ``collapse_gap``, its distance from the masked teacher's."""
        images = self.test.images(slice(200))
        mine, theirs = (attention_collapse(encoder_of(n), images) for n in (network, self.teacher))
        return {"collapse": mine, "collapse_gap": abs(mine - theirs)}

    def floor(self) -> dict[str, Any]:
        """The same scores of the masked teacher, and the number of test images."""
        found = probe_scores(ImageEncoder(encoder_of(self.teacher)), self.probe, self.test)
        return {f"teacher_{name}": value for name, value in found.items()} | {"n": self.test.n}


class CanvasBench(EncoderBench):
    """scikit-learn's 8x8 digits, twice as large, anywhere on a canvas of 20x20 pixels, at 0.6 to 1.4 of their contrast,
    with noise of 0.15: 25 patches. 1,200 digits, five times each on another place, train; 597 others are the test.

    ``dense``: for every test image and every labelled one what each pixel belongs to, ``[N, 20, 20]``: the background
    (0) or one of the quarters of the digit's box (1 to 4).
    """

    name = "canvas"
    mask_ratio = 0.76  # 6 of 25 patches stay
    steps = 2400
    copies = 5

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

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
            origin = f"{self.name}: {len(rows):,} {what} images"
            return ArrayData(images, {LABELS: labels[rows]}, names, self.name, origin)

        self.train = part(train.repeat(self.copies), 1, "training")
        self.probe, self.test = part(train, 2, "labelled"), part(test, 3, "test")

    def dense_score(self, network: nn.Module) -> Scores:
        """``dense``: the accuracy of a linear probe on single patches, what each belongs to."""
        encoder = ImageEncoder(encoder_of(network))
        patch = encoder_of(network).config.patch_size
        seen, asked = (patch_targets(self.dense[what], patch) for what in ("labelled", "test"))
        return {"dense": dense_probe(encoder, self.probe.images(), seen, self.test.images(), asked)}


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


class FashionEncodersBench(EncoderBench):
    """Fashion-MNIST, 49 patches of 4x4 pixels: the training images without their labels, 3,000 of them labelled for the
    probes, and 2,000 test images."""

    name = "fashion-encoders"
    tuning = 200

    @cached_property
    def train(self) -> ArrayData:  # type: ignore[override]
        return load_data("fashion", "train")

    @cached_property
    def probe(self) -> ArrayData:  # type: ignore[override]
        return self.train.take(torch.arange(min(3000, self.train.n)))

    @cached_property
    def test(self) -> ArrayData:  # type: ignore[override]
        test = load_data("fashion", "test")
        return test.take(torch.arange(min(2000, test.n)))
