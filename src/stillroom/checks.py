"""Checks of tensors' values that can wait: to look at a value at once, the host must wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Waiting = list[tuple[Tensor, Exception]]
_open: list[Waiting] = []


def require(holds: Tensor, problem: Exception) -> None:
    """Raises ``problem`` unless ``holds`` (one truth value); inside :func:`waiting`, when it is :func:`settled`."""
    if _open:
        _open[-1].append((holds.detach(), problem))
    elif not bool(holds):
        raise problem


@contextmanager
def waiting() -> Iterator[Waiting]:
    """What is required inside is collected in place of being looked at."""
    found: Waiting = []
    _open.append(found)
    try:
        yield found
    finally:
        _open.remove(found)


def all_hold(checks: Waiting) -> Tensor | None:
    """One truth value on the device that the checks are on; None where there are none."""
    return torch.stack([holds for holds, _ in checks]).all() if checks else None


def settled(checks: Waiting) -> None:
    """Raises the problem of the first that does not hold."""
    for holds, problem in checks:
        if not bool(holds):
            raise problem
