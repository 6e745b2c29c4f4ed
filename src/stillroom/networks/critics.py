"""Critics of feature and logit distillation: networks trained beside the student and thrown away after."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.surgery.taps import as_tokens


class TokenEncoder(nn.Module):
    """Tokens ``[B, N, D]`` (or vectors ``[B, D]``) to one vector ``[B, width]``: a linear map, then one transformer
    layer (``transformer``) or a hidden layer per token (``mlp``), then the mean over the tokens that count."""

    def __init__(self, dim: int, width: int = 128, heads: int = 4, kind: Literal["transformer", "mlp"] = "transformer"):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.body: nn.Module = (
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            if kind == "transformer"
            else nn.Sequential(nn.GELU(), nn.Linear(width, width))
        )

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """``keep``: bool ``[B, N]``, True where a token counts."""
        h = self.embed(as_tokens(features))
        if keep is None:
            keep = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        if isinstance(self.body, nn.TransformerEncoderLayer):
            h = self.body(h, src_key_padding_mask=~keep.bool())
        else:
            h = self.body(h)
        weight = keep.unsqueeze(-1).to(h)
        return (weight * h).sum(1) / weight.sum(1).clamp(min=1)


class MICritic(nn.Module):
    """The critic of :func:`stillroom.losses.mutual_information.i_alpha` (Distiller, arXiv 2109.11105): separable scores
    ``f(x, y) = <g(x), h(y)> / sqrt(width)`` and a log-baseline ``log q(y)`` that starts at 0.

    x_dim, y_dim: channels of the keys x (usually the teacher) and of the anchor y (usually the student). The paper
    finds transformer critics better than MLPs.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        width: int = 128,
        heads: int = 4,
        kind: Literal["transformer", "mlp"] = "transformer",
    ) -> None:
        super().__init__()
        self.g = TokenEncoder(x_dim, width, heads, kind)
        self.h = TokenEncoder(y_dim, width, heads, kind)
        self.baseline = TokenEncoder(y_dim, width, heads, kind)
        self.log_q = nn.Linear(width, 1)
        nn.init.zeros_(self.log_q.weight)
        nn.init.zeros_(self.log_q.bias)

    def forward(
        self, x: Tensor, y: Tensor, keep_x: Tensor | None = None, keep_y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(scores [B, B], log_q [B])`` of features ``[B, N, D]``; scores of x in rows, y in columns."""
        keys, anchors = self.g(x, keep_x), self.h(y, keep_y)
        return keys @ anchors.T * keys.shape[-1] ** -0.5, self.log_q(self.baseline(y, keep_y)).squeeze(-1)


class LogitDiscriminator(nn.Module):
    """Student against teacher from logits ``[B, C]``: two logits ``[B, 2]``, (student, teacher). Linear layers
    C, C/8, C/64, 2 with ReLU between (MEAL V2, arXiv 2009.08453); below 64 classes both hidden layers have
    ``max(16, C / 8)`` units.

    final_relu: the ReLU after the last layer that MEAL V2's code has; it keeps the loss above about 0.347.
    """

    def __init__(self, classes: int, final_relu: bool = False) -> None:
        super().__init__()
        first = classes // 8 if classes >= 64 else max(16, classes // 8)
        second = max(classes // 64, 2) if classes >= 64 else first
        layers: list[nn.Module] = [
            nn.Linear(classes, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)
        ]  # fmt: skip
        self.body = nn.Sequential(*layers, *([nn.ReLU()] if final_relu else []))

    def forward(self, logits: Tensor) -> Tensor:
        return self.body(logits.float())
