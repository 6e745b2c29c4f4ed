"""Recognition: a classifier is trained on labelled images, from a network by name or from a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.source import HOLDOUT, ArrayData, load_data
from stillroom.diffusion.sampling import Sampler
from stillroom.engine.trainer import mix
from stillroom.errors import UserError
from stillroom.evaluation.metrics import calibration_error
from stillroom.models.classifier import ARCHITECTURES, ImageClassifier, config_of, make_classifier
from stillroom.models.families import parameter_count
from stillroom.recipe import Recipe
from stillroom.tasks.base import COLUMNS, IN_MEMORY, Task, sampling_cost, say


class Classification(Task):
    """Labelled images. Every fifth of them trains nothing: it is the part ``heldout``, to choose by. The test split is
    used for scores only."""

    data: ArrayData

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        source = load_data(recipe.data, "train") if data is None else data
        if len(source.classes) < 2:
            raise UserError(
                f"data {recipe.data!r} has no classes to tell apart",
                cure="put the images into one sub-folder per class",
            )
        held_out = torch.arange(source.n) % HOLDOUT == HOLDOUT - 1
        self.data = source.take(torch.nonzero(~held_out)[:, 0])
        self.data.parts["heldout"] = source.take(torch.nonzero(held_out)[:, 0])
        self.origin = source.origin
        self.test = load_data(recipe.data, "test", source.shape) if recipe.data != IN_MEMORY else None
        self.network = self._network(recipe, teacher)

    def _network(self, recipe: Recipe, teacher: Any) -> nn.Module:
        """Raises UserError for a network that does not fit the data."""
        channels, classes = self.data.shape[0], len(self.data.classes)
        if teacher is None and recipe.teacher in ARCHITECTURES and not Path(recipe.teacher).is_dir():
            with torch.random.fork_rng():
                torch.manual_seed(mix("network", recipe.engine.seed))
                return make_classifier(recipe.teacher, channels, classes)
        if teacher is None:
            folder = Path(recipe.teacher).expanduser()
            if not folder.is_dir():
                make_classifier(recipe.teacher, channels, classes)  # says which names there are
            teacher = ImageClassifier.load(folder)
        network = teacher.network if isinstance(teacher, ImageClassifier) else teacher
        config = config_of(network)
        fits = {"channels": (config.num_channels, channels), "classes": (config.num_labels, classes)}
        for what, (theirs, mine) in fits.items():
            if theirs != mine:
                raise UserError(
                    f"network {recipe.teacher!r} has {theirs} {what}, data {recipe.data!r} {mine}",
                    cure=f"choose a network with {mine} {what}",
                )
        return network

    def networks(self) -> tuple[nn.Module]:
        return (self.network,)

    def teachers(self) -> Mapping[str, Any]:
        """None: what teaches is made by the method."""
        return {}

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

    def measure(self, recipe: Recipe, student: ImageClassifier) -> dict[str, Any]:
        measured: dict[str, Any] = {"nfe": 1, "params": parameter_count(student.network)}
        facts: dict[str, Any] = {"task": "classify", "student": measured}
        if recipe.evaluate.n == 0:
            return facts
        say("timing the student")
        row = self.data.images(slice(1))
        measured |= sampling_cost(student, lambda batch: student.probabilities(row.expand(batch, -1, -1, -1)))
        if self.test is None:
            return facts
        n = min(recipe.evaluate.n, self.test.n)
        say(f"classifying {n:,} test images")
        chosen = self.test.take(torch.arange(n))
        scores = classification_scores(student.probabilities(chosen.images()), chosen.labels)
        names = {"accuracy": "Accuracy", "nll": "Log loss", "ece": "Calibration error, 15 bins"}
        bench = {"n": n, "reference": f"{n:,} test images ({self.test.origin})"}
        return facts | {"bench": bench, "score_names": names, "scores": {"student": scores}}


def classification_scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy``, ``nll`` (nats) and ``ece`` of ``[N, classes]`` and ``[N]``."""
    return {
        "accuracy": float((probabilities.argmax(-1) == labels).float().mean()),
        "nll": float(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels)),
        "ece": calibration_error(probabilities, labels),
    }
