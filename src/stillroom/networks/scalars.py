"""Numbers as inputs of networks: times of either sign, guidance scales, and a variance that depends on one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ScalarFeatures(nn.Module):
    """``cos(2 pi (f s + p))`` of numbers ``s [B]`` to ``[B, width]``, with fixed ``f ~ N(0, 1)`` and ``p ~ U(0, 1)``
    (arXiv 2503.07274, sec. 3.2).

    Frequencies of order one: neighbouring times are near each other, and the derivative by time stays of order one, as
    continuous-time consistency needs it (arXiv 2503.09641, sec. 3.2). The phases tell ``-s`` from ``s``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))

    def forward(self, s: Tensor) -> Tensor:
        return torch.cos(2 * math.pi * (s[:, None] * self.frequencies + self.phases))


class ScalarEncoder(nn.Module):
    """Numbers ``[B]`` to ``[B, width]``: features, ``width -> 4 width -> width`` with ReLU, LayerNorm (as arXiv
    2503.07274's code). scale: what the numbers are multiplied by before."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.features = scale, ScalarFeatures(width)
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, s: Tensor) -> Tensor:
        return self.norm(self.body(self.features(self.scale * s)))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """``layer``, which says 0 to everything until it is trained."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class LogVariance(nn.Module):
    """The logarithm of a loss's variance as a function of time, ``[B]`` to ``[B]``; 0 at the start, where
    ``exp(-w) |error|^2 + w`` is the plain squared error (arXiv 2312.02696, eq. 14-15; 2410.11081, sec. 4)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.features, self.out = ScalarFeatures(width), zeroed(nn.Linear(width, 1))

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.features(t)).squeeze(-1)
