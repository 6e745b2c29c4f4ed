"""Masked autoencoders of transformers (``ViTMAEModel``, ``ViTMAEForPreTraining``) under masks that come from outside,
so that two networks can share one (arXiv 2111.06377)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from stillroom.errors import UserError, nearest, reading
from stillroom.folders.transformers_layout import config_from_file
from stillroom.surgery.taps import block_paths

T = TypeVar("T", bound=Tensor)

ARCHITECTURES: dict[str, tuple[int, int, int, int, int, int]] = {
    "mae-nano": (48, 4, 4, 32, 2, 4),
    "mae-mini": (64, 6, 4, 32, 2, 4),
    "mae-micro": (96, 6, 4, 64, 4, 4),
    "mae-tiny": (192, 12, 3, 128, 4, 4),
    "mae-small": (384, 12, 6, 256, 4, 8),
    "mae-base": (768, 12, 12, 512, 8, 16),
    "mae-large": (1024, 24, 16, 512, 8, 16),
}
"""Untrained networks by name: width, blocks and heads of the encoder, then of the decoder."""


class Masking(NamedTuple):
    """``ids_keep [B, K]``: patches that stay, in the order in which the encoder sees them. ``ids_restore [B, N]``: the
    place of each patch among first the kept, then the removed ones. ``mask [B, N]``, bool: True = removed."""

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def masking(noise: Tensor, ratio: float) -> Masking:
    """The mask that removes the share ``ratio`` of ``N`` patches: the ``floor(N (1 - ratio))`` of the least ``noise
    [B, N]`` stay. Raises UserError where none would."""
    patches = noise.shape[1]
    kept = int(patches * (1 - ratio) + 1e-6)  # 25 (1 - 0.92) is 1.9999...
    if not 1 <= kept <= patches:
        raise UserError(
            f"a mask ratio of {ratio} leaves {kept} of {patches} patches", cure="choose one in [0, 1 - 1 / patches]"
        )
    shuffled = noise.argsort(1)
    restore = shuffled.argsort(1)
    return Masking(shuffled[:, :kept], restore, restore >= kept)


def encode(network: nn.Module, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
    """Tokens ``[B, 1 + K, D]`` after the last layer norm of an encoder: its class token, then the patches ``ids_keep``
    in that order; by default all of them in reading order. Images are ``[B, C, H, W]`` in [-1, 1].

    Blocks are read by taps on ``network`` while this runs. Raises UserError for an encoder that cannot leave patches
    out.
    """
    images = own_pixels(network, images)
    if not is_masked(network):
        if ids_keep is not None:
            raise UserError(
                f"{type(network).__name__} cannot leave patches out",
                cure="the student is a ViTMAEModel of transformers",
            )
        hidden = network(images).last_hidden_state
        return torch.cat([hidden[:, :1], hidden[:, hidden.shape[1] - patch_count(network) :]], 1)
    batch, patches = images.shape[0], patch_count(network)  # len() would fix the batch of an exported encoder
    if ids_keep is None:
        ids_keep = torch.arange(patches, device=images.device).expand(batch, -1)
    kept = ids_keep.shape[1]
    rank = torch.full((batch, patches), float(kept), device=images.device)
    rank.scatter_(1, ids_keep, torch.arange(kept, device=images.device).float().expand(batch, -1))
    with _keeping(network, kept, patches):
        return network(images, noise=rank).last_hidden_state


@contextmanager
def _keeping(network: Any, kept: int, patches: int) -> Iterator[None]:
    """transformers reads the share of removed patches from the config; it is put back afterwards."""
    usual = network.config.mask_ratio
    network.config.mask_ratio = 1 - (kept + 0.5) / patches
    try:
        yield
    finally:
        network.config.mask_ratio = usual


def decode(decoder: nn.Module, latent: Tensor, ids_restore: Tensor) -> Tensor:
    """Pixels ``[B, N, P * P * C]`` of all patches from the tokens ``[B, 1 + K, D]`` of the visible ones."""
    return decoder(latent, ids_restore).logits


def patchify(images: Tensor, patch: int) -> Tensor:
    """``[B, C, H, W]`` as ``[B, N, P * P * C]``, in the order of transformers' decoder."""
    tiles = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, H/P, W/P, P, P]
    return tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


