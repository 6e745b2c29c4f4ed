"""Definitions of words, to be sorted into WordNet's 45 lexicographer classes: few labels, much text.

The teacher is made here, once, and kept in the cache: a small BERT learns to fill in masked words of all training texts
(MLM), and is then fine-tuned on the labelled ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.cache import kept_tensors
from stillroom.data.texts import GENERAL, NAMED, TextData, load_texts
from stillroom.engine.trainer import mix
from stillroom.errors import UserError
from stillroom.evaluation.classifiers import classification_scores, pair_scores
from stillroom.folders.text_networks import load_tokenizer, make_encoder
from stillroom.networks.recognition import class_logits

LENGTH = 32
TEACHER, STUDENT = "bert-4x128", "bert-2x64"
PRETRAINING = {"steps": 1000, "batch": 64, "lr": 1e-3}
TUNING = {"steps": 300, "batch": 32, "lr": 5e-4}
LABELLED = 2000
"""Texts whose labels are seen; all 40,000 are seen without."""
MASKED = 0.15


@cache
def tokenised() -> tuple[TextData, TextData]:
    """Training and test texts."""
    tokenizer = load_tokenizer(NAMED["glosses"])
    train, test = load_texts("glosses", "train"), load_texts("glosses", "test")
    return train.tokenised(tokenizer, LENGTH), test.tokenised(tokenizer, LENGTH)


class GlossesBench:
    """``seed`` chooses which texts are labelled."""

    name = "glosses"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

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
    def classes(self) -> int:
        return len(self.train.classes)

    @property
    def vocabulary(self) -> int:
        return len(self.train.tokenizer)

    def data(self, labelled: int = LABELLED) -> TextData:
        """``labelled`` texts with labels; all texts without, as the part ``general``. Raises UserError for too many."""
        if not 1 <= labelled <= self.train.n:
            raise UserError(f"there are {self.train.n:,} texts, not {labelled:,}", cure="ask for fewer")
        order = torch.randperm(self.train.n, generator=torch.Generator().manual_seed(self.seed))
        found = self.train.take(order[:labelled])
        found.parts[GENERAL] = self.train.parts[GENERAL]
        return found

    def network(self, name: str = STUDENT) -> nn.Module:
        """An untrained encoder."""
        return make_encoder(name, self.vocabulary, self.classes)

    # --- the teachers -------------------------------------------------------------------------------------------------
    @cached_property
    def pretrained(self) -> nn.Module:
        """The encoder after MLM on all training texts; its head for the classes is new."""

        def make(network: nn.Module) -> None:
            pretrain(network, self.train.parts[GENERAL])

        with torch.random.fork_rng():
            torch.manual_seed(mix("glosses", "pretrained"))
            network = self.network(TEACHER)
            return kept(network, f"pretrained-{PRETRAINING['steps']}-{self.train.vocabulary}", make)

    def tuned(self, labelled: int = LABELLED) -> nn.Module:
        """The pretrained encoder, fine-tuned on the first ``labelled`` labelled texts of this seed."""
        pretrained = self.pretrained

        def make(network: nn.Module) -> None:
            network.load_state_dict(pretrained.state_dict())
            tune(network, self.data(labelled))

        with torch.random.fork_rng():
            torch.manual_seed(mix("glosses", "tuned", self.seed))
            name = f"tuned-{PRETRAINING['steps']}-{TUNING['steps']}-{labelled}-seed{self.seed}-{self.train.vocabulary}"
            return kept(self.network(TEACHER), name, make)

    # --- scores -------------------------------------------------------------------------------------------------------
    def logits(self, network: nn.Module) -> Tensor:
        """Of the test texts, ``[N, classes]``."""
        return logits_of(network, self.test)

    def score(self, network: nn.Module, teacher: nn.Module | None = None) -> dict[str, float]:
        """``accuracy``, ``nll``, ``ece`` on the test texts; with a teacher also ``agreement`` and ``kl``."""
        mine = self.logits(network)
        scores = classification_scores(mine.softmax(-1), self.test.labels)
        if teacher is not None:
            scores |= pair_scores(mine.softmax(-1), self.logits(teacher).softmax(-1))
        return scores


def kept(network: nn.Module, name: str, make: Callable[[nn.Module], None]) -> nn.Module:
    """``network`` with the weights that ``make`` gave it once."""

    def weights() -> dict[str, Tensor]:
        make(network)
        return network.state_dict()

    network.load_state_dict(kept_tensors(name, weights))
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


# --- making the teachers ----------------------------------------------------------------------------------------------
def pretrain(network: Any, data: Any) -> None:
    """Masked-word prediction (arXiv 1810.04805): 15% of the tokens, of which 80% are masked, 10% replaced, 10% kept."""
    from transformers import BertForMaskedLM

    config = copy.deepcopy(network.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # one pass over much text
    language = BertForMaskedLM(config)
    language.bert.load_state_dict(network.base_model.state_dict(), strict=False)  # it has no pooler
    draw, tokenizer = torch.Generator().manual_seed(0), data.tokenizer
    special = torch.tensor(tokenizer.all_special_ids)

    def loss(step: int) -> Tensor:
        batch = data.batch(0, step, int(PRETRAINING["batch"]))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        u, kind = torch.rand(ids.shape, generator=draw), torch.rand(ids.shape, generator=draw)
        chosen = (u < MASKED) & ~torch.isin(ids, special)
        random = torch.randint(len(tokenizer), ids.shape, generator=draw)
        shown = torch.where(chosen & (kind < 0.8), tokenizer.mask_token_id, ids)
        shown = torch.where(chosen & (kind >= 0.9), random, shown)
        states = language.bert(input_ids=shown, attention_mask=mask.long()).last_hidden_state
        return F.cross_entropy(language.cls(states[chosen]), ids[chosen])

    train(language, loss, int(PRETRAINING["steps"]), PRETRAINING["lr"])
    network.base_model.load_state_dict(language.bert.state_dict(), strict=False)


def tune(network: nn.Module, data: TextData, steps: int = 0, lr: float = 0.0) -> None:
    """Fine-tuning on labels by cross-entropy; steps and rate are those of ``TUNING`` where none are given."""

    def loss(step: int) -> Tensor:
        batch = data.batch(0, step, int(TUNING["batch"]))
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return F.cross_entropy(class_logits(network, inputs), batch["cond"]["label"])

    train(network, loss, steps or int(TUNING["steps"]), lr or TUNING["lr"])


def train(network: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """AdamW with a warm-up over a tenth of the steps, then linear decay."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.01)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
    )
    network.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
