"""Recognition: a classifier is trained on labelled images, from a network by name or from a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.data.source import HOLDOUT, ArrayData, load_data
from stillroom.diffusion.sampling import ForwardPass, Sampler, class_logits
from stillroom.engine.trainer import mix
from stillroom.errors import UserError
from stillroom.evaluation.classifiers import classification_scores, pair_scores
from stillroom.models.classifier import ImageClassifier, asked, channels_of, config_of, make_classifier
from stillroom.models.families import parameter_count
from stillroom.models.prompts import PromptClassifier, is_text_image_model
from stillroom.models.shipped import SHIPPED, model_folder
from stillroom.models.skeleton import making
from stillroom.recipe import Recipe
from stillroom.tasks.base import COLUMNS, IN_MEMORY, Task, sampling_cost, say


class Recognition(Task):
    """What classifiers of images and of texts share: the networks' roles, costs and scores.

    The first network is the student's, the others are teachers that were named beside it; the last of them is the one
    that the pair's scores compare the student with.
    """

    data: Any
    test: Any
    things: ClassVar[str]
    kind: ClassVar[str]
    _networks: tuple[nn.Module, ...]

    def networks(self) -> tuple[nn.Module, ...]:
        """The student's, then those of teachers that were named beside it."""
        return self._networks

    def check_names(self, name: str, theirs: Sequence[str], mine: Sequence[str]) -> None:
        """Raises UserError where a network calls its classes otherwise than the data, or in another order. The names
        ``LABEL_0`` and so on are transformers' for none."""
        if len(theirs) != len(mine) or list(theirs) == [f"LABEL_{i}" for i in range(len(theirs))]:
            return
        for place, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            if not same_name(a, b):
                raise UserError(
                    f"class {place} is {a!r} for network {name!r} and {b!r} for the data",
                    cure="give the data the network's classes in the network's order",
                )

    def teachers(self) -> Mapping[str, Any]:
        """Those that were named, or those that the method has made instead."""
        if self.made:
            return {name: self.student(network, ForwardPass()) for name, network in self.made.items()}
        names = [f"teacher-{i}" for i in range(1, len(self._networks))]
        taught = [self.student(network, ForwardPass()) for network in self._networks[1:]]
        return dict(zip(names, taught, strict=True))

    def ask(self, classifier: Any, data: Any, rows: slice) -> Tensor:
        """The classifier's probabilities on these rows of the data, ``[N, classes]``."""
        raise NotImplementedError

    def copies(self, classifier: Any, batch: int) -> Tensor:
        """The same of ``batch`` copies of the first training row, to be timed."""
        raise NotImplementedError

    def measure(self, recipe: Recipe, student: Any) -> dict[str, Any]:
        everyone = {"student": student, **self.teachers()}
        measured: dict[str, Any] = {
            who: {"nfe": 1, "params": parameter_count(c.network)} for who, c in everyone.items()
        }
        facts = {"task": self.kind, **measured}
        if recipe.evaluate.n == 0:
            return facts
        say("timing the networks")
        for who, classifier in everyone.items():
            measured[who] |= sampling_cost(classifier, partial(self.copies, classifier))
        if self.test is None:
            return facts
        n = min(recipe.evaluate.n, self.test.n)
        say(f"classifying {n:,} test {self.things}")
        found = {who: self.ask(classifier, self.test, slice(n)) for who, classifier in everyone.items()}
        scores = {who: classification_scores(p, self.test.labels[:n]) for who, p in found.items()}
        names = {"accuracy": "Accuracy", "nll": "Log loss", "ece": "Calibration error, 15 bins"}
        if len(found) > 1:
            last = list(found)[-1]
            scores["student"] |= pair_scores(found["student"], found[last])
            names |= {"agreement": "Agreement with the teacher", "kl": "KL(teacher || student), nats"}
        bench = {"n": n, "reference": f"{n:,} test {self.things} ({self.test.origin})"}
        return facts | {"bench": bench, "score_names": names, "scores": scores}


def split_rows(n: int) -> tuple[Tensor, Tensor]:
    """Row numbers that train, and those held out: every fifth."""
    held_out = torch.arange(n) % HOLDOUT == HOLDOUT - 1
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def same_name(a: str, b: str) -> bool:
    """Whether two names mean one class: alike but for case and spaces, or one of several by commas (ImageNet's)."""

    def ways(name: str) -> set[str]:
        return {" ".join(part.replace("_", " ").replace("-", " ").lower().split()) for part in (*name.split(","), name)}

    return bool(ways(a) & ways(b))


