"""Discriminator heads on the features of a denoiser."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.errors import UserError
from stillroom.surgery.taps import Tap, Taps, as_tokens, block_paths


def middle_block(network: nn.Module) -> str:
    """Path of the bottleneck: ``mid_block`` of a UNet, else the middle of the longest outermost list of blocks."""
    if getattr(network, "mid_block", None) is not None:
        return "mid_block"
    blocks = block_paths(network)
    return blocks[len(blocks) // 2]


def ask_with_features(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, path: str) -> tuple[Prediction, Tensor]:
    """The prediction and, from the same forward pass, the features at ``path``: ``[B, N, D]`` tokens."""
    with Taps(denoiser.network, {"block": Tap(path, item="last")}) as taps, taps.recording() as features:
        prediction = denoiser(x_t, t, cond)
    return prediction, as_tokens(features.calls("block")[0])


class DiscriminatorHead(nn.Module):
    """Logits of real against generated from tokens ``[B, N, D]``.

    kind ``mlp``: norm, then a small MLP per token, one logit per token ``[B, N]`` (the transformer counterpart of
    DMD2's convolutional head). kind ``mean``: no parameters, the mean over channels of the token, ``[B, N]``
    (SiDA's head, arXiv 2410.14919).
    """

    def __init__(self, width: int, kind: Literal["mlp", "mean"] = "mlp", hidden: int = 128) -> None:
        super().__init__()
        self.kind = kind
        if kind == "mlp":
            self.body = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, 1),
            )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens).squeeze(-1) if self.kind == "mlp" else tokens.float().mean(-1)


class Discriminator(nn.Module):
    """A head on one block of a denoiser. The denoiser is not owned (it is the fake score or the teacher): the caller's
    turn says whether its weights move."""

    def __init__(self, denoiser: Denoiser, block: str = "", kind: Literal["mlp", "mean"] = "mlp") -> None:
        super().__init__()
        self.path = block or middle_block(denoiser.network)
        self.head = DiscriminatorHead(feature_width(denoiser, self.path), kind)

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        """``(prediction, logits [B, N])`` from one forward pass."""
        prediction, tokens = ask_with_features(denoiser, x_t, t, cond, self.path)
        return prediction, self.head(tokens)


def feature_width(denoiser: Denoiser, path: str) -> int:
    """Channels of the tokens at ``path``, found by one dry call on zeros.

    Raises UserError when the network does not run on the denoiser's null conditions alone.
    """
    parameter = next(denoiser.parameters())
    x = torch.zeros(1, *denoiser.shape, device=parameter.device)
    cond = {k: torch.as_tensor(v, device=parameter.device).unsqueeze(0) for k, v in denoiser.null.items()}
    t = torch.full((1,), 0.5 * denoiser.process.t_max, device=parameter.device)
    try:
        with torch.no_grad():
            return ask_with_features(denoiser, x, t, cond, path)[1].shape[-1]
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"cannot try the discriminator on {type(denoiser.network).__name__}: {error}",
            cure="give the denoiser its null conditions",
        ) from error
