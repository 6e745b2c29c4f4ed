"""Benches whose teacher is a denoiser that draws classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.bench.base import Bench, given_things, only
from stillroom.bench.teach import teach_classes
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.folders.denoisers import load_denoiser
from stillroom.surgery.lora import LoraDenoiser
from stillroom.tasks.class_images.model import ImageGenerator


class ClassBench(Bench):
    """A shipped denoiser that draws classes, and data in those classes.

    n: samples for the scores of a proof, drawn ``batch`` at a time. train: the data. teacher_dir: the shipped teacher's
    folder.
    """

    task = "class-images"
    n: int
    batch = 250
    train: ArrayData
    teacher_dir: ClassVar[Path]

    def labels(self, n: int) -> Tensor:
        """``[n]`` int64: the classes to draw."""
        raise NotImplementedError

    def judge(self, samples: Tensor, labels: Tensor) -> dict[str, Any]:
        """The scores of ``samples [N, ...]`` asked for as ``labels [N]``."""
        raise NotImplementedError

    def floor_of(self, n: int) -> dict[str, Any]:
        """:meth:`judge` of ``n`` real samples."""
        raise NotImplementedError

    def network(self, **wanted: Any) -> Denoiser:
        """The teacher."""
        return load_denoiser(self.teacher_dir)

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("teacher", wanted)
        return given_things([self.network()], classes=self.train.classes)

    def data(self, **wanted: Any) -> ArrayData:
        only("set of data", wanted)
        return self.train

    def mislead(self, method: Any, data: ArrayData) -> ArrayData:
        for teacher in method.teachers().values():
            shuffle(teacher)
        return data

    def model(self, network: nn.Module, sampler: Sampler) -> ImageGenerator:
        assert isinstance(network, Denoiser)
        return ImageGenerator(network.merged() if isinstance(network, LoraDenoiser) else network, sampler)

    def draw(self, model: ImageGenerator, n: int) -> Tensor:
        noise, label = torch.randn(n, *model.denoiser.shape), {"label": torch.zeros(n, dtype=torch.long)}
        return model.sampler.sample(model.denoiser, noise, label)

    def score(self, model: ImageGenerator, seed: int) -> dict[str, Any]:
        labels = self.labels(self.n)
        found = self.judge(model.sample(labels, seed=10_000 + seed, batch=self.batch), labels)
        return {key: value for key, value in found.items() if isinstance(value, int | float)}

    def floor(self) -> dict[str, Any]:
        return {key: value for key, value in self.floor_of(self.n).items() if key != "reference"}

    def teach(
        self,
        name: str,
        out: Path | None = None,
        overrides: Sequence[str] = (),
        run_dir: Path | None = None,
        resume: bool = False,
    ) -> dict[str, Any]:
        return teach_classes(self, name, out or self.teacher_dir, overrides, run_dir, resume)


def shuffle(teacher: Denoiser) -> None:
    """From now on ``teacher`` is asked about class c and answers for class c + 1: a teacher that must not teach. The
    null label stays what it is."""
    classes, ask = int(teacher.null["label"]), teacher.call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        label = cond["label"]
        return ask(network, x, time, {**cond, "label": torch.where(label < classes, (label + 1) % classes, label)})

    teacher.call = call
