"""Pictures of the scenes world: 32x32 RGB, up to four handwritten digits in six colours on quiet grounds.

The digits are those of MNIST (:func:`~stillroom.data.source.load_data` ``"mnist"``), shrunk to 11..14 pixels; pictures
of the ``test`` split are drawn with digits that no ``train`` picture holds. What is in a picture and what captions ask
for is in :mod:`stillroom.data.scenes.captions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.data.scenes.captions import (
    CELLS,
    COLOURS,
    DIGIT_WORDS,
    Caption,
    Scene,
    Thing,
    draw_scenes,
    sample_captions,
    seeded,
)
from stillroom.data.source import load_data
from stillroom.errors import UserError, nearest

__all__ = ["COLOURS", "DIGIT_WORDS", "SHAPE", "Scene", "Thing", "mirrored", "render", "scene_set"]

SIDE = 32
SHAPE = (3, SIDE, SIDE)
CELL = SIDE // 2
SIZES = (11, 12, 13, 14)
"""Sides, in pixels, to which a digit's 20x20 box is shrunk."""
DIGIT_SPLITS = ("train", "test")
PAINT = torch.tensor(
    [[235, 45, 40], [45, 205, 70], [60, 120, 255], [250, 220, 50], [180, 70, 225], [250, 250, 250]], dtype=torch.float32
)
"""Grey levels of :data:`COLOURS`, in that order."""

_BOX = 20
_GAIN = 1.35
"""Shrinking thins the strokes; without a gain a seven's bar would all but vanish."""
_RAYS = 5
"""Plane waves in a ground of smooth noise."""


def scene_set(
    n: int, seed: int, split: str = "train", captions: Sequence[Caption] | None = None
) -> tuple[Tensor, list[Caption]]:
    """``n`` pictures, uint8 ``[n, 3, 32, 32]``, and the caption of each.

    ``split`` says whose digits are drawn: ``train`` or ``test``. ``captions``: the captions to draw, used in turn;
    without them captions of the ``train`` split are sampled, category by category evenly. The first k of n pictures
    are those of k.
    """
    if captions is None:
        asked = sample_captions(n, seeded(f"captions {seed}"), "train")
    elif not captions:
        raise UserError("no captions to draw", cure="give at least one")
    else:
        asked = [captions[i % len(captions)] for i in range(n)]
    scenes = draw_scenes(asked, seeded(f"scenes {seed} {split}"))
    return render(scenes, split, seeded(f"pictures {seed} {split}")), asked


def mirrored(scene: Scene) -> Scene:
    """The scene with left and right swapped: the places move, the digits stay readable. (Turning the *picture* round
    would mirror the handwriting too.)"""
    return Scene(tuple(Thing(t.cell ^ 1, t.digit, t.colour) for t in scene.things), scene.ground)


# --- rendering ----------------------------------------------------------------------------------------------------
def render(
    scenes: Sequence[Scene], split: str, generator: torch.Generator, warp: float = 0.0, batch: int = 1000
) -> Tensor:
    """Pictures of ``scenes``: uint8 ``[N, 3, 32, 32]``.

    Scenes say what stands in which cell and on what ground. Handwriting, size, place inside the cell and shade are
    drawn from ``generator``, picture by picture: the first k of N are those of the first k scenes. ``warp`` above 0
    bends each digit (turn, slant, stretch, waves, stroke width), for training that would else see each of a few
    thousand digits too often; 1 is strong, with digits still readable.
    """
    if split not in DIGIT_SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, DIGIT_SPLITS)}", cure="use train or test")
    parts = [_rendered(scenes[i : i + batch], split, generator, warp) for i in range(0, len(scenes), batch)]
    return torch.cat(parts) if parts else torch.zeros(0, *SHAPE, dtype=torch.uint8)


