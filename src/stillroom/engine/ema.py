"""Exponential moving averages of a role's trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from stillroom.engine.config import EMARule
from stillroom.engine.distributed import local
from stillroom.method import Target


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


class Follower:
    """A network of the method that follows another one: ``parameters`` after those of ``leader``, in the same order."""

    def __init__(self, target: Target, parameters: Iterable[nn.Parameter], leader: Iterable[nn.Parameter]) -> None:
        self.target, self.parameters, self.leader = target, list(parameters), list(leader)
        self.updates, self._decay = 0, 0.0

    @torch.no_grad()
    def update(self) -> None:
        """One update of the leader has happened."""
        self.after(self.updates + 1)
        mine, theirs = ([local(p.detach()) for p in some] for some in (self.parameters, self.leader))
        torch._foreach_lerp_(mine, theirs, 1.0 - self._decay)

    def after(self, updates: int) -> None:
        """Count on to so many updates."""
        for _ in range(self.updates, updates):
            self._decay = self.target.decay_after(self._decay)
        self.updates = updates
