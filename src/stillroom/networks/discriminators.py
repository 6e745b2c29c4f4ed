"""Discriminator heads on the features of a denoiser."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import NAME_NULL, Cond, Denoiser, Prediction
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import some_conditions
from stillroom.surgery.taps import Features, Tap, Taps, as_tokens, block_paths


def middle_block(network: nn.Module) -> str:
    """Path of the bottleneck: ``mid_block`` of a UNet, else the middle of the longest outermost list of blocks."""
    if getattr(network, "mid_block", None) is not None:
        return "mid_block"
    blocks = block_paths(network)
    return blocks[len(blocks) // 2]


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
        return self.body(tokens).squeeze(-1).float() if self.kind == "mlp" else tokens.float().mean(-1)


class Discriminator(nn.Module):
    """A head on one block of a denoiser. The denoiser is not owned (it is the fake score or the teacher): the caller's
    turn says whether its weights move.

    The taps that read the block are made once for each network that is asked, the first with the discriminator.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, denoiser: Denoiser, block: str = "", kind: Literal["mlp", "mean"] = "mlp") -> None:
        super().__init__()
        self.path = block or middle_block(denoiser.network)
        self._taps = [block_taps(denoiser.network, self.path)]
        self.head = DiscriminatorHead(feature_width(denoiser, self._taps[0]), kind)

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        """``(prediction, logits [B, N])`` from one forward pass."""
        with self._reading(denoiser).recording() as features:
            prediction = denoiser(x_t, t, cond)
        return prediction, self.head(tokens_of(features))

    def logits(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits ``[B, N]`` alone: the pass ends at the tapped block, with the numbers and gradients of the whole
        pass."""
        return self.head(tokens_at(denoiser, self._reading(denoiser), x_t, t, cond))

    def _reading(self, denoiser: Denoiser) -> Taps:
        for taps in self._taps:
            if taps.network is denoiser.network:
                return taps
        self._taps.append(block_taps(denoiser.network, self.path))
        return self._taps[-1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads other networks, and does not copy those that this one reads."""
        return self.__dict__ | {"_taps": []}


def block_taps(network: nn.Module, path: str) -> Taps:
    return Taps(network, {"block": Tap(path, item="last")})


def tokens_of(features: Features) -> Tensor:
    """``[B, N, D]`` of the block's first call."""
    return as_tokens(features.calls("block")[0])


def tokens_at(denoiser: Denoiser, taps: Taps, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The tokens ``[B, N, D]`` after the tapped block; the network runs no further."""
    # not by the denoiser's own call: an exit has to end inside what the taps know, the network
    with taps.recording(early_exit=True) as features:
        denoiser.native(x_t, t, cond)
    return tokens_of(features)


def feature_width(denoiser: Denoiser, taps: Taps) -> int:
    """Channels of the tokens after the tapped block, found by one dry call on zeros.

    Raises UserError when the network does not run on the denoiser's null conditions, or its first label, alone.
    """
    parameter = next(denoiser.parameters())
    x = torch.zeros(1, *denoiser.shape, device=parameter.device)
    cond = {k: v.to(parameter.device).unsqueeze(0) for k, v in some_conditions(denoiser).items()}
    t = torch.full((1,), 0.5 * denoiser.process.t_max, device=parameter.device)
    try:
        with torch.no_grad():
            return tokens_at(denoiser, taps, x, t, cond).shape[-1]
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"cannot try the discriminator on {type(denoiser.network).__name__}: {error}",
            cure=f"{NAME_NULL} and discriminator (options.gan_weight=0)",
        ) from error
