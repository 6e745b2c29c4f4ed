"""AdamW whose two moments take a byte each, by bitsandbytes (blockwise quantised, arXiv 2110.02861)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UserError


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW over parameter groups. Tensors of fewer than 4,096 weights keep full moments.

    Raises UserError without bitsandbytes, and for sharded parameters, which it cannot step.
    """
    try:
        optimizer: Any = importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError:
        raise UserError(
            "the optimizer 'adamw8bit' needs bitsandbytes", cure="pip install 'stillroom[eight-bit]', or choose adamw"
        ) from None
    if any(hasattr(p, "full_tensor") for group in groups for p in group["params"]):
        raise UserError(
            "the optimizer 'adamw8bit' cannot step the sharded weights of engine.parallel=fsdp",
            cure="choose adamw, whose moments are sharded too, or engine.parallel=ddp",
        )
    return type("AdamW8bit", (_CountsInTensors, optimizer), {})(groups, **settings)


LEAST, BLOCK = 4096, 256
"""Weights from which on a tensor's moments are quantised; weights that share a scale."""


def first_states(parameters: Iterable[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter from its first step on, by shape and type: for those who only want to
    know how much that is."""
    maps: list[Tensor] = []
    states: dict[Tensor, dict[str, Tensor]] = {}
    for p in parameters:
        with torch.no_grad():
            kind = torch.uint8 if p.numel() >= LEAST else torch.float32
            state = {key: torch.zeros_like(p, dtype=kind) for key in ("state1", "state2")}
            state["step"] = torch.zeros((), device=p.device)
            if kind == torch.uint8:
                maps = maps or [p.new_zeros(256, dtype=torch.float32) for _ in range(2)]  # one pair for all
                scales = [p.new_zeros(-(-p.numel() // BLOCK), dtype=torch.float32) for _ in range(2)]
                state |= {"qmap1": maps[0], "qmap2": maps[1], "absmax1": scales[0], "absmax2": scales[1]}
        states[p] = state
    return states


class _CountsInTensors:
    """Keeps an optimizer's step counts as tensors, as torch's own do, so that a checkpoint holds them."""

    state: dict[torch.nn.Parameter, dict[str, Any]]

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for state in self.state.values():
            state["step"] = int(state["step"])
        super().step(closure)  # type: ignore[misc]
        for state in self.state.values():
            state["step"] = torch.tensor(float(state["step"]))
