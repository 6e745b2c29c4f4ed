"""What the benches of image encoders share. Their teachers are trained on first use and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench.autoencoders import train_autoencoder
from stillroom.bench.base import NO_FOLDERS, Bench, given_things, only, random_seed, shown
from stillroom.cache import kept
from stillroom.data.source import ArrayData
from stillroom.diffusion.sampling import Sampler
from stillroom.draws import mix
from stillroom.errors import UserError
from stillroom.evaluation.probes import (
    FEW,
    NAMES,
    OCCLUDED,
    accuracy,
    attention_collapse,
    fine_tune,
    occluded,
    probe_scores,
    smallest_class,
)
from stillroom.evaluation.scores import Score
from stillroom.networks.mae import make_encoder
from stillroom.networks.recognition import class_logits
from stillroom.networks.vit import PooledClassifier, encoder_of
from stillroom.surgery.skeleton import unread
from stillroom.task import say
from stillroom.tasks.encode.model import ImageEncoder

Scores = dict[str, float]
TEACHER_SEED = 1000
PROBES = tuple(Score(key, name, label="Linear probe" if key == "probe" else "") for key, name in NAMES.items())
ACCURACY = Score("accuracy", "Accuracy", label="Accuracy")


class EncoderBench(Bench):
    """Images without labels, a masked autoencoder trained on them, and probes.

    train: unlabelled images; probe: labelled ones for the probes; test. smallest, architecture: the networks of student
    and teacher; twin: of a student that learns from two teachers, and of the supervised one.
    """

    task = "encode"
    scores = PROBES
    smallest = "mae-nano"
    twin = "mae-mini"
    architecture = "mae-micro"
    mask_ratio = 0.75
    steps = 1200
    tuning = 300
    train: ArrayData
    probe: ArrayData
    test: ArrayData

    # --- networks -----------------------------------------------------------------------------------------------------
    def autoencoder(self, name: str, seed: int = 0) -> nn.Module:
        """An untrained masked autoencoder for these images."""
        with torch.random.fork_rng():
            torch.manual_seed(mix("network", name, seed))
            return make_encoder(name, self.train.shape[0], self.train.shape[-1])

    @cached_property
    def teacher(self) -> nn.Module:
        """A masked autoencoder, decoder and all, trained here on pixels."""

        def make() -> dict[str, Tensor]:
            network = self.autoencoder(self.architecture, TEACHER_SEED)
            return train_autoencoder(network, self.train, self.mask_ratio, self.steps, TEACHER_SEED)

        return self._once("teacher", self.autoencoder(self.architecture), make)

    @cached_property
    def tutor(self) -> nn.Module:
        """The teacher's encoder, fine-tuned on the labels of ``train``."""
        return self._tuned("tutor", lambda: self.teacher, self.architecture, self.tuning)

    def supervised(self, architecture: str) -> nn.Module:
        """An encoder of this architecture, trained from nothing on the labels of ``train``, with its head."""
        start = TEACHER_SEED
        return self._tuned("supervised", lambda: self.autoencoder(architecture, start), architecture, 2 * self.tuning)

    def _tuned(self, what: str, start: Callable[[], nn.Module], architecture: str, steps: int) -> nn.Module:
        """The network that ``start`` gives, with a head, after ``steps`` on the labels of ``train``."""
        classes = len(self.probe.classes)

        def make() -> dict[str, Tensor]:
            images, labels = self.train.images(), self.train.labels
            return dict(fine_tune(start(), images, labels, classes, steps=steps, seed=TEACHER_SEED).state_dict())

        empty = PooledClassifier(encoder_of(self.autoencoder(architecture)), classes)
        return self._once(what, empty, make, architecture, steps)

    def _once(self, what: str, empty: nn.Module, make: Callable[[], dict[str, Tensor]], *parts: object) -> nn.Module:
        """``empty`` with the weights that ``make`` gives, made once; without them where weights are left unread."""
        if unread():
            return empty.eval()
        parts = (self.architecture, self.mask_ratio, self.steps, self.train.fingerprint, *parts)
        empty.load_state_dict(
            kept(f"encoders/{what}", make, code=[train_autoencoder, fine_tune, make_encoder], parts=parts)
        )
        return empty.eval()

    # --- what a proof asks --------------------------------------------------------------------------------------------
    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("teacher", wanted)
        student = self.autoencoder(self.smallest, random_seed())
        return given_things([self.teacher], student=student, classes=self.train.classes)

    def network(self, **wanted: Any) -> nn.Module:
        """The masked teacher's encoder."""
        only("trained network", wanted)
        return encoder_of(self.teacher)

    def data(self, **wanted: Any) -> ArrayData:
        only("set of data", wanted)
        return self.train

    def mislead(self, method: Any, data: ArrayData) -> ArrayData:
        """Every teacher sees, in place of an image, the next one of the batch."""

        def other(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].roll(1, 0), *args[1:])

        for teacher in method.teachers().values():
            encoder_of(teacher).register_forward_pre_hook(other)
        return data

    def model(self, network: nn.Module, sampler: Sampler) -> ImageEncoder:
        return ImageEncoder(network, sampler)

    def draw(self, model: ImageEncoder, n: int) -> Tensor:
        return ImageEncoder(encoder_of(model.network)).features(self.test.images(slice(n)))

    def score(self, model: ImageEncoder, seed: int) -> Scores:
        """:func:`~stillroom.evaluation.probes.probe_scores` of a student, beside the masked teacher."""
        mine, theirs = (ImageEncoder(encoder_of(network)) for network in (model.network, self.teacher))
        return dict(probe_scores(mine, self.probe, self.test, theirs))

    def floor(self) -> dict[str, Any]:
        """The same scores of the masked teacher, and the number of test images."""
        found = probe_scores(ImageEncoder(encoder_of(self.teacher)), self.probe, self.test)
        return {f"teacher_{name}": value for name, value in found.items()} | {"n": self.test.n}

    # --- what a run asks ----------------------------------------------------------------------------------------------
    def try_out(self, model: Any) -> None:
        """Probes tell classes apart."""
        if len(torch.unique(self.probe.labels)) < 2:
            raise UserError(
                f"data {self.probe.name!r} has one class, by which no encoder can be scored",
                cure="give several, or evaluate.n=0",
            )

    def compare(
        self, everyone: Mapping[str, Any], n: int, seed: int, folders: Mapping[str, Path] = NO_FOLDERS
    ) -> dict[str, Any]:
        """Probes of everyone, the student's beside the first teacher's; of models that name classes too, how often they
        are right."""
        test = self.test.take(torch.arange(min(n, self.test.n)))
        say(f"probing on {test.n:,} test images")
        if (smallest := smallest_class(self.probe.labels)) < FEW:
            say(f"{NAMES['tuned'].lower()}: left out, for a class has {smallest}")
        encoders = {who: ImageEncoder(encoder_of(model.network)) for who, model in everyone.items()}
        beside = next((encoder for who, encoder in encoders.items() if who != "student"), None)
        found = {}
        for who, encoder in encoders.items():
            found[who] = probe_scores(encoder, self.probe, test, beside if who == "student" else None)
            if hasattr(everyone[who], "probabilities"):
                right = everyone[who].probabilities(test.images()).argmax(-1) == test.labels
                found[who]["accuracy"] = float(right.float().mean())
        reference = f"{self.probe.n:,} labelled and {test.n:,} test images ({self.test.origin})"
        return shown((*PROBES, ACCURACY), found, n=test.n, reference=reference)


