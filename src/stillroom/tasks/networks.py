"""What tasks share whose student and teachers are plain networks: how these are named, how classifiers are scored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.data.labels import nameless, places
from stillroom.data.source import HOLDOUT, ArrayData
from stillroom.draws import mix
from stillroom.errors import UserError
from stillroom.evaluation.classifiers import ACCURACY, CLASSIFICATION, PAIR, classification_scores, pair_scores
from stillroom.folders.image_networks import class_names
from stillroom.folders.shipped import SHIPPED
from stillroom.networks.recognition import ForwardPass
from stillroom.recipe import Recipe
from stillroom.surgery.outputs import reorder_outputs
from stillroom.task import NOTHING, Model, Task, model_home, say, told
from stillroom.tasks.words import listed


class NetworkTask(Task):
    """A network is trained, beside any number of teachers. ``student`` names it, untrained or by folder; where it names
    none, the student begins as a copy of the first teacher."""

    several = True
    data: Any
    own: nn.Module
    taught: dict[str, nn.Module]

    def read(self, name: str, place: int, recipe: Recipe) -> nn.Module:
        """The network of this name: the student's at ``place`` 0, else a teacher's. New weights are drawn from torch's
        generator. Raises UserError."""
        raise NotImplementedError

    def bare(self, given: Any) -> nn.Module:
        """The network of what was given as an object. Default: that itself."""
        return given

    def called(self, names: Sequence[str]) -> list[str]:
        """What tables and files call teachers of these names."""
        return [f"teacher-{i}" for i in range(1, len(names) + 1)]

    def read_networks(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """``own`` and ``taught`` from the recipe or from objects. Raises UserError for a student that nothing names."""
        names = listed(recipe.teacher)
        if "teacher" in given:
            objects = given["teacher"]
            networks = [self.bare(one) for one in (objects if isinstance(objects, list | tuple) else [objects])]
            names = [recipe.teacher] * len(networks)
        else:
            networks = [self._read(name, place, recipe) for place, name in enumerate(names, start=1)]
        self.taught = dict(zip(self.called(names), networks, strict=True))
        self.names = dict(zip(self.taught, names, strict=True))  # as they were given, for messages
        if "student" in given:
            self.own = self.bare(given["student"])
        elif recipe.student:
            self.own = self._read(recipe.student, 0, recipe)
        elif networks:
            self.own = copy.deepcopy(networks[0])
        else:
            raise UserError(
                f"method {recipe.method!r} has no network to train", cure="name one: student=NAME, or a model folder"
            )

    def _read(self, name: str, place: int, recipe: Recipe) -> nn.Module:
        """With torch's random state set by the recipe's seed and the place, from which new weights follow."""
        with torch.random.fork_rng():
            torch.manual_seed(mix("network", recipe.engine.seed, place))
            return self.read(name, place, recipe)

    def everyone(self, recipe: Recipe) -> list[tuple[str, nn.Module]]:
        """Student and teachers, each by what the recipe calls it."""
        student = recipe.student or (recipe.teacher if self.taught else "(in memory)")
        return [(student, self.own), *((self.names[who], network) for who, network in self.taught.items())]

    def given(self) -> Mapping[str, Any]:
        teachers = list(self.taught.values())
        found = {"student": self.own, "teachers": teachers, "classes": list(self.data.classes)}
        return found | ({"teacher": teachers[0]} if len(teachers) == 1 else {})

    def teachers(self) -> Mapping[str, Model]:
        """Those that were named, or those that the method has made instead."""
        return {who: self.student(network, ForwardPass()) for who, network in (self.made or self.taught).items()}


class Recognition(NetworkTask):
    """What classifiers of images and of texts share: checks, costs and scores. The last teacher is the one that the
    pair's scores compare the student with."""

    test: Any
    things: ClassVar[str]
    _said: dict[int, tuple[str, list[str]]]
    _order: list[int]  # where each class of the data, as they were read, stands now

    def by_network(self, source: Any, recipe: Recipe, given: Mapping[str, Any]) -> Any:
        """The data with their classes in the order of the first trained network that names its own, teachers before the
        student, matched by name. Raises UserError for a class that this network does not have."""
        self._said = self._outputs(recipe, given)
        self._order = list(range(len(source.classes)))
        fit = [self._said[place] for place in sorted(self._said, key=lambda place: place or len(self._said) + 1)]
        fit = [(name, names) for name, names in fit if len(names) == len(source.classes)]
        for name, names in sorted(fit, key=lambda one: nameless(one[1]))[:1]:
            whose = f"the classes of network {name!r}"
            self._order = places(source.classes, names, whose)
            source = source.by_names(names, whose)
        return source

    def _outputs(self, recipe: Recipe, given: Mapping[str, Any]) -> dict[int, tuple[str, list[str]]]:
        """Trained networks by place (the student's 0, the teachers' from 1): how each is called, and its classes."""
        taught = given.get("teacher", listed(recipe.teacher))
        taught = list(taught) if isinstance(taught, list | tuple) else [taught]
        everyone = dict(enumerate(taught, start=1))
        if (student := given.get("student", recipe.student or everyone.get(1))) is not None:
            everyone[0] = student
        found = {}
        for place, one in everyone.items():
            if not isinstance(one, str):
                found[place] = (recipe.teacher if place else recipe.student or recipe.teacher, class_names(one))
            elif (one in SHIPPED or Path(one).expanduser().is_dir()) and self.model.holds(home := model_home(one)):
                found[place] = (one, class_names(home))
        return found

    def align(self, recipe: Recipe, given: Mapping[str, Any], ask: Callable[[nn.Module], Tensor]) -> None:
        """Let networks that have the data's classes in another order answer in that of the data.

        ask: a network's logits for some input. Raises UserError for a network in whose weights that cannot be done, and
        for one that was given as an object.
        """
        mine = self.data.classes
        for place, (name, network) in enumerate(self.everyone(recipe)):
            _, theirs = self._said.get(place, ("", []))
            if len(theirs) != len(mine):
                continue
            if nameless(theirs) and set(theirs) != set(mine):  # its outputs follow the data as they were read
                order = [self._order.index(i) for i in range(len(mine))]
            else:
                order = places(mine, theirs, f"the classes of network {name!r}")
            if order == list(range(len(mine))) or any(value.is_meta for value in network.parameters()):
                continue
            if ("teacher" if place else "student") in given or not reorder_outputs(network, order, ask):
                raise UserError(
                    f"network {name!r} has its classes in another order than the first one",
                    cure="give networks of one order",
                )
            config: Any = network.config
            config.id2label = dict(enumerate(mine))
            config.label2id = {label: i for i, label in enumerate(mine)}

    def ask(self, classifier: Any, data: Any, rows: slice) -> Tensor:
        """The classifier's probabilities on these rows of the data, ``[N, classes]``."""
        raise NotImplementedError

    def brief_scores(self, recipe: Recipe, student: Model, bench: Any = None) -> None:
        """One row of the test split is asked about."""
        if self.test is not None:
            self.ask(student, self.test, slice(1))

    def scores(self, recipe: Recipe, everyone: Mapping[str, Model], bench: Any = None) -> dict[str, Any]:
        """On the test split; nothing where there is none."""
        if self.test is None:
            return {}
        n = min(recipe.evaluate.n, self.test.n)
        say(f"classifying {n:,} test {self.things}")
        found = {who: self.ask(classifier, self.test, slice(n)) for who, classifier in everyone.items()}
        values = {who: classification_scores(p, self.test.labels[:n]) for who, p in found.items()}
        shown = (ACCURACY, *CLASSIFICATION)
        if len(found) > 1:
            values["student"] |= pair_scores(found["student"], found[list(found)[-1]])
            shown += PAIR
        return told(shown, values, n=n, reference=f"{n:,} test {self.things} ({self.test.origin})")


def check_images(data: ArrayData, name: str) -> tuple[int, int, int]:
    """Channels, height and width. Raises UserError for data of other things, by the ``name`` that the user gave."""
    if len(data.shape) != 3:
        raise UserError(
            f"data {name!r} holds rows of shape {list(data.shape)}, no images", cure="give images [N, C, H, W]"
        )
    channels, height, width = data.shape
    return channels, height, width


def split_rows(n: int, name: str, things: str) -> tuple[Tensor, Tensor]:
    """Row numbers that train, and those held out: every fifth. Raises UserError for too few, by the ``name`` that the
    user gave to these ``things``."""
    if n < HOLDOUT:
        raise UserError(
            f"data {name!r} has {n} {things} to train on, too few: every fifth is held out to choose by",
            cure=f"give at least {HOLDOUT}, better many of each class",
        )
    held_out = torch.arange(n) % HOLDOUT == HOLDOUT - 1
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]
