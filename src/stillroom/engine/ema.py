"""Exponential moving averages of a role's trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillroom.engine.distributed import local


@dataclass(frozen=True)
class EMARule:
    """How fast an average forgets: a fixed ``decay`` per update of the role, or a ``half_life`` in images.

    With a half-life H the decay of an update that saw B images is ``0.5 ** (B / min(H, ramp * images_seen))``, the rule
    of EDM (arXiv:2206.00364, App. F.2): early on, it forgets the initial weights faster; ``ramp = 0`` turns that off.
    """

    name: str = "ema"
    of: str = "student"
    decay: float | None = None
    half_life: float | None = None
    ramp: float = 0.05

    def decay_at(self, images_seen: int, batch: int) -> float:
        """The decay of one update; ``images_seen`` counts the images of the role's updates, this one included."""
        if self.half_life is None:
            assert self.decay is not None
            return self.decay
        half_life = min(self.half_life, self.ramp * images_seen) if self.ramp > 0 else self.half_life
        return 0.5 ** (batch / half_life)


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
