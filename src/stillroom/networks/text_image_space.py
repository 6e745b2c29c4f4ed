"""What text-to-image teachers and students of one world share: a frozen text encoder and a frozen autoencoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.folders.denoisers import SIDE_FILE
from stillroom.folders.diffusers_networks import accepts
from stillroom.networks.codec import VAE, LatentCodec
from stillroom.networks.text_encoder import TEXT_ENCODER, TOKENIZER, TextEncoder
from stillroom.parsing import read_json

PARTS = (TEXT_ENCODER, TOKENIZER, VAE)


@dataclass
class TextImageSpace:
    """What teachers and students of one world share: words and latents. ``size``: (height, width) of images, in pixels.

    Raises UserError when the autoencoder's factor does not divide the size.
    """

    text: TextEncoder
    codec: LatentCodec
    size: tuple[int, int]

    def __post_init__(self) -> None:
        self.size = (int(self.size[0]), int(self.size[1]))
        self.codec.grid(self.size)

    @property
    def name(self) -> str:
        """Text encoder and codec by the hashes of their weights: equal names mean equal features and latents."""
        return f"{self.text.name}, {self.codec.name}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of an image's latents."""
        return (self.codec.channels, *self.codec.grid(self.size))

    def null(self, network: nn.Module) -> dict[str, Tensor]:
        """The unconditional values of those text conditions that ``network`` takes: the empty caption's."""
        return {name: rows[0].cpu() for name, rows in self.text.encode([""]).items() if accepts(network, name)}

    def to(self, device: torch.device | str) -> TextImageSpace:
        self.text.to(device)
        self.codec.to(device)
        return self

    def save(self, folder: str | Path) -> None:
        """Write ``text_encoder/``, ``tokenizer/``, ``vae/`` and ``stillroom.json`` into ``folder``."""
        self.save_parts(folder)
        (Path(folder) / SIDE_FILE).write_text(json.dumps(self.facts(), indent=2) + "\n")

    def save_parts(self, folder: str | Path) -> None:
        self.text.save(folder)
        self.codec.save(folder)

    def facts(self) -> dict[str, Any]:
        """What the parts' own folders do not tell."""
        return {"size": list(self.size), "text_length": self.text.length}

    @classmethod
    def load(cls, folder: str | Path, size: tuple[int, int] | None = None) -> TextImageSpace:
        """Read the folder of :meth:`save`, or the parts of any text-to-image model with a T5 encoder. ``size`` defaults
        to what ``stillroom.json``, else the autoencoder's config, says. Raises UserError."""
        folder = Path(folder)
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise UserError(f"{folder} has no {missing[0]}/", cure=f"a text-to-image model needs {', '.join(PARTS)}")
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else {}
        codec = LatentCodec.load(folder)
        side_length = int(codec.network.config["sample_size"])  # type: ignore[index]
        found = size or tuple(side.get("size", (side_length, side_length)))
        return cls(TextEncoder.load(folder, side.get("text_length")), codec, found)
