"""The worlds that proofs run in: teacher, data and scores behind one small interface."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillroom.bench.fashion import PROOF_N, FashionBench
from stillroom.bench.mixture2d import PairBench, RingBench
from stillroom.bench.tiles import TilesBench
from stillroom.data.captioned import CaptionedData
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.models.folder import ImageGenerator, load_denoiser
from stillroom.models.lora import LoraDenoiser
from stillroom.models.text_image import TextImageGenerator, TextImageSpace

Scores = dict[str, Any]


class World(Protocol):
    """A fixed teacher, its data, and what is measured."""

    name: str
    metrics: tuple[str, ...]

    def teacher(self) -> Any:
        """What a method's ``build`` is given."""

    def data(self, **wanted: Any) -> Any:
        """What an arm learns from; ``wanted`` is the arm's own ``data``."""

    def mislead(self, method: Any, data: Any) -> Any:
        """The data of an arm whose teacher is ``shuffled``; a teacher that the method holds is spoilt in place."""

    def worst(self, metric: str) -> float:
        """What an arm whose training diverged is given, so that it loses every comparison."""

    def generator(self, network: Any, sampler: Sampler) -> Any:
        """A trained network, or a teacher, with its sampler."""

    def draw(self, generator: Any, n: int) -> Tensor:
        """``n`` samples, to be timed."""

    def score(self, generator: Any, seed: int) -> Scores: ...
    def floor(self) -> Scores: ...


class LabelWorld:
    """A shipped denoiser that draws classes, and data in those classes."""

    bench: RingBench | PairBench | FashionBench

    def teacher(self) -> Denoiser:
        return load_denoiser(self.bench.teacher_dir)

    def data(self, **wanted: Any) -> ArrayData:
        if wanted:
            raise UserError(
                f"this world has one set of data, not {', '.join(wanted)}", cure="leave the arm's data away"
            )
        return self.bench.train

    def mislead(self, method: Any, data: ArrayData) -> ArrayData:
        shuffle(method.teacher)
        return data

    def worst(self, metric: str) -> float:
        return math.inf

    def generator(self, network: Denoiser, sampler: Sampler) -> ImageGenerator:
        return ImageGenerator(network.merged() if isinstance(network, LoraDenoiser) else network, sampler)

    def draw(self, generator: ImageGenerator, n: int) -> Tensor:
        denoiser = generator.denoiser
        noise, label = torch.randn(n, *denoiser.shape), {"label": torch.zeros(n, dtype=torch.long)}
        return generator.sampler.sample(denoiser, noise, label)


class PointWorld(LabelWorld):
    """Points in the plane; the teacher is a small trained network (shipped), so students can start from its weights."""

    n = 4000
    name: str
    metrics: tuple[str, ...]
    bench: RingBench | PairBench

    def score(self, generator: ImageGenerator, seed: int) -> Scores:
        labels = self.bench.labels(self.n)
        points = generator.sample(labels, seed=10_000 + seed, batch=self.n)
        return self.bench.score(points, labels)

    def floor(self) -> Scores:
        return self.bench.floor(self.n)


class RingWorld(PointWorld):
    """Eight classes on a ring, each with two modes."""

    name = "ring"
    metrics = ("ced", "in_mode", "std", "mode_balance", "class_std")

    def __init__(self) -> None:
        self.bench = RingBench()


class PairWorld(PointWorld):
    """Two overlapping classes: what guidance does."""

    name = "pair"
    metrics = ("ced", "accuracy", "shift", "std_along", "std_across")

    def __init__(self) -> None:
        self.bench = PairBench()


class FashionWorld(LabelWorld):
    """Class-conditional Fashion-MNIST; all image scores at N = 5,000 against the 10,000 test images."""

    name = "fashion"
    metrics = ("fd", "kid", "precision", "recall", "density", "coverage", "class_agreement", "class_histogram_tv")

    def __init__(self) -> None:
        self.bench = FashionBench("fashion")

    @property
    def n(self) -> int:
        return min(PROOF_N, self.bench.train.n)

    def score(self, generator: ImageGenerator, seed: int) -> Scores:
        labels = self.bench.labels(self.n)
        images = generator.sample(labels, seed=10_000 + seed)
        scores = self.bench.score(images, labels, self.n)
        return {k: v for k, v in scores.items() if isinstance(v, (int, float))}

    def floor(self) -> Scores:
        scores = self.bench.floor(self.n)
        return {k: v for k, v in scores.items() if isinstance(v, (int, float, str)) and k != "reference"}

    @cached_property
    def origin(self) -> str:
        return self.bench.train.origin


class TilesWorld:
    """One thing in one of four cells, said in four words, a fifth of whose combinations training never shows. The
    teacher is the renderer, known by its pictures alone."""

    name = "tiles"
    metrics = ("all", "one", "obj", "lr", "ud")
    n = 480

    def __init__(self) -> None:
        self.bench = TilesBench()

    def teacher(self) -> TextImageSpace:
        return self.bench.space

    def data(self, **wanted: Any) -> CaptionedData:
        return self.bench.data(**wanted)

    def mislead(self, method: Any, data: CaptionedData) -> CaptionedData:
        return mismatched(data)

    def worst(self, metric: str) -> float:
        return 0.0

    def generator(self, network: nn.Module, sampler: Sampler) -> TextImageGenerator:
        return TextImageGenerator(network, sampler, self.bench.space)

    def draw(self, generator: TextImageGenerator, n: int) -> Tensor:
        return generator.sample(self.bench.say(self.bench.asked(n)))

    def score(self, generator: TextImageGenerator, seed: int) -> Scores:
        captions = self.bench.asked(self.n)
        images = generator.sample(self.bench.say(captions), seed=10_000 + seed, batch=self.n)
        return dict(self.bench.score(images, captions))

    def floor(self) -> Scores:
        return dict(self.bench.floor(self.n))


WORLDS: dict[str, type] = {"ring": RingWorld, "pair": PairWorld, "fashion": FashionWorld, "tiles": TilesWorld}


def get_world(name: str) -> World:
    if name not in WORLDS:
        raise UserError(f"unknown proof world {name!r}", cure=f"known: {', '.join(WORLDS)}")
    return WORLDS[name]()


def shuffle(teacher: Denoiser) -> None:
    """From now on ``teacher`` is asked about class c and answers for class c + 1: a teacher that must not teach. The
    null label stays what it is."""
    classes, ask = int(teacher.null["label"]), teacher.call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        label = cond["label"]
        return ask(network, x, time, {**cond, "label": torch.where(label < classes, (label + 1) % classes, label)})

    teacher.call = call


def mismatched(data: CaptionedData) -> CaptionedData:
    """Every image of ``data`` and of its parts under the caption of an image picked at random."""
    order = torch.randperm(data.n, generator=torch.Generator().manual_seed(0))
    return CaptionedData(
        data.mean, data.captions, data.which[order], data.text, data.std, data.mirrored, data.mirrored_std,
        {name: mismatched(part) for name, part in data.parts.items()}, data.name, f"{data.origin}, captions shuffled",
    )  # fmt: skip
