"""Pictures from files, as viewers show them: formats that Pillow decodes itself, up to a size.

Everything that reads a user's picture reads it by :func:`levels`: upright as its EXIF says, transparency on white, 16
bits as 8, other colour profiles as sRGB, of several frames or pages the first.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""None of them starts another program, as PostScript would."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""By which pictures are told from other files, in small letters."""
NAMED = "PNG, JPEG, WebP, GIF, BMP or TIFF"
MOST_PIXELS = 1 << 26
"""Of one picture: 8,192 x 8,192."""
BACKGROUND = 255
"""The level, of each channel, that is seen through what is transparent: white, as on a page."""
READING = "pictures 2"
"""Part of every cache's key that depends on pixels; another one whenever files are read otherwise."""
_DAMAGED = (OSError, SyntaxError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError, MemoryError)
"""What Pillow's readers raise for damaged files, besides ValueError."""
_GREY = ("1", "L", "LA", "La")
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_CLEAR = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
"""Tags of EXIF and TIFF."""


@contextmanager
def opened(file: Path | BinaryIO, formats: Sequence[str] = FORMATS) -> Iterator[Any]:
    """An open picture whose size has been checked before it is decoded. Raises ValueError for what cannot be read,
    while opening it or inside the context."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, for the limit here is lower, and of damage that does not matter
            with Image.open(file, formats=tuple(formats)) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} is too large, at most {MOST_PIXELS:,} pixels")
                yield picture
    except UnidentifiedImageError:
        raise ValueError(f"it is no {NAMED}") from None
    except (*_DAMAGED, struct.error, Image.DecompressionBombError) as problem:
        raise ValueError(str(problem) or type(problem).__name__) from problem


def levels(file: Path | BinaryIO, place: str) -> np.ndarray:
    """uint8 ``[C, H, W]``: one channel for grey pictures, three for all others, palettes too. Raises UserError naming
    ``place`` for what is no picture, is damaged, or holds values whose black and white nobody says."""
    try:
        with opened(file) as picture:
            sixteen_grey = "LA;16B" in str(picture.tile)  # which Pillow gives as RGBA
            picture.load()
            pixels = _deep(picture) if _is_deep(picture) else _flat(picture, picture.mode in _GREY or sixteen_grey)
            pixels = _upright(pixels, _orientation(picture))
    except ValueError as problem:
        raise UserError(f"{place}: the image cannot be read ({problem})", cure="replace or remove it") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def rgb(file: Path | BinaryIO, place: str) -> Tensor:
    """:func:`levels` as float32 ``[3, H, W]`` in [-1, 1], grey ones in three equal channels."""
    found = levels(file, place)
    found = np.repeat(found, 3, 0) if len(found) == 1 else found
    return torch.from_numpy(found).float().div(127.5).sub(1.0)


# --- how values are read ----------------------------------------------------------------------------------------------
def _is_deep(picture: Any) -> bool:
    """Whether there is one channel of 16 bits, which Pillow cuts off above 255; older versions give PNG's as 32."""
    if picture.mode in ("I", "F") and picture.format != "PNG":
        raise ValueError("its values have 32 bits and nothing says which are black and white; save it in 8 or 16 bits")
    return picture.mode in _SIXTEEN or picture.mode == "I"


def _deep(picture: Any) -> np.ndarray:
    """The full range of the file's bits as 0 to 255, ``[H, W, 1]``."""
    values = np.asarray(picture).astype(np.int64)
    tags = picture.tag_v2 if picture.format == "TIFF" else {}
    top = (1 << int(tags.get(_BITS, (16,))[0])) - 1
    grey = (values * 255 + top // 2) // top
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    grey[values == picture.info.get("transparency", -1)] = BACKGROUND
    return grey.clip(0, 255).astype(np.uint8)[..., None]


def _flat(picture: Any, grey: bool) -> np.ndarray:
    """``[H, W, 1 or 3]`` on the background."""
    clear = picture.mode in _CLEAR or "transparency" in picture.info
    if not clear:
        found = np.asarray(picture.convert("L") if grey else _srgb(picture))
        return found[..., None] if found.ndim == 2 else found
    key = picture.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # one colour of 16 bits, of which Pillow keeps the upper 8
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    whole = picture.convert("RGBA")
    colours = np.asarray(whole.convert("RGB") if grey else _srgb(whole.convert("RGB"), picture)).astype(np.uint16)
    opaque = np.asarray(whole.getchannel("A")).astype(np.uint16)[..., None]
    found = ((colours * opaque + BACKGROUND * (255 - opaque) + 127) // 255).astype(np.uint8)
    return found[..., :1] if grey else found


def _srgb(picture: Any, source: Any = None) -> Any:
    """As RGB. A colour profile (that of ``source``) of other colours than sRGB is followed; a damaged one is passed
    over, as viewers do."""
    from PIL import ImageCms

    profile = (source or picture).info.get("icc_profile")
    if picture.mode not in ("RGB", "CMYK"):
        picture = picture.convert("RGB")
    if profile and b"sRGB" not in profile and "sRGB".encode("utf-16-be") not in profile:
        try:
            if (transform := _transform(profile, picture.mode)) is not None:
                return ImageCms.applyTransform(picture, transform)
        except (*_DAMAGED, ValueError, ImageCms.PyCMSError):
            pass
    return picture.convert("RGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> Any:
    """From the profile's colours to sRGB; None for a profile of another colour space than the picture's."""
    from PIL import ImageCms

    colours = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if str(colours.profile.xcolor_space).strip() != mode:
        return None
    return ImageCms.buildTransform(colours, ImageCms.createProfile("sRGB"), mode, "RGB")


# --- which side is up -------------------------------------------------------------------------------------------------
def _orientation(picture: Any) -> int:
    """EXIF's, 1 where there is none or it cannot be read."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except (*_DAMAGED, ValueError, struct.error):
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """``[H, W, C]`` turned and mirrored as EXIF's number says (CIPA DC-008, tag 274)."""
    if orientation in (2, 3):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4):
        pixels = pixels[::-1]
    if orientation in (7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (6, 7):
        pixels = pixels[::-1]
    return pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
