"""AdamW whose two moments take a byte each, by bitsandbytes (blockwise quantised, arXiv 2110.02861)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

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


class _CountsInTensors:
    """Keeps an optimizer's step counts as tensors, as torch's own do, so that a checkpoint holds them."""

    state: dict[torch.nn.Parameter, dict[str, Any]]

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for state in self.state.values():
            state["step"] = int(state["step"])
        super().step(closure)  # type: ignore[misc]
        for state in self.state.values():
            state["step"] = torch.tensor(float(state["step"]))
