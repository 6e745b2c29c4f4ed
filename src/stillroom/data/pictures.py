"""Pictures from files: formats that Pillow decodes itself, up to a size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""None of them starts another program, as PostScript would."""
MOST_PIXELS = 1 << 26
"""Of one picture: 8,192 x 8,192."""


@contextmanager
def opened(file: Path | BinaryIO, formats: Sequence[str] = FORMATS) -> Iterator[Any]:
    """An open picture whose size has been checked before it is decoded. Raises ValueError for what cannot be read,
    while opening it or inside the context."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(file, formats=tuple(formats)) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} is too large, at most {MOST_PIXELS:,} pixels")
                yield picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as problem:
        raise ValueError(str(problem)) from problem


def rgb(file: Path | BinaryIO, place: str) -> Tensor:
    """float32 ``[3, H, W]`` in [-1, 1]. Raises UserError naming ``place`` for what is no picture."""
    try:
        with opened(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except ValueError as problem:
        raise UserError(f"{place}: the image cannot be read ({problem})", cure="replace or remove it") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(127.5).sub(1.0)
