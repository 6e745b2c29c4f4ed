"""Masked-autoregressive networks, text-image spaces and captioned data so small that a turn takes milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stillroom.diffusion.masking import TEXT
from stillroom.networks.mar import MAR

SIZES: dict[str, Any] = {
    "patch": 2, "width": 16, "heads": 2, "encoder_blocks": 1, "decoder_blocks": 1, "cross_blocks": 2,
    "aligner_blocks": 1, "head_width": 16, "head_blocks": 2,
}  # fmt: skip
CHANNELS, SIDE, WORDS, TEXT_WIDTH = 2, 8, 3, 5
PLACES, DIM = 16, 8


def make_mar(seed: int = 0, **settings: Any) -> MAR:
    """Nothing in it is zero, so that every part has a say. In eval mode."""
    torch.manual_seed(seed)
    defaults = {"channels": CHANNELS, "text_width": TEXT_WIDTH, "grid": (4, 4), **SIZES}
    mar = MAR(**{**defaults, **settings})
    with torch.no_grad():
        for p in mar.parameters():
            p += 0.1 * torch.randn_like(p)
    return mar.eval()


def latents(n: int, seed: int = 1, channels: int = CHANNELS, side: int = SIDE) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def texts(n: int, seed: int = 2) -> Tensor:
    return torch.randn(n, WORDS, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def random_parts(n: int, masked: int, repeats: int = 2, places: int = PLACES, seed: int = 3) -> dict[str, Any]:
    """What a training step draws."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "order": torch.rand(n, places, generator=generator).argsort(1),
        "masked": masked,
        "t": torch.randint(1000, (n, repeats, masked), generator=generator),
        "eps": torch.randn(n, repeats, masked, DIM, generator=generator),
    }


class Codec:
    """An autoencoder that halves nothing: latents are images' first channels."""

    channels, factor = CHANNELS, 1

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def to(self, device: Any) -> Codec:
        return self

    def decode(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.clone(), torch.full_like(images, 0.1)


def space(side: int = SIDE) -> Any:
    return SimpleNamespace(codec=Codec(), text=SimpleNamespace(width=TEXT_WIDTH, length=WORDS), size=(side, side))


class Captioned:
    """Data as ``stillroom.tasks.text_images.data.CaptionedData`` serves it."""

    def __init__(self, n: int = 12, seed: int = 4, side: int = SIDE, mirror: bool = False, parts: Any = None) -> None:
        self.mean = latents(n, seed, side=side).half()
        self.std = torch.full_like(self.mean, 0.1)
        self.mirror = mirror
        self.text: Mapping[str, Tensor] = {TEXT: texts(5, seed)}
        self.which, self.captions = torch.arange(n) % 5, [f"caption {i}" for i in range(5)]
        self.n, self.shape, self.parts = n, (CHANNELS, side, side), dict(parts or {})
        self.made: Mapping[str, Tensor] = {}  # what a method makes of them

    def rows(self, index: Tensor) -> dict[str, Any]:
        found = {
            "x": self.mean[index].float(),
            "std": self.std[index].float(),
            "index": index,
            "cond": {TEXT: self.text[TEXT][self.which[index]]},
        }
        if self.mirror:
            found |= {"mirrored": found["x"].flip(-1), "mirrored_std": found["std"]}
        return found

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return self.rows(torch.randint(self.n, (size,), generator=generator)[rows])
