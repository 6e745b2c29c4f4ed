"""Recognition: a classifier is trained on labelled images, from a network by name or from a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.source import ArrayData, load_data
from stillroom.diffusion.sampling import Sampler
from stillroom.engine.trainer import mix
from stillroom.errors import UserError
from stillroom.folders.image_networks import channels_of, config_of, make_classifier
from stillroom.folders.shipped import SHIPPED, model_folder
from stillroom.networks.prompt_classifier import PromptClassifier, is_text_image_model
from stillroom.networks.recognition import class_logits
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import making
from stillroom.tasks.base import COLUMNS, IN_MEMORY
from stillroom.tasks.classify.model import ImageClassifier, asked
from stillroom.tasks.recognition import Recognition, split_rows


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
