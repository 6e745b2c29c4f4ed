"""Image encoders: a small one is trained on images without labels, beside teachers by name or from model folders, and
scored by probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.source import IMAGE_SETS, LABELS, ArrayData, load_data
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.folders.image_networks import ENCODERS, VISION_OF, architecture
from stillroom.folders.processors import pixels_of
from stillroom.networks.mae import ARCHITECTURES, make_encoder
from stillroom.networks.vit import check_encoder, encoder_of
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import making
from stillroom.task import (
    COLUMNS,
    NOTHING,
    Card,
    Model,
    Rows,
    find_model_class,
    model_home,
    task,
    trained_teacher,
)
from stillroom.tasks.classify.model import ImageClassifier
from stillroom.tasks.encode.model import ImageEncoder
from stillroom.tasks.networks import NetworkTask, check_images
from stillroom.tasks.words import began, made_from, teacher_names

NETWORKS = (ImageEncoder, ImageClassifier, nn.Module)


@task("encode")
class Encoding(NetworkTask):
    """Images, of which the student sees no labels, unless its method says so. Sets without classes are fit to train on
    but give no scores. Teachers may also be those that a bench trains on first use, by name."""

    model = ImageEncoder
    data_names = IMAGE_SETS
    objects = {"teacher": NETWORKS, "student": NETWORKS, "data": (ArrayData,)}
    data: ArrayData

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """An encoder, or what has one inside."""
        return find_model_class(folder) in (None, ImageEncoder, ImageClassifier)

    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        source = given["data"] if "data" in given else load_data(recipe.data, "train")
        channels, height, width = check_images(source, recipe.data)
        if height != width:
            raise UserError(
                f"data {recipe.data!r}: images are {width}x{height}, encoders take squares", cure="crop or scale them"
            )
        self.data, self.origin = source, source.origin
        self.read_networks(recipe, given)
        for name, network in self.everyone(recipe):
            config = check_encoder(network, name).config
            theirs, mine = (config.num_channels, config.image_size), (channels, width)
            if theirs != mine:
                raise UserError(
                    f"encoder {name!r} takes {theirs[0]} channels of {theirs[1]} pixels, data {recipe.data!r} have "
                    f"{mine[0]} of {mine[1]}",
                    cure=f"choose an encoder of {mine[0]} channels and {mine[1]} pixels",
                )

    def bare(self, given: Any) -> nn.Module:
        return given.network if isinstance(given, ImageEncoder | ImageClassifier) else given

    def called(self, names: Sequence[str]) -> list[str]:
        return teacher_names(names)

    def read(self, name: str, place: int, recipe: Recipe) -> nn.Module:
        """An untrained network by name, a teacher of a bench by name, or a model folder."""
        if Path(name).expanduser().is_dir():
            folder = model_home(name)
            named = architecture(folder)
            if named in (*ENCODERS, *VISION_OF) or "ImageClassification" not in named:
                return ImageEncoder.load(folder).network
            network: Any = ImageClassifier.load(folder).network
            if (pixels := pixels_of(network)) is not None:  # which its encoder alone would not pass
                network.config.image_mean, network.config.image_std = list(pixels.mean), list(pixels.std)
            return network
        if (found := trained_teacher(name, recipe.data)) is not None:
            return found
        if place and name in ARCHITECTURES:
            raise UserError(f"teacher {name!r} is an untrained network", cure=f"it can be the student: student={name}")
        with making():
            return make_encoder(name, self.data.shape[0], self.data.shape[-1])

    def teachers(self) -> Mapping[str, ImageEncoder]:
        return {who: ImageEncoder(encoder_of(network)) for who, network in (self.made or self.taught).items()}

    def student(self, network: nn.Module, sampler: Sampler) -> ImageEncoder | ImageClassifier:
        """An encoder, or a classifier where the method's last stage made one."""
        if hasattr(getattr(network, "config", None), "architectures") and "Classification" in type(network).__name__:
            return ImageClassifier(network, self.data.classes, sampler)
        return ImageEncoder(network, sampler)

    def rows(self, model: Any, seed: int, most: int = 80) -> Rows:
        """Training images, each before those that lie nearest to it, by the cosine of their features."""
        chosen = torch.randperm(self.data.n, generator=torch.Generator().manual_seed(seed))[:1000]
        images = self.data.images(chosen)
        features = F.normalize(encoder(model).features(images), dim=-1)
        asked = torch.arange(min(10, len(images)))
        names = [""] * len(asked)
        if LABELS in self.data.cond and self.data.classes:
            labels = self.data.labels[chosen]
            asked = torch.stack([torch.nonzero(labels == c)[0, 0] for c in torch.unique(labels)])
            names = [self.data.classes[int(labels[i])] for i in asked]
        nearest = (features[asked] @ features.T).topk(min(COLUMNS, len(images))).indices
        return Rows(names, images[nearest])

    def call(self, model: Any, batch: int) -> Tensor:
        return encoder(model).features(self.data.images(slice(1)).expand(batch, -1, -1, -1))

    def facts(self, recipe: Recipe, student: Model) -> dict[str, Any]:
        """A student that became a classifier is one in every table."""
        return {"task": student.task}

    @classmethod
    def card(cls, recipe: Recipe, result: Mapping[str, Any]) -> Card:
        taught = made_from(recipe.teacher)
        makes = f"An image encoder {began(recipe, ARCHITECTURES)}" + (f", a student of {taught}" if taught else "")
        use = "x = student.features(images)  # [N, C, H, W] in [-1, 1] to [N, D]"
        return Card(makes, [use], hub_library="transformers", tag="image-feature-extraction")


def encoder(model: Any) -> ImageEncoder:
    """The encoder of a model, a classifier's too."""
    return ImageEncoder(encoder_of(model.network))
