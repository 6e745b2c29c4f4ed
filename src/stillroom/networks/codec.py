"""A frozen image autoencoder: images to normalised latents and back."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.folders.pretrained import load_pretrained
from stillroom.folders.weights import save_pretrained
from stillroom.parsing import read_json
from stillroom.surgery.freezing import frozen
from stillroom.surgery.modules import device_of, weights_hash

VAE = "vae"


class LatentCodec(nn.Module):
    """A diffusers ``AutoencoderKL`` between images in [-1, 1] and latents ``(z - shift) * scale``, of mean about 0 and
    standard deviation about 1; frozen."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = frozen(network.float())
        self.shift = float(self._config.get("shift_factor") or 0.0)
        self.scale = float(self._config["scaling_factor"])

    @property
    def _config(self) -> Any:
        return self.network.config

    @property
    def channels(self) -> int:
        """C: numbers per latent position."""
        return int(self._config["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self._config["block_out_channels"]) - 1)

    @cached_property
    def name(self) -> str:
        """``kl@1a2b3c4d``: the first eight hex digits of the weights' SHA-256."""
        return f"kl@{weights_hash(self.network)[:8]}"

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in latent positions of images of ``size`` (height, width) pixels.

        Raises UserError when the factor does not divide the size."""
        height, width = size
        if height % self.factor or width % self.factor or min(size) < 1:
            raise UserError(
                f"images of {height}x{width} pixels do not divide by the autoencoder's factor {self.factor}",
                cure=f"choose multiples of {self.factor}",
            )
        return height // self.factor, width // self.factor

    @torch.no_grad()
    def moments(self, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[B, C, h, w]`` of the normalised posterior of ``images [B, 3, H, W]`` in
        [-1, 1]. Raises UserError for sizes that the factor does not divide."""
        wanted = int(self._config["in_channels"])
        if images.ndim != 4 or images.shape[1] != wanted:
            raise UserError(
                f"the autoencoder reads images [B, {wanted}, H, W], not {list(images.shape)}", cure="convert the images"
            )
        self.grid((images.shape[2], images.shape[3]))
        device, means, stds = device_of(self.network), [], []
        for part in images.split(batch):
            posterior = self.network.encode(part.to(device)).latent_dist  # type: ignore[operator]
            means.append((posterior.mean - self.shift) * self.scale)
            stds.append(posterior.std * self.scale)
        return torch.cat(means), torch.cat(stds)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents ``[B, C, h, w]``: the posterior's mean, or with ``noise`` (unit normal, of that shape) a sample."""
        mean, std = self.moments(images)
        return mean if noise is None else mean + std * noise.to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """:meth:`pictures` without a graph."""
        return self.pictures(latents, batch)

    def pictures(self, latents: Tensor, batch: int = 64) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] from normalised latents. Raises UserError for other channel counts."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise UserError(
                f"the autoencoder reads latents [B, {self.channels}, h, w], not {list(latents.shape)}",
                cure="use the autoencoder that the latents were made with",
            )
        device = device_of(self.network)
        parts = [
            self.network.decode(part.to(device).float() / self.scale + self.shift).sample  # type: ignore[operator]
            for part in latents.split(batch)
        ]
        return torch.cat(parts).clamp(-1, 1)

    def save(self, folder: str | Path) -> None:
        """Write ``vae/`` (safetensors) into ``folder``."""
        save_pretrained(self.network, Path(folder) / VAE)

    @classmethod
    def load(cls, folder: str | Path) -> LatentCodec:
        """Read ``vae/`` of ``folder``. Raises UserError for what is missing, damaged or no ``AutoencoderKL``."""
        from diffusers import AutoencoderKL

        folder = Path(folder) / VAE
        kind = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise UserError(f"{folder} holds a {kind}", cure="give an AutoencoderKL")
        return cls(load_pretrained(AutoencoderKL, folder))
