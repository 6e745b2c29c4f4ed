"""Discriminator heads on the features of a denoiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import NAME_NULL, Cond, Denoiser, Prediction
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import some_conditions
from stillroom.surgery.freezing import frozen
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


class SpectralConv(nn.Module):
    """A convolution along tokens ``[B, C, N]`` whose weight, as a matrix ``[out, in k]``, is divided by its greatest
    singular value. Power iterations start from the same vector at each call, so that nothing is remembered from one
    micro-batch to the next; ends are joined to each other."""

    start: Tensor

    def __init__(self, inputs: int, outputs: int, size: int = 1, iterations: int = 8) -> None:
        super().__init__()
        self.iterations = iterations
        self.conv = nn.Conv1d(inputs, outputs, size, padding=size // 2, padding_mode="circular")
        self.register_buffer("start", nn.functional.normalize(torch.randn(outputs), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.conv.weight.flatten(1)
        with torch.no_grad():
            left, right = self.start, nn.functional.normalize(matrix.T @ self.start, dim=0)
            for _ in range(self.iterations):
                left = nn.functional.normalize(matrix @ right, dim=0)
                right = nn.functional.normalize(matrix.T @ left, dim=0)
        weight = self.conv.weight / (left @ matrix @ right)
        assert self.conv.bias is not None
        middle = weight.shape[-1] // 2
        if not middle or x.shape[-1] == 1:  # of a single token nothing lies beside it
            return torch.einsum("oi,bin->bon", weight[..., middle], x) + self.conv.bias[:, None]
        if middle > x.shape[-1]:  # fewer tokens than the ends that are joined
            return nn.functional.conv1d(x, weight, self.conv.bias, padding=middle)
        return self.conv._conv_forward(x, weight, self.conv.bias)


class TokenConvHead(nn.Module):
    """LADD's head (arXiv 2403.12015, sec. 3; StyleGAN-T's, 2301.09515, sec. 3.2): tokens ``[B, N, D]`` to logits
    ``[B, N]`` by a convolution of size 1, a residual one of size 9 along the tokens, and one to a single channel, all
    with spectral normalisation. Norms are of each sample, and not over the batch as StyleGAN-T's."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()

        def block(inputs: int, size: int) -> nn.Sequential:
            return nn.Sequential(SpectralConv(inputs, hidden, size), nn.GroupNorm(1, hidden), nn.LeakyReLU(0.2))

        self.first, self.wide, self.last = block(width, 1), block(hidden, 9), SpectralConv(hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.first(tokens.float().transpose(1, 2))
        return self.last((h + self.wide(h)) / 2**0.5).squeeze(1)


class MapHead(nn.Module):
    """Logits ``[B, n]`` of feature maps ``[B, D, h, w]``, one for every four of their places: convolutions of size 4 at
    stride 2 and of size 3, with norms of each sample and SiLU, then one of size 1. Tokens ``[B, N, D]`` and vectors
    ``[B, D]`` are maps of width 1."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, hidden, 4, 2, 1), nn.GroupNorm(1, hidden), nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, 1, 1), nn.GroupNorm(1, hidden), nn.SiLU(), nn.Conv2d(hidden, 1, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        maps = features if features.ndim == 4 else as_tokens(features).transpose(1, 2)[..., None]
        height, width = maps.shape[-2:]
        maps = nn.functional.pad(maps, (0, width % 2, 0, height % 2), mode="replicate")  # a stride of 2 leaves none out
        return self.body(maps.float()).flatten(1)


class BlockFeatures(nn.Module):
    """What several blocks of an image encoder say: pictures ``[B, 3, H, W]`` to a list of feature maps. Frozen, with a
    graph to the pictures. blocks: module paths; none: :func:`spread_blocks`."""

    def __init__(self, encoder: nn.Module, blocks: Sequence[str] = ()) -> None:
        super().__init__()
        self.encoder = frozen(encoder)
        self.paths = list(blocks) or spread_blocks(encoder)
        self._taps = [Taps(encoder, {path: Tap(path, item="last") for path in self.paths})]

    def forward(self, pictures: Tensor) -> list[Tensor]:
        with self._taps[0].recording(early_exit=True) as features:
            self.encoder(pictures)
        return [features.calls(path)[0] for path in self.paths]


class PictureDiscriminator(nn.Module):
    """A :class:`MapHead` on each of the feature maps that a frozen ``encoder`` makes of pictures (arXiv 2511.20549).
    The encoder is not owned: its features are given to every call. pictures: some, to see how wide the maps are.

    Raises UserError for an encoder that gives no list of feature maps."""

    forward_methods: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, encoder: nn.Module, pictures: Tensor, hidden: int = 64) -> None:
        super().__init__()
        with torch.no_grad():
            found = encoder(pictures)
        if not isinstance(found, list | tuple) or not found or not all(isinstance(one, Tensor) for one in found):
            raise UserError(
                f"the encoder {type(encoder).__name__} gave a {type(found).__name__}, no list of feature maps",
                cure="let it return [B, D, h, w] or [B, N, D], one or several",
            )
        widths = [one.shape[1] if one.ndim == 4 else one.shape[-1] for one in found]
        self.heads = nn.ModuleList(MapHead(width, hidden) for width in widths)

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, n]`` of all heads."""
        return torch.cat([head(one) for head, one in zip(self.heads, features, strict=True)], 1)


def spread_blocks(network: nn.Module, count: int = 4) -> list[str]:
    """``count`` blocks of a network from early to last, fewer where it has fewer: of 20 those at 2, 8, 14 and 19 (arXiv
    2503.09641, App.)."""
    blocks = block_paths(network)
    first, last = len(blocks) // 10, len(blocks) - 1
    places = (math.ceil(first + (last - first) * i / (count - 1)) for i in range(count))
    return [blocks[i] for i in dict.fromkeys(places)]


class LatentDiscriminator(nn.Module):
    """A :class:`TokenConvHead` on each of several blocks of a frozen denoiser, which is not owned (LADD, arXiv
    2403.12015). blocks: module paths; none: :func:`spread_blocks`."""

    forward_methods: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, denoiser: Denoiser, blocks: Sequence[str] = (), hidden: int = 64) -> None:
        super().__init__()
        self.paths = list(blocks) or spread_blocks(denoiser.network)
        self._taps = [self._made(denoiser.network)]
        self.heads = nn.ModuleList(
            TokenConvHead(feature_width(denoiser, block_taps(denoiser.network, path)), hidden) for path in self.paths
        )

    def _made(self, network: nn.Module) -> Taps:
        return Taps(network, {path: Tap(path, item="last") for path in self.paths})

    def logits(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits ``[B, N]`` of all heads' tokens; the pass ends at the last of the blocks."""
        taps = next((taps for taps in self._taps if taps.network is denoiser.network), None)
        if taps is None:
            taps = self._made(denoiser.network)
            self._taps.append(taps)
        with taps.recording(early_exit=True) as features:
            denoiser.native(x_t, t, cond)
        found = [head(as_tokens(features.calls(path)[0])) for head, path in zip(self.heads, self.paths, strict=True)]
        return torch.cat(found, 1)

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads other networks, and does not copy those that this one reads."""
        return self.__dict__ | {"_taps": []}


class Discriminator(nn.Module):
    """A head on one block of a denoiser. The denoiser is not owned (it is the fake score or the teacher): the caller's
    turn says whether its weights move.

    The taps that read the block are made once for each network that is asked, the first with the discriminator.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, denoiser: Denoiser, block: str = "", kind: Literal["mlp", "mean"] = "mlp") -> None:
        super().__init__()
        if isinstance(denoiser.network, nn.ModuleDict):
            raise UserError(
                f"a discriminator reads a block of one network, these are {len(denoiser.network)} experts",
                cure="do without it (options.gan_weight=0)",
            )
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
