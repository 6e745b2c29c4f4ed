"""Random changes of images that leave their class as it is; all randomness comes from a turn's draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from stillroom.draws import Draws


def random_shift(images: Tensor, draw: Draws, pixels: int) -> Tensor:
    """Each of ``[B, C, H, W]`` moved by up to ``pixels`` up, down, left and right: padded with -1 and cropped again."""
    return shifted(images, draw.uniform(len(images), 2), pixels) if pixels else images


def shifted(images: Tensor, uniform: Tensor, pixels: int) -> Tensor:
    """The shift that ``uniform [B, 2]`` on [0, 1) stands for."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, value=-1.0)
    corner = (uniform * (2 * pixels + 1)).long().to(images.device)
    rows = corner[:, :1] + torch.arange(height, device=images.device)
    columns = corner[:, 1:] + torch.arange(width, device=images.device)
    which = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, draw: Draws, probability: float) -> Tensor:
    """Each of ``[B, C, H, W]`` mirrored left to right with this probability."""
    return flipped(images, draw.uniform(len(images)), probability) if probability else images


def flipped(images: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """The mirroring that ``uniform [B]`` on [0, 1) stands for."""
    mirrored = (uniform < probability)[:, None, None, None].to(images.device)
    return torch.where(mirrored, images.flip(-1), images)


def moved_and_flipped(images: Tensor, draw: Draws, pixels: int, probability: float) -> Tensor:
    """:func:`random_shift`, then :func:`random_flip`."""
    return random_flip(random_shift(images, draw, pixels), draw, probability)


def cropped(images: Tensor, uniform: Tensor, least: float) -> Tensor:
    """Each of ``[B, C, H, W]`` cropped to a part of its area, uniform on [least, 1], of its own shape, at a random
    place, and resized back (bilinear). ``uniform [B, 3]`` on [0, 1): area, place down, place across."""
    u = uniform.to(images.device)
    side = (least + (1 - least) * u[:, 0]).sqrt()
    centre = (1 - side)[:, None] * (2 * u[:, 1:] - 1)
    zero = torch.zeros_like(side)
    theta = torch.stack([side, zero, centre[:, 1], zero, side, centre[:, 0]], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


VIEW = 6
"""Uniform numbers that one augmented view of an image takes."""


@dataclass(frozen=True)
class Augmentation:
    """Cropping, moving and mirroring, one after the other. crop: least share of the area that is kept (1: all of it);
    shift: pixels that images are moved by at most; flip: probability of a mirrored image."""

    crop: float = 1.0
    shift: int = 0
    flip: float = 0.0

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """The views of ``[B, C, H, W]`` that ``uniform [B, VIEW]`` on [0, 1) stands for."""
        images = cropped(images, uniform[:, :3], self.crop) if self.crop < 1 else images
        images = shifted(images, uniform[:, 3:5], self.shift) if self.shift else images
        return flipped(images, uniform[:, 5], self.flip) if self.flip else images


def numbered_views(ids: Tensor, views: Tensor, seed: int) -> Tensor:
    """``[B, VIEW]`` on [0, 1): the numbers of view ``views[b]`` of image ``ids[b]`` (int64 ``[B]``), which follow from
    image, view and seed alone (SplitMix64), so that a view can be made again without being kept."""
    counter = (ids[:, None] * 2_097_143 + views[:, None]) * 64 + torch.arange(VIEW, device=ids.device)
    z = _mixed(_mixed(torch.full_like(counter, seed)) + counter * _signed(0x9E3779B97F4A7C15))
    return (_right(z, 40).double() / 2**24).float()


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _right(z, 31)


def _right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 has no other."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def cutmix(images: Tensor, draw: Draws, probability: float) -> Tensor:
    """With this probability, each of ``[B, C, H, W]`` with a rectangle from its neighbour in the batch (arXiv
    1905.04899), at a random place. Its sides are ``sqrt(1 - lambda)`` of the image's before they are cut off at its
    edge, lambda uniform on [0, 1] (Beta(1, 1)) and one for the batch. Only pixels are mixed: a teacher labels the
    mixture."""
    return cutmix_shares(images, draw, probability)[0]


def cutmix_shares(images: Tensor, draw: Draws, probability: float) -> tuple[Tensor, Tensor]:
    """:func:`cutmix`, and the share of each image ``[B]`` that is its neighbour's: the weight of the neighbour's label
    where nobody labels the mixture."""
    if not probability or draw.index(2**20) >= probability * 2**20:
        return images, images.new_zeros(len(images))
    batch, _, height, width = images.shape
    size = torch.tensor([height, width], device=images.device)
    half = size * (1 - draw.index(2**20) / 2**20) ** 0.5 / 2
    centre = draw.uniform(batch, 2).to(images.device) * size
    low, high = (centre - half)[:, :, None, None], (centre + half)[:, :, None, None]
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    inside = (y >= low[:, 0]) & (y < high[:, 0]) & (x >= low[:, 1]) & (x < high[:, 1])
    return torch.where(inside[:, None], images.roll(1, 0), images), inside.float().mean((1, 2))


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
