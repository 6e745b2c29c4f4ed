"""How the glosses' teachers are made: pretraining on masked words, then fine-tuning on labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.texts import TextData
from stillroom.networks.recognition import class_logits

PRETRAINING = {"steps": 1000, "batch": 64, "lr": 1e-3}
TUNING = {"steps": 300, "batch": 32, "lr": 5e-4}
MASKED = 0.15


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
