"""What classifiers of images and of texts share as tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.data.source import HOLDOUT
from stillroom.errors import UserError
from stillroom.evaluation.classifiers import classification_scores, pair_scores
from stillroom.networks.recognition import ForwardPass
from stillroom.recipe import Recipe
from stillroom.surgery.modules import parameter_count
from stillroom.tasks.base import Task, sampling_cost, say


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
