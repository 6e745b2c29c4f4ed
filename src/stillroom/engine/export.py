"""Plain copies of a role, with other weights or without any, also of one that is sharded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.engine import precision
from stillroom.engine.distributed import full
from stillroom.method import Method


class Outline:
    """A copy of ``role`` whose parameters are empty; take it before the role is sharded."""

    def __init__(self, method: Method, role: nn.Module) -> None:
        names = {id(p): name for name, p in method.named_parameters()}
        self.names = [names[id(p)] for p in role.parameters()]
        self.module = _copy(role, [torch.empty_like(p, device="meta") for p in role.parameters()])

    def filled(self, values: Mapping[str, Tensor], role: nn.Module, share: bool = False) -> nn.Module:
        """The network with ``values`` (by the method's parameter names) and the buffers that ``role`` has now, in eval
        mode. share: values stay the same tensors, which takes no memory. Collective where values are sharded."""
        found = (full(values[name].detach()) for name in self.names)
        copied = _copy(self.module, [value if share else value.clone() for value in found])
        for mine, theirs in zip(copied.buffers(), role.buffers(), strict=True):
            mine.copy_(theirs)
        return precision.without_hooks(copied).eval()


def _copy(module: nn.Module, values: list[Tensor]) -> nn.Module:
    memo: dict[int, Any] = {
        id(p): nn.Parameter(value, requires_grad=False) for p, value in zip(module.parameters(), values, strict=True)
    }
    return copy.deepcopy(module, memo)
