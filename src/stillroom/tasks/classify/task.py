"""Recognition: a classifier is trained on labelled images, from a network by name or from a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.source import IMAGE_SETS, LABELS, ArrayData, load_data
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.folders.image_networks import ARCHITECTURES, channels_of, config_of, make_classifier
from stillroom.folders.shipped import SHIPPED
from stillroom.networks.prompt_classifier import PromptClassifier, is_text_image_model
from stillroom.networks.recognition import class_logits
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import making
from stillroom.task import COLUMNS, IN_MEMORY, NOTHING, Card, Rows, model_home, task
from stillroom.tasks.classify.model import ImageClassifier, asked
from stillroom.tasks.networks import Recognition, check_images, split_rows
from stillroom.tasks.words import began, made_from

NETWORKS = (ImageClassifier, nn.Module)


@task("classify")
class Classification(Recognition):
    """Labelled images. Every fifth of them trains nothing: it is the part ``heldout``, to choose by. The test split is
    used for scores only."""

    model = ImageClassifier
    data: ArrayData
    things = "images"
    data_names = IMAGE_SETS
    objects = {"teacher": NETWORKS, "student": NETWORKS, "data": (ArrayData,)}

    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        source = given["data"] if "data" in given else load_data(recipe.data, "train")
        check_images(source, recipe.data)
        if len(source.classes) < 2 or LABELS not in source.cond:
            raise UserError(
                f"data {recipe.data!r} has no classes to tell apart",
                cure="put the images into one sub-folder per class",
            )
        source = self.by_network(source, recipe, given)
        training, held_out = split_rows(source.n, recipe.data, self.things)
        self.data = source.take(training)
        self.data.parts["heldout"] = source.take(held_out)
        self.origin = source.origin
        self.test = None
        if recipe.data != IN_MEMORY:
            test = load_data(recipe.data, "test", source.shape)
            self.test = test.by_names(source.classes, "the classes of the training images")
        self.read_networks(recipe, given)
        for name, network in self.everyone(recipe):
            self._check(name, network, recipe)
        shown = torch.randn(2, *source.shape, generator=torch.Generator().manual_seed(0))
        self.align(recipe, given, lambda network: class_logits(network, shown))

    def bare(self, given: Any) -> nn.Module:
        return asked(given) if isinstance(given, ImageClassifier) else given

    def read(self, name: str, place: int, recipe: Recipe) -> nn.Module:
        """A model folder, or, for the student, an untrained network by name."""
        folder = model_home(name) if name in SHIPPED or Path(name).expanduser().is_dir() else Path(name)
        if folder.is_dir() and is_text_image_model(folder) and place:
            return PromptClassifier.load(folder, self.data.classes, self.data.shape[0])
        if folder.is_dir():
            return asked(ImageClassifier.load(folder))
        if place and (name in ARCHITECTURES or name.endswith(".json")):
            raise UserError(f"teacher {name!r} is an untrained network", cure=f"it can be the student: student={name}")
        if place:
            fit = ", ".join(known for known in SHIPPED if self.reads(model_home(known)))
            raise UserError(f"no classifier {name!r}", cure=f"give a trained one's folder, or one of: {fit}")
        with making():
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

    def rows(self, model: Any, seed: int, most: int = 80) -> Rows:
        """Held-out images under the class that the network gives them; blank where it gives that class to too few."""
        images = self.data.parts["heldout"].images()
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:1000]]
        found = model.probabilities(images).argmax(-1)
        grid = torch.ones(len(self.data.classes), COLUMNS, *images.shape[1:])
        for number in range(len(grid)):
            chosen = images[found == number][:COLUMNS]
            grid[number, : len(chosen)] = chosen
        return Rows(list(self.data.classes), grid)

    def ask(self, classifier: Any, data: ArrayData, rows: slice) -> Tensor:
        return classifier.probabilities(data.images(rows))

    def call(self, model: Any, batch: int) -> Tensor:
        return model.probabilities(self.data.images(slice(1)).expand(batch, -1, -1, -1))

    @classmethod
    def card(cls, recipe: Recipe, result: Mapping[str, Any]) -> Card:
        taught = made_from(recipe.teacher)
        use = "names = student.classify(images)  # [N, C, H, W] in [-1, 1]"
        makes = f"A classifier {began(recipe, ARCHITECTURES)}" + (f", taught by {taught}" if taught else "")
        return Card(makes, [use], hub_library="transformers", tag="image-classification")
