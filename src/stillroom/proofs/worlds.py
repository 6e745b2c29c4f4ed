"""The worlds that proofs run in: teacher, data and scores behind one small interface."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillroom.bench.fashion import PROOF_N, FashionBench
from stillroom.bench.mixture2d import PairBench, RingBench
from stillroom.bench.scenes import ScenesBench
from stillroom.bench.tiles import TilesBench
from stillroom.cache import cache_folder
from stillroom.data.scenes.captions import CATEGORIES, Caption, distinct_captions, mirror_breaks
from stillroom.data.scenes.pictures import scene_set
from stillroom.data.source import ASSETS, ArrayData
from stillroom.data.store import read_store
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.folders.denoisers import load_denoiser
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.proofs.worlds_encoders import (
    CanvasLabelsWorld,
    CanvasTwoWorld,
    CanvasWorld,
    FashionEncodersLabelsWorld,
    FashionEncodersWorld,
    FashionTwoWorld,
)
from stillroom.proofs.worlds_labels import DigitsWorld, FashionLabelsWorld, FashionSemiWorld, SemiDigitsWorld
from stillroom.proofs.worlds_language import GlossesTaskWorld, GlossesWorld, MiniLMTaskWorld, MiniLMWorld
from stillroom.surgery.lora import LoraDenoiser
from stillroom.synthesis import synthesize
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.text_images.data import CaptionedData, encode_images
from stillroom.tasks.text_images.model import TextImageGenerator

Scores = dict[str, Any]


class World(Protocol):
    """A fixed teacher, its data, and what is measured."""

    name: str
    metrics: tuple[str, ...]

    def at(self, seed: int) -> World:
        """The world as arms of this seed find it; itself, where the data are the same for all seeds."""

    def teacher(self) -> Any:
        """What a method's ``build`` is given, several networks as a tuple; worlds with a choice take its name."""

    def network(self, **wanted: Any) -> Any:
        """What an arm without a method runs: a teacher's own network."""

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

    bench: Any

    def at(self, seed: int) -> LabelWorld:
        return self

    def teacher(self) -> Denoiser:
        return load_denoiser(self.bench.teacher_dir)

    def network(self, **wanted: Any) -> Denoiser:
        return self.teacher()

    def data(self, **wanted: Any) -> ArrayData:
        if wanted:
            raise UserError(
                f"this world has one set of data, not {', '.join(wanted)}", cure="leave the arm's data away"
            )
        return self.bench.train

    def mislead(self, method: Any, data: ArrayData) -> ArrayData:
        for teacher in method.teachers().values():
            shuffle(teacher)
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

    def at(self, seed: int) -> TilesWorld:
        return self

    def teacher(self) -> TextImageSpace:
        return self.bench.space

    def network(self, **wanted: Any) -> nn.Module:
        raise UserError("the teacher of this world is no network", cure="give every arm a method")

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


class ScenesWorld:
    """Captions and 32x32 scenes. Students learn from what the two shipped teachers drew.

    Scores at N = 600 captions of the training grammar; ``heldout`` is the SceneEval at as many whose combinations no
    training caption names, ``sides`` the share of captions with "left" or "right" that are obeyed.
    """

    name = "scenes"
    metrics = ("sceneeval", *(f"sceneeval_{category}" for category in CATEGORIES), "sides", "heldout", "fd", "kid")
    n = 600
    teachers = ("scenes-sd3", "scenes-pixart")

    def __init__(self) -> None:
        self.bench = ScenesBench()

    @cached_property
    def space(self) -> TextImageSpace:
        return TextImageSpace.load(ASSETS / "scenes-space")

    def at(self, seed: int) -> ScenesWorld:
        return self

    def teacher(self) -> TextImageSpace:
        return self.space

    def network(self, teacher: str = teachers[0]) -> nn.Module:
        return TextImageGenerator.load(ASSETS / teacher).network

    def data(
        self,
        images: int = 2000,
        captions: int = 0,
        teachers: Sequence[str] = teachers,
        pairs: int = 0,
    ) -> CaptionedData:
        """``images`` images of the shipped store, by these teachers, each of another caption; with ``captions`` so few
        of them, each drawn ``images / captions`` times. ``pairs``: real scenes with captions, the part "pairs"."""
        folder = self._few_captions(captions, images // captions) if captions else ASSETS / "scenes-synthetic"
        store = read_store(folder)
        rows = [i for i, record in enumerate(store.records) if record["teacher"] in teachers][:images]
        if len(rows) < images:
            raise UserError(f"{folder} has {len(rows)} images by {', '.join(teachers)}", cure=f"ask for {len(rows)}")
        texts = [store.captions[i] for i in rows]
        found = encode_images(store.images[torch.tensor(rows)], texts, self.space, name=self.name)
        if pairs:
            real, asked = scene_set(pairs, PAIRS_SEED, "train")
            found.parts["pairs"] = encode_images(real, [caption.text for caption in asked], self.space)
        return found

    def _few_captions(self, captions: int, each: int) -> Path:
        """Several drawings of each of the first distinct captions, made once and kept in the cache."""
        texts = [caption.text for caption in distinct_captions(captions)]
        folder = cache_folder() / "proofs" / self.name / f"{captions}-captions-{each}-each"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
            teachers = {name: str(ASSETS / name) for name in self.teachers}
            synthesize(teachers, texts, folder, seeds=range(each), route="round-robin", resume=True, progress=False)
        return folder

    def mislead(self, method: Any, data: CaptionedData) -> CaptionedData:
        return mismatched(data)

    def worst(self, metric: str) -> float:
        return math.inf if metric in ("fd", "kid") else 0.0

    def generator(self, network: nn.Module, sampler: Sampler) -> TextImageGenerator:
        return TextImageGenerator(network, sampler, self.space)

    def draw(self, generator: TextImageGenerator, n: int) -> Tensor:
        return generator.sample(["a red three and a blue seven"] * n)

    def score(self, generator: TextImageGenerator, seed: int) -> Scores:
        def drawn(split: str) -> tuple[Tensor, list[Caption]]:
            asked = self.bench.captions(self.n, split=split)
            return generator.sample([caption.text for caption in asked], seed=10_000 + seed), asked

        images, asked = drawn("train")
        scores = {k: v for k, v in self.bench.score(images, asked).items() if isinstance(v, (int, float))}
        sided = [i for i, caption in enumerate(asked) if mirror_breaks(caption)]
        sides = self.bench.score(images[sided], [asked[i] for i in sided], distances=False)["sceneeval"]
        heldout = self.bench.score(*drawn("heldout"), distances=False)["sceneeval"]
        return scores | {"sides": sides, "heldout": heldout}

    def floor(self) -> Scores:
        found = self.bench.floor(self.n)
        return {k: v for k, v in found.items() if isinstance(v, (int, float, str)) and k != "reference"}


PAIRS_SEED = 77
"""Of the real scenes that preferences are learnt from."""

WORLDS: dict[str, type] = {
    world.name: world
    for world in (
        RingWorld,
        PairWorld,
        FashionWorld,
        TilesWorld,
        ScenesWorld,
        DigitsWorld,
        FashionLabelsWorld,
        SemiDigitsWorld,
        FashionSemiWorld,
        CanvasWorld,
        FashionEncodersWorld,
        CanvasLabelsWorld,
        FashionEncodersLabelsWorld,
        CanvasTwoWorld,
        FashionTwoWorld,
        GlossesWorld,
        GlossesTaskWorld,
        MiniLMWorld,
        MiniLMTaskWorld,
    )
}


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
