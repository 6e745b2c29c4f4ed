"""A small network for points and vectors: the denoiser of the mechanism-level proofs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond


class PointMLP(nn.Module):
    """``x [B, dim]``, time ``[B]`` (as the process feeds it) and a class label ``[B]`` to ``[B, dim]``.

    Time enters through sinusoidal features of ``time * time_scale``; the label through an embedding whose last row is
    the null label. Blocks are residual, so that a block in the middle can be tapped.
    """

    def __init__(
        self, dim: int = 2, width: int = 128, depth: int = 3, classes: int = 8, time_scale: float = 1e-3
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "_class_name": "PointMLP", "dim": dim, "width": width, "depth": depth, "classes": classes,
            "time_scale": time_scale,
        }  # fmt: skip
        self.time_scale = time_scale
        frequencies = 2 * math.pi * torch.logspace(-1, 1.2, 16)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed_x = nn.Linear(dim, width)
        self.embed_t = nn.Linear(32, width)
        self.embed_label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, dim)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        angles = (time * self.time_scale)[:, None] * self.frequencies
        h = self.embed_x(x) + self.embed_t(torch.cat([angles.sin(), angles.cos()], -1).to(x))
        label = cond.get("label")
        if label is not None:
            h = h + self.embed_label(label)
        for block in self.blocks:
            h = block(h)
        return self.out(nn.functional.silu(h))


class Block(nn.Module):
    """``h + to_v(silu(to_q(silu(h))))``; the two linears carry the usual LoRA target names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.to_v(nn.functional.silu(self.to_q(nn.functional.silu(h))))