def _rendered(scenes: Sequence[Scene], split: str, generator: torch.Generator, warp: float) -> Tensor:
    n = len(scenes)
    content = np.full((n, CELLS, 2), -1)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            content[row, thing.cell] = thing.digit, thing.colour
    digit, colour = torch.from_numpy(content).unbind(2)
    hand, size, down, right, shade = torch.rand(n, CELLS, 5, generator=generator).unbind(2)

    _, first, count = _boxes(split)
    which = first[digit] + (hand * count[digit]).long()
    if warp:
        ink = _warped(split, which, size, down, right, warp, generator)
    else:
        ink = _placed(split, which, size, down, right)
    ink = ink * (digit >= 0)[..., None, None]

    paint = PAINT[colour] * (0.88 + 0.12 * shade)[..., None]
    ground = _grounds(np.array([scene.ground for scene in scenes], np.int64))
    ground = ground.view(n, 3, 2, CELL, 2, CELL).permute(0, 2, 4, 1, 3, 5).reshape(n, CELLS, 3, CELL, CELL)
    cells = torch.lerp(ground, paint[..., None, None].expand_as(ground), ink[:, :, None])
    whole = cells.view(n, 2, 2, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(n, *SHAPE)
    return whole.round().clamp(0, 255).to(torch.uint8)


def _placed(split: str, which: Tensor, size: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Ink ``[N, 4, 16, 16]`` in [0, 1] of the digits ``which [N, 4]``; ``size``, ``down``, ``right`` in [0, 1)."""
    sizes = (size * len(SIZES)).long()
    room = (CELL - torch.tensor(SIZES))[sizes] + 1
    rows = torch.arange(CELL) - (down * room).long()[..., None]
    columns = torch.arange(CELL) - (right * room).long()[..., None]
    # A sprite's last row and column are empty, so whatever lies outside it reads from there.
    rows, columns = (torch.where(place < 0, CELL - 1, place) for place in (rows, columns))
    at = sizes[..., None, None], which[..., None, None], rows[..., :, None], columns[..., None, :]
    return _sprites(split)[at].float() / 255


def _warped(
    split: str, which: Tensor, size: Tensor, down: Tensor, right: Tensor, warp: float, generator: torch.Generator
) -> Tensor:
    """:func:`_placed` with each digit bent in its own way, sampled at twice the resolution and averaged."""
    many, fine = which.numel(), 2 * CELL
    u = 2 * torch.rand(many, 8, generator=generator) - 1
    turn, slant, tall, wide, stroke = (warp * u[:, :5] * torch.tensor([0.3, 0.35, 0.16, 0.16, 0.3])).unbind(1)
    side = 10.5 + 3.7 * size.flatten()
    corner = torch.stack([right.flatten(), down.flatten()], 1) * (CELL - side)[:, None]
    pixel = (torch.arange(fine) + 0.5) / 2
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    # From a pixel of the cell to the box of the digit, whose sides are -1 and 1.
    place = 2 * (torch.stack([x, y], -1) - corner[:, None, None]) / side[:, None, None, None] - 1
    cos, sin = turn.cos(), turn.sin()
    linear = torch.stack(
        [(1 + wide) * (cos + slant * sin), (1 + wide) * (slant * cos - sin), (1 + tall) * sin, (1 + tall) * cos], 1
    )
    place = place @ linear.view(many, 1, 2, 2).mT
    knots = 2 * torch.rand(many, 2, 4, 4, generator=generator) - 1
    waves = F.interpolate(knots, size=(fine, fine), mode="bicubic", align_corners=True)
    place = place + 0.14 * warp * waves.permute(0, 2, 3, 1)
    boxes = _boxes(split)[0][which.flatten()].float()
    ink = F.avg_pool2d(F.grid_sample(boxes, place, align_corners=False), 2) / 255
    return (ink * _GAIN * (1 + stroke)[:, None, None, None]).clamp_(0, 1).view(*which.shape, CELL, CELL)


@lru_cache(maxsize=2)
def _boxes(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, uint8 ``[N, 1, 20, 20]``, sorted by class; the first row of each class; rows per class."""
    digits = load_data("mnist", split)
    counts = torch.bincount(digits.labels, minlength=10)
    sorted_digits = digits.array[digits.labels.argsort(stable=True), 0]
    return torch.stack([_boxed(image) for image in sorted_digits])[:, None], counts.cumsum(0) - counts, counts


@lru_cache(maxsize=2)
def _sprites(split: str) -> Tensor:
    """Ink of the same digits at each of the sizes, uint8 ``[sizes, N, 16, 16]``, at the top left."""
    boxes = _boxes(split)[0].float()
    table = torch.zeros(len(SIZES), len(boxes), CELL, CELL, dtype=torch.uint8)
    for i, side in enumerate(SIZES):
        small = F.interpolate(boxes, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        table[i, :, :side, :side] = (small[:, 0] * _GAIN).round().clamp(0, 255).to(torch.uint8)
    return table


def _boxed(image: Tensor) -> Tensor:
    """The 20x20 pixels around the digit. MNIST's digits fill such a box, placed in the 28x28 by centre of mass."""
    inked = image > 0
    corner = []
    for axis in (1, 0):
        lines = inked.any(axis).nonzero()
        middle = (int(lines[0]) + int(lines[-1]) + 1) // 2
        corner.append(min(max(middle - _BOX // 2, 0), len(inked) - _BOX))
    return image[corner[0] : corner[0] + _BOX, corner[1] : corner[1] + _BOX]


# --- grounds ------------------------------------------------------------------------------------------------------
def _grounds(seeds: np.ndarray) -> Tensor:
    """Grey levels, float32 ``[N, 3, 32, 32]``: dark or mid, nearly grey, plain or with a faint texture."""
    u = _uniform(seeds, 10 + 3 * _RAYS)
    kind = (u[:, 0] * len(_TEXTURES)).long()
    texture = torch.zeros(len(seeds), SIDE, SIDE)
    for which, make in enumerate(_TEXTURES):
        rows = (kind == which).nonzero()[:, 0]
        texture[rows] = make(u[rows, 6:, None, None])
    level, strength, tint = (22 + 63 * u[:, 1]), (4 + 9 * u[:, 2]), 12 * (u[:, 3:6] - 0.5)
    grey = level[:, None, None] + strength[:, None, None] * texture
    return (grey[:, None] + tint[..., None, None]).clamp_(4, 110)


_Y, _X = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")


def _plain(u: Tensor) -> Tensor:
    return torch.zeros(len(u), SIDE, SIDE)


def _gradient(u: Tensor) -> Tensor:
    angle = 2 * torch.pi * u[:, 0]
    return _X * angle.cos() + _Y * angle.sin()


def _stripes(u: Tensor) -> Tensor:
    return (3 * _wave(u, 0.0)).tanh_()


def _checker(u: Tensor) -> Tensor:
    return (4 * _wave(u, 0.0) * _wave(u, torch.pi / 2)).tanh_()


def _wave(u: Tensor, turn: float) -> Tensor:
    angle, pitch, phase = torch.pi * u[:, 0] + turn, 6 + 10 * u[:, 1], 2 * torch.pi * u[:, 2]
    return (pitch * (_X * angle.cos() + _Y * angle.sin()) + phase).sin_()


def _smooth_noise(u: Tensor) -> Tensor:
    """A sum of slow plane waves in random directions."""
    heading, length, phase = u[:, 4:].unflatten(1, (3, _RAYS)).unbind(1)
    angle = 2 * torch.pi * heading
    waves = (1 + 5 * length) * (_X * angle.cos() + _Y * angle.sin()) + 2 * torch.pi * phase
    return waves.cos_().sum(1) / _RAYS**0.5


_TEXTURES = (_plain, _gradient, _stripes, _checker, _smooth_noise)


def _uniform(seeds: np.ndarray, count: int) -> Tensor:
    """``[N, count]`` float32 in [0, 1): a function of each seed alone (the finaliser of splitmix64, Steele et al. 2014,
    doi:10.1145/2660193.2660195)."""
    z = seeds.astype(np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95) + np.arange(1, count + 1, dtype=np.uint64)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / np.float32(2**24))
