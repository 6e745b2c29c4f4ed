"""Definitions of words, to be sorted into WordNet's 45 lexicographer classes: few labels, much text.

The teacher is made here, once, and kept in the cache: a small BERT learns to fill in masked words of all training texts
(MLM), and is then fine-tuned on the labelled ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench import bench
from stillroom.bench.base import Bench, given_things, only
from stillroom.bench.glosses import teachers
from stillroom.cache import kept
from stillroom.data.texts import GENERAL, NAMED, TextData, load_texts
from stillroom.diffusion.sampling import Sampler
from stillroom.draws import mix
from stillroom.errors import UserError
from stillroom.evaluation.classifiers import classification_scores, pair_scores
from stillroom.evaluation.scores import Score
from stillroom.folders.text_networks import load_tokenizer, make_encoder
from stillroom.networks.recognition import class_logits
from stillroom.tasks.classify_text.model import TextClassifier

LENGTH = 32
TEACHER, STUDENT = "bert-4x128", "bert-2x64"
LABELLED = 2000
"""Texts whose labels are seen; all 40,000 are seen without."""
FEW = 200
"""Those of a teacher that knows few."""


@cache
def tokenised() -> tuple[TextData, TextData]:
    """Training and test texts."""
    tokenizer = load_tokenizer(NAMED["glosses"])
    train, test = load_texts("glosses", "train"), load_texts("glosses", "test")
    return train.tokenised(tokenizer, LENGTH), test.tokenised(tokenizer, LENGTH)


@bench("glosses")
class GlossesBench(Bench):
    """WordNet's definitions, sorted into 45 classes by small encoders: a student, a pretrained teacher, and the same
    after fine-tuning on the labelled texts, which the seed chooses.

    ``accuracy``, ``nll`` and ``ece`` on the test texts; ``kl``: ``KL(fine-tuned teacher || student)`` in nats,
    ``agreement``: share of the same answers, both on the same held-out texts, whose labels they do not use.
    """

    task = "classify-text"
    scores = (
        Score("accuracy", "Accuracy", label="Accuracy"),
        Score("kl", "KL(teacher || student)", "lower", unit="nats"),
        Score("agreement", "Agreement with the teacher"),
        Score("nll", "Log loss", "lower", unit="nats"),
        Score("ece", "Calibration error, 15 bins", "lower"),
    )

    @property
    def labelled_by(self) -> int:
        """The seed that chooses which texts are labelled."""
        return self.seed

    def texts(self) -> tuple[TextData, TextData]:
        """Training and test texts."""
        return tokenised()

    @property
    def train(self) -> TextData:
        return self.texts()[0]

    @property
    def test(self) -> TextData:
        return self.texts()[1]

    @property
    def vocabulary(self) -> int:
        return len(self.train.tokenizer)

    def data(self, labelled: int = LABELLED) -> TextData:
        """``labelled`` texts with labels; all texts without, as the part ``general``. Raises UserError for too many."""
        if not 1 <= labelled <= self.train.n:
            raise UserError(f"there are {self.train.n:,} texts, not {labelled:,}", cure="ask for fewer")
        order = torch.randperm(self.train.n, generator=torch.Generator().manual_seed(self.labelled_by))
        found = self.train.take(order[:labelled])
        found.parts[GENERAL] = self.train.parts[GENERAL]
        return found

    # --- networks -----------------------------------------------------------------------------------------------------
    def encoder(self, name: str = STUDENT) -> nn.Module:
        """An untrained encoder with a head for the classes."""
        return make_encoder(name, self.vocabulary, len(self.train.classes))

    @cached_property
    def pretrained(self) -> nn.Module:
        """The encoder after MLM on all training texts; its head for the classes is new."""

        def make(network: nn.Module) -> None:
            teachers.pretrain(network, self.train.parts[GENERAL])

        with torch.random.fork_rng():
            torch.manual_seed(mix("glosses", "pretrained"))
            parts = (TEACHER, LENGTH, teachers.PRETRAINING, self.train.vocabulary)
            return once(self.encoder(TEACHER), "glosses/pretrained", make, *parts)

    def tuned(self, labelled: int = LABELLED) -> nn.Module:
        """The pretrained encoder, fine-tuned on the first ``labelled`` labelled texts of this seed."""
        pretrained = self.pretrained

        def make(network: nn.Module) -> None:
            network.load_state_dict(pretrained.state_dict())
            teachers.tune(network, self.data(labelled))

        with torch.random.fork_rng():
            torch.manual_seed(mix("glosses", "tuned", self.seed))
            settings = (teachers.PRETRAINING, teachers.TUNING, labelled, self.seed)
            parts = (TEACHER, LENGTH, *settings, self.train.vocabulary)
            return once(self.encoder(TEACHER), "glosses/tuned", make, *parts)

    def network(self, **wanted: Any) -> nn.Module:
        """The fine-tuned teacher."""
        only("trained network", wanted)
        return self.tuned()

    # --- what a proof asks --------------------------------------------------------------------------------------------
    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("choice of teachers", wanted)
        student = self.encoder()
        return given_things([self.pretrained, self.tuned()], student=student, classes=self.train.classes)

    def mislead(self, method: Any, data: TextData) -> TextData:
        """Every teacher reads the text of the next row instead."""

        def roll(_module: nn.Module, args: Any, inputs: dict[str, Tensor]) -> Any:
            return args, {name: value.roll(1, 0) for name, value in inputs.items()}

        for teacher in method.teachers().values():
            teacher.register_forward_pre_hook(roll, with_kwargs=True)
        return data

    def model(self, network: nn.Module, sampler: Sampler) -> TextClassifier:
        return TextClassifier(network, self.train.tokenizer, self.train.classes, self.train.shape[0], sampler)

    def draw(self, model: TextClassifier, n: int) -> Tensor:
        test = self.test
        return class_logits(model.network, {"input_ids": test.array[:n], "attention_mask": test.mask[:n]})

    def score(self, model: TextClassifier, seed: int) -> dict[str, float]:
        return self.judge(model.network, self.tuned())

    def judge(self, network: nn.Module, teacher: nn.Module | None = None) -> dict[str, float]:
        """``accuracy``, ``nll``, ``ece`` on the test texts; with a teacher also ``agreement`` and ``kl``."""
        mine = self.logits(network)
        scores = classification_scores(mine.softmax(-1), self.test.labels)
        if teacher is not None:
            scores |= pair_scores(mine.softmax(-1), self.logits(teacher).softmax(-1))
        return scores

    def logits(self, network: nn.Module) -> Tensor:
        """Of the test texts, ``[N, classes]``."""
        return logits_of(network, self.test)

    def floor(self) -> dict[str, Any]:
        """The fine-tuned teacher's own scores."""
        return {"n": self.test.n, **self.judge(self.tuned())}


