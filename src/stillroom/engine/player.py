"""A turn as the engine sees it: its parameters, its optimizer, its learning rate and its clipping."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stillroom.engine.distributed import DataParallel, Plain, Sharded, full, local
from stillroom.engine.eight_bit import adamw_8bit
from stillroom.errors import UserError
from stillroom.method import Method, Optim, Turn
from stillroom.values import construct


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The factor on the learning rate at ``step`` (from 0) of ``steps``: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


def clip_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients together; scales them down to ``limit`` where that is positive and exceeded."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit > 0:
        clip_grads_with_norm_(parameters, limit, norm)
    return full(norm)


class Player:
    """A turn with all that the engine adds to it: parameters, optimizer, and what to toggle when its turn comes."""

    def __init__(self, method: Method, turn: Turn, index: int, optim: Optim, names: Mapping[int, str]) -> None:
        self.turn, self.index, self.optim = turn, index, optim
        self.period = turn.period(method)
        if self.period < 1:
            raise UserError(
                f"turn {turn.name!r} would run every {self.period} steps", cure=f"set {turn.every} to 1 or more"
            )
        self.roles = turn.trains
        unique = {id(p): p for role in turn.trains for p in method.trained_parameters(role).values()}
        if not unique:
            raise UserError(f"turn {turn.name!r} has no parameters to train", cure=f"check {', '.join(turn.trains)}")
        self.parameters: dict[str, nn.Parameter] = {names[key]: p for key, p in unique.items()}
        self.trained = list(self.parameters.values())
        self.optimizer = self._make_optimizer(method)
        self.runner: Plain | DataParallel | Sharded = Plain(method, turn)
        self.modes: dict[nn.Module, bool] = {}  # which modules are in training mode during the turn
        self.statistics: list[Tensor] = []
        self.reference = 0.0  # RMS weight at the start of training
        self.norm: Tensor | None = None
        self.notes: dict[str, Tensor] = {}

    def _make_optimizer(self, method: Method) -> torch.optim.Optimizer:
        o = self.optim
        shared: dict[str, Any] = {"lr": o.lr, "weight_decay": o.weight_decay, "fused": True}
        kinds: dict[
            tuple[bool, float], list[nn.Parameter]
        ] = {}  # (whether it is spared from decay, rate) -> parameters
        for name, p in self.parameters.items():
            spared = bool(o.weight_decay) and not method.decays(name, p)
            kinds.setdefault((spared, method.rate(self.turn, name)), []).append(p)
        groups: list[Any] = [
            {"params": some, "rate": rate, **({"weight_decay": 0.0} if spared else {})}
            for (spared, rate), some in kinds.items()
        ]
        if o.name == "sgd":
            if any(hasattr(p, "full_tensor") for p in self.trained):
                del shared["fused"]  # which torch has for Adam's sharded parameters only
            return torch.optim.SGD(groups, momentum=o.betas[0], **shared)
        if o.name == "adamw8bit":
            return adamw_8bit(groups, lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps)
        kind = torch.optim.Adam if o.name == "adam" else torch.optim.AdamW
        return kind(groups, betas=o.betas, eps=o.eps, **shared)

    @torch.no_grad()
    def update(self, factor: float, want_norm: bool) -> None:
        """Sanitise and clip the gradients, step the optimizer, drop the gradients."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        if gradients:
            o = self.optim
            if o.nan_to_num > 0:
                for g in map(local, gradients):
                    torch.nan_to_num_(g, nan=0.0, posinf=o.nan_to_num, neginf=-o.nan_to_num)
            if o.clip_value > 0:
                shards = [local(g) for g in gradients]
                torch._foreach_clamp_max_(shards, o.clip_value)
                torch._foreach_clamp_min_(shards, -o.clip_value)
            if o.clip_norm > 0 or want_norm:
                self.norm = clip_norm(self.trained, o.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = o.lr * factor * group["rate"]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def weight_rms(self) -> float:
        """Root mean square of the turn's weights; NaN or inf if any weight is."""
        norms = torch._foreach_norm([p.detach() for p in self.trained])
        return float(full(torch.linalg.vector_norm(torch.stack(norms)))) / math.sqrt(
            sum(p.numel() for p in self.trained)
        )


def resolve_optim(turn: Turn, overrides: Mapping[str, Mapping[str, Any]]) -> Optim:
    """The turn's own settings, then the recipe's for "all", then the recipe's for this turn."""
    settings = {**dataclasses.asdict(turn.optim), **overrides.get("all", {}), **overrides.get(turn.name, {})}
    return construct(Optim, settings, f"engine.optim.{turn.name}.")
