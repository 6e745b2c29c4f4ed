"""Freezing for good: what is frozen stays in eval mode and without gradients, also after ``method.train()``."""

from __future__ import annotations

from typing import Any


def frozen(module: Any) -> Any:
    """Freeze in place and for good: no gradients, eval mode, also after ``method.train()``. Returns the module."""
    for part in module.modules():
        part.is_frozen = True
    return module.requires_grad_(False).eval()


def unfrozen(module: Any) -> Any:
    """Undo :func:`frozen` (used on copies of a frozen teacher). Returns the module."""
    for part in module.modules():
        part.is_frozen = False
    return module.requires_grad_(True)
