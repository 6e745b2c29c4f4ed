"""What the benches of labelled images share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.augment.images import flipped, shifted
from stillroom.bench.base import Bench, given_things, only
from stillroom.cache import kept
from stillroom.data.source import LABELS, ArrayData
from stillroom.diffusion.sampling import Sampler
from stillroom.draws import mix
from stillroom.errors import UserError, nearest
from stillroom.evaluation.scores import Score
from stillroom.networks.recognition import ForwardPass, class_logits

NOISE = 0.4
"""Share of the training labels that are drawn anew, uniformly over the classes."""
CLASSES = 10


class Recogniser:
    """A classifier of images, as these benches ask it. estimates: whether its outputs estimate one-hot labels already;
    else they are logits."""

    def __init__(self, network: nn.Module, sampler: Sampler, estimates: bool = False) -> None:
        self.network, self.sampler, self.estimates = network, sampler, estimates

    def probabilities(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [-1, 1] to ``[N, classes]``."""
        outputs = self.sampler.sample(self.network, images)  # type: ignore[arg-type]
        return outputs if self.estimates else outputs.softmax(-1)


class LabelledImagesBench(Bench):
    """Images to be recognised, some of whose training labels are wrong; every seed splits and mislabels them anew.

    train: under noisy labels; clean: the same under the true ones; held_out: clean, to choose by; test.
    """

    task = "classify"
    scores = (
        Score("accuracy", "Accuracy", label="Accuracy"),
        Score("mse", "Squared error of the probabilities, over images and classes", "lower"),
    )
    train: ArrayData
    clean: ArrayData
    held_out: ArrayData
    test: ArrayData

    def split(
        self,
        images: Tensor,
        truth: Tensor,
        classes: list[str],
        pool: int,
        held_out: int,
        test: ArrayData | None = None,
    ) -> None:
        """Set the parts, of ``images [N, C, H, W]`` and true labels ``[N]``: the first ``pool`` in a random order
        train, the next ``held_out`` are held out, the rest is the test where it has no data of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(truth), generator=generator)
        redrawn = torch.rand(pool, generator=generator) < NOISE
        right = truth[order[:pool]]
        noisy = torch.where(redrawn, torch.randint(len(classes), (pool,), generator=generator), right)

        def part(rows: Tensor, labels: Tensor, what: str) -> ArrayData:
            return ArrayData(images[rows], {LABELS: labels}, classes, self.name, f"{self.name}: {len(rows):,} {what}")

        self.train = part(order[:pool], noisy, f"images, {NOISE:.0%} of the labels redrawn")
        self.clean = part(order[:pool], right, "images")
        chosen = order[pool : pool + held_out]
        self.held_out = part(chosen, truth[chosen], "held-out images")
        rest = order[pool + held_out :]
        self.test = test if test is not None else part(rest, truth[rest], "test images")

    def student(self) -> nn.Module:
        """An untrained classifier."""
        raise NotImplementedError

    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("teacher", wanted)
        return given_things([], student=self.student(), classes=self.test.classes)

    def data(self, images: int = 0) -> ArrayData:
        """The first ``images`` training images (0: all) with noisy labels, the clean held-out ones as their part
        ``heldout``. Raises UserError for more than there are."""
        return self._first(self.train, images)

    def _first(self, source: ArrayData, images: int) -> ArrayData:
        images = images or source.n
        if not 1 <= images <= source.n:
            raise UserError(f"there are {source.n} training images, not {images}", cure="ask for fewer")
        data = source.take(torch.arange(images))
        data.parts["heldout"] = self.held_out
        return data

    def mislead(self, method: Any, data: ArrayData) -> ArrayData:
        """Teachers take each class for the next."""

        def wrong(teacher: nn.Module, _: Any, output: Any) -> Any:
            if teacher.training:  # it still learns, and what it will tell the student is what counts
                return output
            if isinstance(output, Tensor):
                return output.roll(1, dims=-1)
            output.logits = output.logits.roll(1, dims=-1)
            return output

        for teacher in method.teachers().values():
            teacher.register_forward_hook(wrong)
        return data

    def model(self, network: nn.Module, sampler: Sampler) -> Recogniser:
        return Recogniser(network, sampler)

    def draw(self, model: Recogniser, n: int) -> Tensor:
        return model.probabilities(self.test.images(slice(n)))

    def score(self, model: Recogniser, seed: int) -> dict[str, float]:
        return self.judge(torch.cat([model.probabilities(part) for part in self.test.images().split(1000)]))

    def judge(self, probabilities: Tensor) -> dict[str, float]:
        """``accuracy``, and ``mse`` over images and classes, of ``[N, classes]`` for the test images."""
        truth = self.test.labels
        mse = (probabilities - F.one_hot(truth, probabilities.shape[1])).square().mean()
        return {"accuracy": float((probabilities.argmax(1) == truth).float().mean()), "mse": float(mse)}

    def floor(self) -> dict[str, Any]:
        """What is known without any training."""
        return {"n": self.test.n}


class FewLabelsBench(LabelledImagesBench):
    """The same with true labels, few of which a method uses, and teachers to choose from. kinds: their names; an arm
    that names none gets the first."""

    kinds: tuple[str, ...]

    def teacher(self, kind: str) -> nn.Module:
        """The teacher of this name. Raises UserError for an unknown one."""
        raise NotImplementedError

    def given(self, teacher: str = "") -> Mapping[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            student, teachers = self.student(), [self.teacher(teacher or self.kinds[0])]
        return given_things(teachers, student=student, classes=self.test.classes)

    def data(self, images: int = 0) -> ArrayData:
        return self._first(self.clean, images)

    def floor(self) -> dict[str, Any]:
        """The accuracy of each teacher too."""
        accuracy = {}
        for kind in self.kinds:
            found = self.score(Recogniser(self.teacher(kind), ForwardPass()), self.seed)
            accuracy[f"{kind} teacher"] = found["accuracy"]
        return super().floor() | accuracy


class EnsembleBench(LabelledImagesBench):
    """The same with teachers: three networks wider than the student, trained on the same images and the same noisy
    labels as the student will be, until their learning rate has come to nothing. An arm that names no teacher gets all
    of them (``ensemble``), one that names ``one`` the first."""

    kinds = ("ensemble", "one")
    members = 3
    training: ClassVar[dict[str, Any]]
    """Of the teachers: ``steps``, ``pixels`` and ``mirrored`` of :func:`anneal`."""

    def wide(self) -> nn.Module:
        """An untrained teacher."""
        raise NotImplementedError

    def teachers(self, kind: str = "ensemble") -> list[nn.Module]:
        """The trained teachers, made once. Raises UserError for an unknown kind."""
        if kind not in self.kinds:
            raise UserError(f"no teacher {kind!r}{nearest(kind, self.kinds)}", cure=f"known: {', '.join(self.kinds)}")
        return [self._teacher(place) for place in range(self.members if kind == "ensemble" else 1)]

    def _teacher(self, place: int) -> nn.Module:
        seed = mix(self.name, self.seed, place)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.wide()

        def make() -> dict[str, Tensor]:
            anneal(network, self.train, self.train.labels, seed, **self.training)
            return network.state_dict()

        network.load_state_dict(
            kept(f"{self.name}/teacher", make, code=[type(self)], parts=[self.train.fingerprint, self.seed, place])
        )
        return network.eval()

    def given(self, teacher: str = "ensemble") -> Mapping[str, Any]:
        return given_things(self.teachers(teacher), student=self.student(), classes=self.test.classes)

    @torch.no_grad()
    def floor(self) -> dict[str, Any]:
        """The accuracy of one teacher and of the mean of all."""
        said = [
            torch.cat([class_logits(teacher, part).softmax(-1) for part in self.test.images().split(1000)])
            for teacher in self.teachers()
        ]
        accuracy = {"one": said[0], "ensemble": torch.stack(said).mean(0)}
        found = {f"{kind} teacher": self.judge(each)["accuracy"] for kind, each in accuracy.items()}
        return super().floor() | found


@torch.enable_grad()
def anneal(
    network: nn.Module, images: ArrayData, labels: Tensor, seed: int, steps: int, pixels: int = 0, mirrored: float = 0.0
) -> None:
    """Train a classifier on ``labels [N]`` by AdamW in batches of 64, its rate falling from 2e-3 to 0 along a cosine;
    images are moved by up to so many ``pixels``, and this share of them is mirrored."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(images.n, (64,), generator=generator)
        moved = shifted(images.images(rows), torch.rand(64, 2, generator=generator), pixels)
        seen = flipped(moved, torch.rand(64, generator=generator), mirrored)
        optimizer.zero_grad()
        F.cross_entropy(class_logits(network, seen), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