class Classification(Recognition):
    """Labelled images. Every fifth of them trains nothing: it is the part ``heldout``, to choose by. The test split is
    used for scores only."""

    data: ArrayData
    things, kind = "images", "classify"

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        source = load_data(recipe.data, "train") if data is None else data
        if len(source.classes) < 2:
            raise UserError(
                f"data {recipe.data!r} has no classes to tell apart",
                cure="put the images into one sub-folder per class",
            )
        training, held_out = split_rows(source.n)
        self.data = source.take(training)
        self.data.parts["heldout"] = source.take(held_out)
        self.origin = source.origin
        self.test = load_data(recipe.data, "test", source.shape) if recipe.data != IN_MEMORY else None
        if teacher is not None:
            given = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
            self._networks = tuple(asked(n) if isinstance(n, ImageClassifier) else n for n in given)
            self.names = [recipe.teacher] * len(given)
        else:
            self.names = [name.strip() for name in recipe.teacher.split(",")]
            self._networks = tuple(self._read(name, recipe.engine.seed, i) for i, name in enumerate(self.names))
        for name, network in zip(self.names, self._networks, strict=True):
            self._check(name, network, recipe)

    def _read(self, name: str, seed: int, place: int) -> nn.Module:
        """A network by name, untrained, or from a model folder."""
        folder = model_folder(name) if name in SHIPPED else Path(name).expanduser()
        if folder.is_dir() and is_text_image_model(folder):
            return PromptClassifier.load(folder, self.data.classes, self.data.shape[0])
        if folder.is_dir():
            found = ImageClassifier.load(folder)
            self.check_names(name, found.classes, self.data.classes)
            return asked(found)
        with torch.random.fork_rng(), making():
            torch.manual_seed(mix("network", seed, place))
            return make_classifier(name, self.data.shape[0], len(self.data.classes))

    def _check(self, name: str, network: nn.Module, recipe: Recipe) -> None:
        """Raises UserError for a network that does not fit the data."""
        (channels, height, width), classes = self.data.shape, len(self.data.classes)
        takes = channels_of(network)
        fits = {"channels": (takes, channels), "classes": ((config_of(network).num_labels,), classes)}
        for what, (theirs, mine) in fits.items():
            if mine not in theirs:
                raise UserError(
                    f"network {name!r} has {theirs[0]} {what}, data {recipe.data!r} {mine}",
                    cure=f"choose a network with {mine} {what}",
                )
        training = network.training
        try:
            with torch.no_grad():
                found = class_logits(network.eval(), torch.zeros(1, channels, height, width))
        except Exception as error:  # each class of network has its own way to say so
            raise UserError(
                f"network {name!r} cannot see the images of data {recipe.data!r}, {width}x{height} "
                f"({str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__})",
                cure="give images of its size, or its preprocessor_config.json, by which they are resized",
            ) from error
        network.train(training)
        if tuple(found.shape) != (1, classes):
            raise UserError(
                f"network {name!r} answers {list(found.shape)} for one image and {classes} classes",
                cure="give a network for image classification",
            )

    def student(self, network: nn.Module, sampler: Sampler) -> ImageClassifier:
        return ImageClassifier(network, self.data.classes, sampler)

    def rows(self, generator: ImageClassifier, seed: int) -> tuple[list[str], Tensor]:
        """Held-out images under the class that the network gives them; blank where it gives that class to too few."""
        images = self.data.parts["heldout"].images()
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:1000]]
        found = generator.probabilities(images).argmax(-1)
        grid = torch.ones(len(self.data.classes), COLUMNS, *images.shape[1:])
        for number in range(len(grid)):
            chosen = images[found == number][:COLUMNS]
            grid[number, : len(chosen)] = chosen
        return list(self.data.classes), grid

    def ask(self, classifier: ImageClassifier, data: ArrayData, rows: slice) -> Tensor:
        return classifier.probabilities(data.images(rows))

    def copies(self, classifier: ImageClassifier, batch: int) -> Tensor:
        return classifier.probabilities(self.data.images(slice(1)).expand(batch, -1, -1, -1))
