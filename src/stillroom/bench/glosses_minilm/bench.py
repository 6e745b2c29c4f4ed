"""The glosses under a real teacher: all-MiniLM-L6-v2 (6 layers x 384), fine-tuned on the labelled definitions.

There is one teacher for all seeds, fine-tuned once. Its states on the training texts are computed once too, before and
after the fine-tuning, so that a student's step costs little more than the student. All of it lies in the cache.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench import bench
from stillroom.bench.glosses.bench import LABELLED, GlossesBench, GlossesTaskBench, logits_of, once
from stillroom.bench.glosses.teachers import tune
from stillroom.cache import kept
from stillroom.data.texts import TextData, load_texts
from stillroom.data.wordnet import LEXICOGRAPHER_CLASSES
from stillroom.draws import mix
from stillroom.folders.text_networks import load_text_network, minilm_folder
from stillroom.networks.stored_encoder import StoredEncoder, StoredStates, stored_states

LENGTH = 20
"""Tokens of a text; longer ones are cut, one definition in six."""
TEXTS = 20_000
"""Training texts that are seen, all without labels."""
STUDENT = "bert-2x96"
LAYERS = (3, 6)
"""The teacher's blocks that students of two layers learn from, by the maps ``uniform`` and ``skip``."""
TUNING = {"steps": 250, "lr": 3e-4}


def minilm() -> tuple[nn.Module, Any]:
    """The encoder as it comes, with a new head for the classes, and its tokenizer. Raises UserError where it is not
    installed."""
    with torch.random.fork_rng():
        torch.manual_seed(mix("glosses", "minilm"))
        return load_text_network(minilm_folder(), len(LEXICOGRAPHER_CLASSES))


@cache
def tokenised() -> tuple[TextData, TextData]:
    """Training and test texts."""
    train, test, tokenizer = load_texts("glosses", "train"), load_texts("glosses", "test"), minilm()[1]
    order = torch.randperm(train.n, generator=torch.Generator().manual_seed(0))[:TEXTS]
    return train.take(order).tokenised(tokenizer, LENGTH), test.tokenised(tokenizer, LENGTH)


@cache
def teacher(labelled: int) -> StoredEncoder:
    """The encoder after fine-tuning on so many labelled texts (0: as it comes), with its states on the training
    texts."""
    train, name = tokenised()[0], called(labelled)
    network = minilm()[0].eval()
    if labelled:

        def make(network: nn.Module) -> None:
            torch.manual_seed(mix("glosses", "minilm", "tuned"))
            tune(network, MiniLMBench().data(labelled), int(TUNING["steps"]), TUNING["lr"])

        with torch.random.fork_rng():
            once(network, "glosses-minilm/tuned", make, name)
    found = kept(
        "glosses-minilm/states", lambda: stored_states(network, train.array, train.lengths, LAYERS),
        code=[tune, stored_states], parts=[name],
    )  # fmt: skip
    return StoredEncoder(network, LAYERS, StoredStates(train.array, train.lengths, found)).eval()


@cache
def answers(labelled: int) -> Tensor:
    """That teacher's logits on the test texts, ``[N, classes]``."""
    network = teacher(labelled).network
    answered = kept(
        "glosses-minilm/answers", lambda: {"logits": logits_of(network, tokenised()[1])}, code=[tune],
        parts=[called(labelled)],
    )  # fmt: skip
    return answered["logits"]


def called(labelled: int) -> str:
    """That teacher in words: other texts, or other tokens of them, are another teacher."""
    tuned = f"{labelled}-{TUNING['steps']}-{TUNING['lr']:g}" if labelled else "pretrained"
    digest = hashlib.sha256(b"".join(part.array.numpy().tobytes() for part in tokenised())).hexdigest()[:8]
    return f"minilm-{tuned}-{LENGTH}-{tokenised()[0].n}-{digest}"


@bench("glosses-minilm")
class MiniLMBench(GlossesBench):
    """The glosses with all-MiniLM-L6-v2 as teacher, before and after fine-tuning: 20,000 training texts, of which 2,000
    are labelled, the same for all seeds, for teacher and students alike. All networks read with MiniLM's tokenizer."""

    labelled_by = 0  # type: ignore[assignment]

    def texts(self) -> tuple[TextData, TextData]:
        return tokenised()

    def encoder(self, name: str = STUDENT) -> nn.Module:
        return super().encoder(name)

    @property
    def pretrained(self) -> nn.Module:  # type: ignore[override]
        return teacher(0)

    def tuned(self, labelled: int = LABELLED) -> nn.Module:
        return teacher(labelled)

    def logits(self, network: nn.Module) -> Tensor:
        return answers(LABELLED) if network is teacher(LABELLED) else super().logits(network)


@bench("glosses-minilm-task")
class MiniLMTaskBench(MiniLMBench, GlossesTaskBench):
    """The glosses under MiniLM for methods that begin with a fine-tuned teacher: a student and that teacher."""
