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


def mix_images(images: Tensor, targets: Tensor, draw: Draws, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Images ``[B, C, H, W]`` and their soft labels ``[B, classes]``, each mixed with its neighbour in the batch: by
    mixup (arXiv 1710.09412), ``lambda`` from Beta(mixup, mixup), or by a rectangle (arXiv 1905.04899), ``lambda`` from
    Beta(cutmix, cutmix) and then the share that is left outside it. Which of them is drawn for the batch where both
    are above 0; labels are mixed as the images are."""
    from scipy.stats import beta

    if not (mixup or cutmix):
        return images, targets
    rectangle = bool(cutmix) and (not mixup or draw.index(2) == 1)
    law = cutmix if rectangle else mixup
    share = float(beta.ppf((draw.index(2**20) + 0.5) / 2**20, law, law))
    if rectangle:
        height, width = images.shape[-2:]
        half_h, half_w = (side * (1 - share) ** 0.5 / 2 for side in (height, width))
        y, x = draw.index(height), draw.index(width)
        top, bottom = max(0, round(y - half_h)), min(height, round(y + half_h))
        left, right = max(0, round(x - half_w)), min(width, round(x + half_w))
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = share * images + (1 - share) * images.roll(1, 0)
    return mixed, share * targets + (1 - share) * targets.roll(1, 0)
