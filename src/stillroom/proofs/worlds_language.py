"""Worlds of text: WordNet's definitions, to be sorted into 45 classes by small encoders, under a small teacher that is
made here or under all-MiniLM-L6-v2."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from stillroom.bench.glosses import GlossesBench
from stillroom.bench.glosses_minilm import MiniLMGlossesBench
from stillroom.data.texts import TextData
from stillroom.diffusion.sampling import Sampler


class GlossesWorld:
    """A student, a pretrained teacher, and the same after fine-tuning on this seed's labelled texts.

    ``accuracy``, ``nll`` and ``ece`` on the test texts; ``kl``: ``KL(fine-tuned teacher || student)`` in nats,
    ``agreement``: share of the same answers, both on the same held-out texts, whose labels they do not use.
    """

    name = "glosses"
    metrics = ("accuracy", "kl", "agreement", "nll", "ece")

    def __init__(self, seed: int = 0) -> None:
        self.bench = GlossesBench(seed)

    def at(self, seed: int) -> GlossesWorld:
        return type(self)(seed)

    def teacher(self) -> tuple[nn.Module, ...]:
        return self.bench.network(), self.bench.pretrained, self.bench.tuned()

    def network(self) -> nn.Module:
        """The fine-tuned teacher."""
        return self.bench.tuned()

    def data(self, **wanted: Any) -> TextData:
        return self.bench.data(**wanted)

    def mislead(self, method: Any, data: TextData) -> TextData:
        """Every teacher reads the text of the next row instead."""

        def roll(_module: nn.Module, args: Any, inputs: dict[str, Tensor]) -> Any:
            return args, {name: value.roll(1, 0) for name, value in inputs.items()}

        for teacher in method.teachers().values():
            teacher.register_forward_pre_hook(roll, with_kwargs=True)
        return data

    def worst(self, metric: str) -> float:
        return 0.0 if metric in ("accuracy", "agreement") else math.inf

    def generator(self, network: nn.Module, sampler: Sampler) -> nn.Module:
        return network

    def draw(self, generator: nn.Module, n: int) -> Tensor:
        test = self.bench.test
        return generator(input_ids=test.array[:n], attention_mask=test.mask[:n]).logits

    def score(self, generator: nn.Module, seed: int) -> dict[str, Any]:
        return dict(self.bench.score(generator, self.bench.tuned()))

    def floor(self) -> dict[str, Any]:
        """The fine-tuned teacher's own scores."""
        return {"n": self.bench.test.n, **self.bench.score(self.bench.tuned())}


class GlossesTaskWorld(GlossesWorld):
    """The same for methods that begin with a fine-tuned teacher: a student and that teacher."""

    name = "glosses-task"

    def teacher(self) -> tuple[nn.Module, ...]:
        return self.bench.network(), self.bench.tuned()


class MiniLMWorld(GlossesWorld):
    """The same with all-MiniLM-L6-v2 as teacher, before and after fine-tuning on 2,000 definitions. All seeds have the
    same labelled texts and the same teacher."""

    name = "glosses-minilm"

    def __init__(self, seed: int = 0) -> None:
        self.bench = MiniLMGlossesBench()


class MiniLMTaskWorld(MiniLMWorld, GlossesTaskWorld):
    """The same for methods that begin with a fine-tuned teacher."""

    name = "glosses-minilm-task"
