"""What may be asked of any module: its size, its device, the hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def parameter_count(module: nn.Module) -> int:
    """Number of weights; a weight shared by several layers counts once, buffers do not count."""
    return sum(p.numel() for p in module.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes. Its weights may be elsewhere (``engine.offload``): then ``runs_on`` says it."""
    return getattr(module, "runs_on", None) or next(module.parameters()).device


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, all of it is in eval mode; afterwards each part is in its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def weights_hash(network: nn.Module) -> str:
    """SHA-256, in hex, over names and float32 values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