class LabelledEncoderBench(EncoderBench):
    """The same with a classifier, the masked teacher fine-tuned, for students that end as classifiers: ``accuracy`` on
    test images, ``accuracy_occluded`` on those with the share ``covered`` of their patches covered."""

    covered = OCCLUDED
    scores = (*PROBES, ACCURACY, Score("accuracy_occluded", "Accuracy, a third of the patches covered"))

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        student = super().given(**wanted)["student"]
        return given_things([self.teacher, self.tutor], student=student, classes=self.train.classes)

    def network(self, **wanted: Any) -> nn.Module:
        only("trained network", wanted)
        return self.tutor

    def score(self, model: ImageEncoder, seed: int) -> Scores:
        """An encoder without a head guesses: one over the number of classes."""
        classifier, found = model.network, super().score(model, seed)
        if encoder_of(classifier) is classifier:
            return found | dict.fromkeys(("accuracy", "accuracy_occluded"), 1 / len(self.test.classes))
        images, patch = self.test.images(), encoder_of(classifier).config.patch_size

        def logits(rows: Tensor) -> Tensor:
            return class_logits(classifier, rows)

        return found | {
            "accuracy": accuracy(logits, images, self.test.labels),
            "accuracy_occluded": accuracy(logits, occluded(images, patch, share=self.covered), self.test.labels),
        }


class TwoTeacherBench(EncoderBench):
    """A supervised encoder beside the masked one. ``collapse``: how alike the heads of the last layer look;
    ``collapse_gap``: how far that is from the masked teacher."""

    scores: tuple[Score, ...] = (
        *PROBES,
        Score("collapse", "Likeness of the heads of the last layer", "lower"),
        Score("collapse_gap", "Its distance from the masked teacher's", "lower"),
    )

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("teacher", wanted)
        student = self.autoencoder(self.twin, random_seed())
        return given_things([self.supervised(self.twin), self.teacher], student=student, classes=self.train.classes)

    def network(self, teacher: str = "masked") -> nn.Module:
        """The masked teacher's encoder, or with ``teacher: supervised`` the other one's."""
        return encoder_of(self.teacher if teacher == "masked" else self.supervised(self.twin))

    def score(self, model: ImageEncoder, seed: int) -> Scores:
        images = self.test.images(slice(200))
        mine, theirs = (attention_collapse(encoder_of(n), images) for n in (model.network, self.teacher))
        return super().score(model, seed) | {"collapse": mine, "collapse_gap": abs(mine - theirs)}
