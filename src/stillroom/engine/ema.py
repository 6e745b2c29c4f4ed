"""Exponential moving averages of a role's trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stillroom.engine.config import EMARule
from stillroom.engine.distributed import local


class EMA:
    """A running average of ``parameters``. Sharded parameters are averaged shard by shard."""

    def __init__(self, rule: EMARule, parameters: Mapping[str, nn.Parameter]) -> None:
        self.rule, self.parameters = rule, dict(parameters)
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, batch: int) -> None:
        """One update of the role has happened on ``batch`` images."""
        self.updates += 1
        decay = self.rule.decay_at(self.updates * batch, batch)
        averages = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], 1.0 - decay)