# --- what a network is ------------------------------------------------------------------------------------------------
def is_masked(network: nn.Module) -> bool:
    """Whether it is an encoder that can leave patches out."""
    from transformers import ViTMAEModel

    return isinstance(network, ViTMAEModel)


def require_decoder(network: nn.Module, who: str) -> Any:
    """The network as a masked autoencoder. Raises UserError for one without a decoder."""
    from transformers import ViTMAEForPreTraining

    if not isinstance(network, ViTMAEForPreTraining):
        raise UserError(
            f"the {who} is a {type(network).__name__}, which has no decoder",
            cure="give a ViTMAEForPreTraining of transformers",
        )
    return network


def patch_count(network: Any) -> int:
    """How many patches an encoder cuts an image into."""
    config = network.config
    return (config.image_size // config.patch_size) ** 2


def same_patches(*networks: Any) -> None:
    """Raises UserError unless all cut images alike, so that their tokens stand for the same patches."""
    cuts = {(n.config.image_size, n.config.patch_size, n.config.num_channels) for n in networks}
    if len(cuts) > 1:
        listed = "; ".join(f"{size} pixels, patches of {patch}, {c} channels" for size, patch, c in sorted(cuts))
        raise UserError(f"the networks cut images differently: {listed}", cure="give a student the teacher's patches")


def own_pixels(network: Any, images: Tensor) -> Tensor:
    """Images in [-1, 1] as the network wants them: by the ``image_mean`` and ``image_std`` of its processor, which are
    kept in its config (where it has none, as they are)."""
    mean = getattr(network.config, "image_mean", None)
    if mean is None:
        return images
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, network.config.image_std))
    return ((images + 1) / 2 - mean) / std


def learned(parameters: Mapping[str, T]) -> dict[str, T]:
    """Without the sine and cosine positions, which stay as they are."""
    fixed = ("position_embeddings", "decoder_pos_embed")
    return {name: p for name, p in parameters.items() if not name.endswith(fixed)}


def block(network: nn.Module, index: int, under: str = "") -> str:
    """The path of a block, counted from 0. Raises UserError for one that is not there."""
    paths = block_paths(network, under)
    if not -len(paths) <= index < len(paths):
        raise UserError(
            f"{type(network).__name__} has {len(paths)} blocks, no block {index}", cure=f"count 0 to {len(paths) - 1}"
        )
    return paths[index]


def make_encoder(name: str, channels: int, side: int) -> nn.Module:
    """An untrained masked autoencoder of :data:`ARCHITECTURES` for square images, patches of 4 pixels up to a side of
    64, of 16 above; or of the config in a JSON file. Weights of the former have standard deviation
    ``width ** -0.5``, Xavier's for a square matrix.

    Raises UserError for an unknown name and for a side that the patches do not divide.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    if name.endswith(".json"):
        file = Path(name).expanduser()
        described = config_from_file(file, num_channels=channels, image_size=side)
        if not isinstance(described, ViTMAEConfig):
            raise UserError(f"{file} is of a {described.model_type}", cure="give the config of a ViTMAEForPreTraining")
        with reading(file):
            return _with_positions(ViTMAEForPreTraining(described))
    if name not in ARCHITECTURES:
        raise UserError(
            f"no encoder {name!r}{nearest(name, ARCHITECTURES)}",
            cure=f"give a model's folder, or one of: {', '.join(ARCHITECTURES)}",
        )
    patch = 4 if side <= 64 else 16
    if side % patch:
        raise UserError(
            f"images of side {side} do not split into patches of {patch}", cure=f"use a multiple of {patch}"
        )
    width, blocks, heads, narrow, decoder_blocks, decoder_heads = ARCHITECTURES[name]
    config = ViTMAEConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=4 * width,
        decoder_hidden_size=narrow, decoder_num_hidden_layers=decoder_blocks,
        decoder_num_attention_heads=decoder_heads, decoder_intermediate_size=4 * narrow,
        image_size=side, patch_size=patch, num_channels=channels, initializer_range=width**-0.5, layer_norm_eps=1e-6,
    )  # fmt: skip
    return _with_positions(ViTMAEForPreTraining(config))


def _with_positions(network: Any) -> nn.Module:
    network.decoder.initialize_weights(patch_count(network))  # transformers 5 leaves the decoder's positions at zero
    return network
