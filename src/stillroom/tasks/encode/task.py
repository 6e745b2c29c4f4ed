"""Image encoders: a small one is trained on images without labels, beside teachers by name or from model folders, and
scored by probes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.bench import find_bench, trained_teacher
from stillroom.data.source import LABELS, ArrayData, load_data
from stillroom.diffusion.sampling import Sampler
from stillroom.engine.trainer import mix
from stillroom.errors import UserError
from stillroom.folders.image_networks import ENCODERS, VISION_OF, architecture
from stillroom.folders.processors import pixels_of
from stillroom.networks.mae import ARCHITECTURES, make_encoder
from stillroom.networks.vit import check_encoder, encoder_of
from stillroom.recipe import Recipe
from stillroom.surgery.modules import parameter_count
from stillroom.surgery.skeleton import making
from stillroom.tasks.base import COLUMNS, IN_MEMORY, Task, sampling_cost, say, teacher_names
from stillroom.tasks.classify.model import ImageClassifier
from stillroom.tasks.encode.model import ImageEncoder


class Encoding(Task):
    """Images, of which the student sees no labels, unless its method says so. Sets without classes are fit to train on
    but give no scores."""

    data: ArrayData

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        source = load_data(recipe.data, "train") if data is None else data
        channels, height, width = source.shape
        if height != width:
            raise UserError(
                f"data {recipe.data!r}: images are {width}x{height}, encoders take squares", cure="crop or scale them"
            )
        self.data, self.origin = source, source.origin
        self.test = load_data(recipe.data, "test", source.shape) if recipe.data != IN_MEMORY else None
        if teacher is not None:
            given = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
            self._networks = tuple(n.network if isinstance(n, ImageEncoder | ImageClassifier) else n for n in given)
            self.names = [f"teacher-{i}" for i in range(1, len(given))]
        else:
            listed = [name.strip() for name in recipe.teacher.split(",")]
            self._networks = tuple(self._read(name, recipe, place) for place, name in enumerate(listed))
            self.names = teacher_names(listed[1:])
        for name, network in zip((recipe.teacher.split(",")[0], *self.names), self._networks, strict=True):
            config = check_encoder(network, name).config
            theirs, mine = (config.num_channels, config.image_size), (channels, width)
            if theirs != mine:
                raise UserError(
                    f"an encoder of {recipe.teacher!r} takes {theirs[0]} channels of {theirs[1]} pixels, data "
                    f"{recipe.data!r} have {mine[0]} of {mine[1]}",
                    cure=f"choose an encoder of {mine[0]} channels and {mine[1]} pixels",
                )

    def _read(self, name: str, recipe: Recipe, place: int) -> nn.Module:
        """An untrained network by name, a teacher of the bench by name, or a model folder."""
        folder = Path(name).expanduser()
        if folder.is_dir():
            named = architecture(folder)
            if named in (*ENCODERS, *VISION_OF) or "ImageClassification" not in named:
                return ImageEncoder.load(folder).network
            network: Any = ImageClassifier.load(folder).network
            if (pixels := pixels_of(network)) is not None:  # which its encoder alone would not pass
                network.config.image_mean, network.config.image_std = list(pixels.mean), list(pixels.std)
            return network
        if (trained := trained_teacher(name, recipe.data)) is not None:
            return trained
        if place and name in ARCHITECTURES:
            raise UserError(f"teacher {name!r} is an untrained network", cure="give a trained one's folder")
        with torch.random.fork_rng(), making():
            torch.manual_seed(mix("network", recipe.engine.seed, place))
            return make_encoder(name, self.data.shape[0], self.data.shape[-1])

    def networks(self) -> tuple[nn.Module, ...]:
        """The student's, then the teachers'."""
        return self._networks

    def teachers(self) -> Mapping[str, ImageEncoder]:
        return {n: ImageEncoder(encoder_of(t)) for n, t in zip(self.names, self._networks[1:], strict=True)}

    def student(self, network: nn.Module, sampler: Sampler) -> ImageEncoder | ImageClassifier:
        """An encoder, or a classifier where the method's last stage made one."""
        if hasattr(getattr(network, "config", None), "architectures") and "Classification" in type(network).__name__:
            return ImageClassifier(network, self.data.classes, sampler)
        return ImageEncoder(network, sampler)

    def rows(self, generator: ImageEncoder | ImageClassifier, seed: int) -> tuple[list[str], Tensor]:
        """Training images, each before those that lie nearest to it, by the cosine of their features."""
        chosen = torch.randperm(self.data.n, generator=torch.Generator().manual_seed(seed))[:1000]
        images = self.data.images(chosen)
        features = F.normalize(ImageEncoder(encoder_of(generator.network)).features(images), dim=-1)
        asked = torch.arange(min(10, len(images)))
        names = [""] * len(asked)
        if LABELS in self.data.cond and self.data.classes:
            labels = self.data.labels[chosen]
            asked = torch.stack([torch.nonzero(labels == c)[0, 0] for c in torch.unique(labels)])
            names = [self.data.classes[int(labels[i])] for i in asked]
        nearest = (features[asked] @ features.T).topk(min(COLUMNS, len(images))).indices
        return names, images[nearest]

    def measure(self, recipe: Recipe, student: ImageEncoder | ImageClassifier) -> dict[str, Any]:
        teachers = self.teachers()
        everyone = {"student": ImageEncoder(encoder_of(student.network)), **teachers}
        measured: dict[str, Any] = {
            who: {"nfe": 1, "params": parameter_count(e.network)} for who, e in everyone.items()
        }
        kind = "classify" if isinstance(student, ImageClassifier) else "encode"
        facts: dict[str, Any] = {"task": kind, **measured}
        if recipe.evaluate.n == 0:
            return facts
        say("timing the encoders")
        row = self.data.images(slice(1))
        for who, encoder in everyone.items():
            measured[who] |= sampling_cost(encoder, partial(_copies, encoder, row))
        bench = find_bench("encode", recipe.data, self.data)
        if bench is None:
            return facts
        found = bench.compare({"student": student, **teachers}, recipe.evaluate.n, recipe.evaluate.seed)
        return facts | found | {"score_names": {score["key"]: score["name"] for score in found["metrics"]}}


def _copies(encoder: ImageEncoder, row: Tensor, batch: int) -> Tensor:
    return encoder.features(row.expand(batch, -1, -1, -1))
