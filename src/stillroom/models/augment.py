"""Random changes of images that leave their class as it is; all randomness comes from a turn's draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from stillroom.method import Draws


def random_shift(images: Tensor, draw: Draws, pixels: int) -> Tensor:
    """Each of ``[B, C, H, W]`` moved by up to ``pixels`` up, down, left and right: padded with -1 and cropped again."""
    if not pixels:
        return images
    batch, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, value=-1.0)
    corner = (draw.uniform(batch, 2) * (2 * pixels + 1)).long().to(images.device)
    rows = corner[:, :1] + torch.arange(height, device=images.device)
    columns = corner[:, 1:] + torch.arange(width, device=images.device)
    which = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, draw: Draws, probability: float) -> Tensor:
    """Each of ``[B, C, H, W]`` mirrored left to right with this probability."""
    if not probability:
        return images
    flipped = (draw.uniform(len(images)) < probability)[:, None, None, None].to(images.device)
    return torch.where(flipped, images.flip(-1), images)


def cutmix(images: Tensor, draw: Draws, probability: float) -> Tensor:
    """With this probability, each of ``[B, C, H, W]`` with a rectangle from its neighbour in the batch (arXiv
    1905.04899), at a random place. Its sides are ``sqrt(1 - lambda)`` of the image's before they are cut off at its
    edge, lambda uniform on [0, 1] (Beta(1, 1)) and one for the batch. Only pixels are mixed: a teacher labels the
    mixture."""
    if not probability or draw.index(2**20) >= probability * 2**20:
        return images
    batch, _, height, width = images.shape
    size = torch.tensor([height, width], device=images.device)
    half = size * (1 - draw.index(2**20) / 2**20) ** 0.5 / 2
    centre = draw.uniform(batch, 2).to(images.device) * size
    low, high = (centre - half)[:, :, None, None], (centre + half)[:, :, None, None]
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    inside = (y >= low[:, 0]) & (y < high[:, 0]) & (x >= low[:, 1]) & (x < high[:, 1])
    return torch.where(inside[:, None], images.roll(1, 0), images)
