"""Text encoders, codecs and text-to-image networks so small that a test makes them in milliseconds."""

from __future__ import annotations

from typing import Any

from torch import nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import VP, RectifiedFlow
from stillroom.diffusion.sampling import ODESampler
from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network, scheduler_config
from stillroom.networks.codec import LatentCodec
from stillroom.networks.mar import MAR
from stillroom.networks.text_encoder import TextEncoder
from stillroom.networks.text_image_space import TextImageSpace

WORDS = ("a", "and", "blue", "of", "red", "seven", "the", "three", "to", "left")


def tiny_text(width: int = 8, length: int = 8, words: tuple[str, ...] = WORDS, rows: int = 0) -> TextEncoder:
    from transformers import T5Config, T5EncoderModel

    from stillroom.bench.scenes.teach import make_tokenizer

    tokenizer = make_tokenizer(words, length)
    config = T5Config(
        vocab_size=rows or len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return TextEncoder(tokenizer, T5EncoderModel(config), length)


def tiny_codec(channels: int = 2, blocks: int = 2, **config: Any) -> LatentCodec:
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks, latent_channels=channels, norm_num_groups=2, sample_size=8,
        **{"scaling_factor": 0.7, "shift_factor": 0.2} | config,
    )  # fmt: skip
    return LatentCodec(network)


def tiny_space(size: tuple[int, int] = (8, 8)) -> TextImageSpace:
    return TextImageSpace(tiny_text(), tiny_codec(), size)


FLOW = ODESampler("euler", 3, 2.0)
SIZES = {"sample_size": 4, "patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


def sd3(width: int = 8, channels: int = 2) -> Denoiser:
    network = make_network(
        "SD3Transformer2DModel",
        {
            **SIZES, "in_channels": channels, "out_channels": channels, "joint_attention_dim": width,
            "caption_projection_dim": 16, "pooled_projection_dim": width, "pos_embed_max_size": 8,
        },
    )  # fmt: skip
    return noisy(denoiser_from_diffusers(network, scheduler_config(RectifiedFlow(), "v")))


def pixart(width: int = 8, channels: int = 2) -> Denoiser:
    network = make_network(
        "PixArtTransformer2DModel",
        {
            **SIZES, "in_channels": channels, "out_channels": channels, "cross_attention_dim": 16,
            "caption_channels": width,
        },
    )  # fmt: skip
    return noisy(denoiser_from_diffusers(network, scheduler_config(VP(), "eps")))


def mar(width: int = 8, channels: int = 2) -> MAR:
    return MAR(
        channels=channels, patch=2, grid=(2, 2), text_width=width, width=16, heads=2, encoder_blocks=1,
        decoder_blocks=1, cross_blocks=1, aligner_blocks=1, head_width=16, head_blocks=1,
    )  # fmt: skip


def noisy(network: Any) -> Any:
    """Output layers start at zero, which would hide whatever comes before them."""
    for p in network.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return network