@bench("glosses-task")
class GlossesTaskBench(GlossesBench):
    """WordNet's definitions for methods that begin with a fine-tuned teacher: a student and that teacher, else as the
    glosses. An arm whose student sees few labels may have the teacher ``few``, which saw the first 200 of them alone.
    """

    def given(self, teacher: str = "") -> Mapping[str, Any]:
        if teacher not in ("", "few"):
            raise UserError(f"no teacher {teacher!r}", cure="known: few; or leave it away")
        student = self.encoder()
        tuned = self.tuned(FEW) if teacher else self.tuned()
        return given_things([tuned], student=student, classes=self.train.classes)


def once(network: nn.Module, name: str, make: Any, *parts: object) -> nn.Module:
    """``network`` with the weights that ``make`` gives it, made once. name, parts: for the cache."""

    def weights() -> dict[str, Tensor]:
        make(network)
        return network.state_dict()

    network.load_state_dict(kept(name, weights, code=[teachers, make_encoder], parts=parts))
    return network.eval()


@torch.no_grad()
def logits_of(network: nn.Module, data: TextData, batch: int = 250) -> Tensor:
    """Short texts first, so that little is padded; rows come back in their order."""
    order = data.lengths.argsort(stable=True)
    parts = []
    for rows in order.split(batch):
        longest = int(data.lengths[rows].max())
        inputs = {"input_ids": data.array[rows, :longest], "attention_mask": data.mask[rows, :longest]}
        parts.append(class_logits(network, inputs).float())
    return torch.cat(parts)[order.argsort()]
