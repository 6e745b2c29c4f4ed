"""Sample grids as PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

CELL = 84
"""Width in pixels that small images are enlarged to (by a whole factor); images of more than twice that are reduced."""
GAP = 4


def save_grid(images: Tensor, path: Path) -> None:
    """Write ``[rows, columns, C, H, W]`` in [-1, 1] as one PNG; the gaps are transparent. C is 1 (grey) or 3 (RGB)."""
    from PIL import Image

    rows, columns, channels, height, width = images.shape
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    mode = "LA" if channels == 1 else "RGBA"
    factor = max(1, CELL // width)
    size = (width * factor, height * factor) if width <= 2 * CELL else (2 * CELL, round(2 * CELL * height / width))
    filtered = Image.Resampling.NEAREST if width <= 2 * CELL else Image.Resampling.LANCZOS
    sheet = Image.new(mode, (columns * (size[0] + GAP) - GAP, rows * (size[1] + GAP) - GAP))
    for row in range(rows):
        for column in range(columns):
            array = pixels[row, column].permute(1, 2, 0).numpy()
            cell = Image.fromarray(array[:, :, 0] if channels == 1 else array[:, :, :3]).resize(size, filtered)
            sheet.paste(cell.convert(mode), (column * (size[0] + GAP), row * (size[1] + GAP)))
    sheet.save(path, format="PNG", optimize=True)
