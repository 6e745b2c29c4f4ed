"""Pictures as viewers show them: orientation, transparency, depth, colours; and everywhere the same."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from stillroom.data.captioned_folders import FolderTeacher
from stillroom.data.pictures import BACKGROUND, FORMATS, levels, rgb
from stillroom.data.prompt_sources import prompt_source
from stillroom.data.source import load_data
from stillroom.demo.exhibits import image_from_file
from stillroom.errors import UserError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def encoded(picture: Any, kind: str = "PNG", **more: Any) -> io.BytesIO:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    buffer.seek(0)
    return buffer


def read(picture: Any, kind: str = "PNG", **more: Any) -> np.ndarray:
    return levels(encoded(picture, kind, **more), "here")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- which side is up -------------------------------------------------------------------------------------------------
STORED = {  # how a camera stores an upright picture that EXIF's number then turns back (tag 274 of the EXIF standard)
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_upright(kind: str, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](COLOURS))
    found = read(stored, kind, exif=turned(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(found, COLOURS.transpose(2, 0, 1))


def test_a_phone_s_picture_is_upright_everywhere(tmp_path: Path) -> None:
    """Bright above; the sensor read it lying on its side."""
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:8] = 250
    place = tmp_path / "classes" / "a"
    place.mkdir(parents=True)
    Image.fromarray(np.rot90(upright, 1).copy()).save(place / "0.jpg", exif=turned(6), quality=95)
    (place / "0.txt").write_text("a bright sky")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.txt"):
            tar.add(place / name, name)
    folder = FolderTeacher(place)
    found = {
        "data": load_data(tmp_path / "classes", "all").images()[0],
        "captioned": folder.sample_each(folder.captions, [0])[0],
        "prompts": next(iter(prompt_source(str(place))))[1],
        "tar": next(iter(prompt_source(str(tmp_path / "a.tar"))))[1],
        "demo": image_from_file(place / "0.jpg", (32, 16)),
    }
    for where, image in found.items():
        assert image is not None
        assert tuple(image.shape) == (3, 32, 16), where
        assert image[:, :8].min() > 0.9, where
        assert image[:, 10:].max() < -0.9, where


@pytest.mark.parametrize("damage", [b"II*\0\x08\0\0\0\x01\0\x12\x01", b"nonsense", b"II*\0\xff\xff\xff\xff"])
def test_exif_that_cannot_be_read_turns_nothing(damage: bytes) -> None:
    assert np.array_equal(read(COLOURS, exif=b"Exif\0\0" + damage), COLOURS.transpose(2, 0, 1))


def test_exif_with_impossible_numbers_still_says_which_side_is_up() -> None:
    """A resolution of -1/0: turning the picture must not try to write that back."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 5, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0) + struct.pack("<iI", -1, 0)
    stored = np.ascontiguousarray(np.rot90(COLOURS, 1))
    assert np.array_equal(read(stored, exif=exif), COLOURS.transpose(2, 0, 1))


# --- depth ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_read_as_eight(kind: str) -> None:
    assert np.array_equal(read(GREY.astype(np.uint16) * 257, kind), GREY[None])


def test_sixteen_bits_in_either_order_of_bytes_and_of_either_sense() -> None:
    deep = GREY.astype(np.uint16) * 257
    little = encoded(deep, "TIFF").getvalue()
    at = little.index(struct.pack("<HHI", 262, 3, 1))  # photometric: 0 is white
    assert np.array_equal(levels(io.BytesIO(little[: at + 8] + b"\0" + little[at + 9 :]), "here"), 255 - GREY[None])
    big = Image.frombytes("I;16B", (7, 5), deep.astype(">u2").tobytes())
    assert np.array_equal(read(big, "TIFF"), GREY[None])


def test_sixteen_bits_of_a_folder_are_the_same_pictures(tmp_path: Path) -> None:
    for name, picture in (("eight", GREY), ("sixteen", GREY.astype(np.uint16) * 257)):
        for i in range(5):
            (tmp_path / name / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / name / "a" / f"{i}.png")
    eight, sixteen = (load_data(tmp_path / name, "all") for name in ("eight", "sixteen"))
    assert eight.shape == sixteen.shape == (1, 5, 7)
    assert torch.equal(eight.array, sixteen.array)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_unknown_range_are_refused(dtype: Any) -> None:
    with pytest.raises(UserError, match=r"here: .*32 bits and nothing says which are black and white; save it in 8"):
        read(GREY.astype(dtype), "TIFF")


# --- transparency -----------------------------------------------------------------------------------------------------
def test_what_is_transparent_shows_the_background() -> None:
    """Colours hidden under alpha 0 do not show; half transparent ones mix."""
    alpha = np.full((5, 7), 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    found = read(np.dstack([COLOURS, alpha]))
    assert np.array_equal(found[:, 2:], COLOURS.transpose(2, 0, 1)[:, 2:])
    assert (found[:, 0] == BACKGROUND).all()
    mixed = (COLOURS[1].T * 128.0 + BACKGROUND * 127.0) / 255
    assert np.abs(found[:, 1] - mixed).max() <= 0.5
    grey = read(np.dstack([GREY, alpha]))
    assert grey.shape == (1, 5, 7)
    assert (grey[0, 0] == BACKGROUND).all()
    assert np.array_equal(grey[0, 2:], GREY[2:])


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "P"), ("GIF", "P"), ("PNG", "L"), ("PNG", "RGB"), ("PNG", "1")])
def test_one_colour_may_be_transparent(kind: str, mode: str) -> None:
    levels_of = {"P": np.array([[0, 1]], np.uint8), "L": np.array([[9, 200]], np.uint8)}
    if mode == "RGB":
        picture, clear, channels = Image.fromarray(np.array([[[9, 8, 7], [200, 3, 4]]], np.uint8)), (9, 8, 7), 3
    elif mode == "1":
        picture, clear, channels = Image.fromarray(np.array([[False, True]])), 0, 1
    else:
        picture, clear, channels = Image.fromarray(levels_of[mode], "L"), 0 if mode == "P" else 9, 1
        if mode == "P":
            picture.putpalette([9, 8, 7, 200, 3, 4])
            channels = 3
    found = read(picture, kind, transparency=clear)
    assert found.shape == (channels, 1, 2)
    assert (found[:, 0, 0] == BACKGROUND).all()
    second = {1: [255] if mode == "1" else [200], 3: [200, 3, 4]}[channels]
    assert found[:, 0, 1].tolist() == second


def test_one_colour_of_sixteen_bits_may_be_transparent() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(colour: int, *values: int) -> io.BytesIO:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, colour, 0, 0, 0))
        clear = chunk(b"tRNS", struct.pack(f">{len(values) // 2}H", *values[: len(values) // 2]))
        pixels = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values)))
        return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + clear + pixels + chunk(b"IEND", b""))

    assert levels(png(0, 100, 0x8080), "here").tolist() == [[[255, 128]]]
    found = levels(png(2, 0x1234, 0x5678, 0x9ABC, 0x8080, 0, 0xFFFF), "here")
    assert found[:, 0].T.tolist() == [[255, 255, 255], [128, 0, 255]]


def test_the_background_is_the_same_everywhere(tmp_path: Path) -> None:
    clear = np.dstack([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)])
    for i in range(5):
        Image.fromarray(clear).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("nothing")
    white = torch.ones(3, 8, 8)
    assert torch.equal(load_data(tmp_path, "all").images()[0], white)
    assert torch.equal(FolderTeacher(tmp_path).sample_each(["nothing"], [0])[0], white)
    assert torch.equal(image_from_file(tmp_path / "0.png", (8, 8)), white)
    found = next(iter(prompt_source(str(tmp_path))))[1]
    assert found is not None
    assert torch.equal(found, white)


# --- colours ----------------------------------------------------------------------------------------------------------
def test_channels_by_mode() -> None:
    """Grey stays grey, all else becomes RGB."""
    wanted = {"1": 1, "L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
    seen = set()
    for mode, channels in wanted.items():
        for kind in FORMATS:
            try:
                file = encoded(Image.fromarray(COLOURS).convert(mode), kind)
            except (OSError, ValueError):  # the format does not have the mode
                continue
            if mode == "YCbCr" and kind == "TIFF":  # which Pillow writes, but does not read
                continue
            assert rgb(io.BytesIO(file.getvalue()), "here").shape == (3, 5, 7), (mode, kind)
            if kind in ("PNG", "JPEG", "TIFF"):  # others have no grey pictures
                assert levels(file, "here").shape == (channels, 5, 7), (mode, kind)
                seen.add(mode)
    assert seen == wanted.keys()


def wide() -> bytes:
    """A profile whose red, green and blue are not sRGB's: these, with the places of red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for a, b in ((b"rXYZ", b"gXYZ"),):
        first, second = profile.index(a), profile.index(b)
        profile[first : first + 4], profile[second : second + 4] = b, a
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")).replace(b"sRGB", b"mine")


def test_other_colours_than_srgb_are_followed() -> None:
    plain = COLOURS.transpose(2, 0, 1).astype(int)
    found = read(COLOURS, icc_profile=wide()).astype(int)
    assert np.abs(found - plain[[1, 0, 2]]).max() <= 3
    alpha = np.full((5, 7, 1), 255, np.uint8)
    assert np.array_equal(read(np.dstack([COLOURS, alpha]), icc_profile=wide()).astype(int), found)


def test_srgb_and_damaged_profiles_change_no_level() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"nonsense", wide()[:200], srgb.replace(b"RGB ", b"GRAY")):
        assert np.array_equal(read(COLOURS, icc_profile=profile), COLOURS.transpose(2, 0, 1))


# --- several pictures, and none ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_read(kind: str) -> None:
    first, second = Image.new("RGB", (6, 4), (250, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 250))
    more = {"lossless": True} if kind == "WEBP" else {}
    found = read(first, kind, save_all=True, append_images=[second], **more)
    assert found.shape == (3, 4, 6)
    assert found[:, 0, 0].tolist() == [250, 0, 0]


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_files_are_named(kind: str) -> None:
    whole = encoded(np.tile(COLOURS, (20, 20, 1)), kind).getvalue()
    for length in (0, 1, 10, len(whole) // 2):
        with pytest.raises(UserError, match=r"^here: the image cannot be read \(.*; replace or remove it") as caught:
            levels(io.BytesIO(whole[:length]), "here")
        assert "0x" not in str(caught.value)  # no address in memory


def test_what_is_too_large_is_named_before_it_is_decoded() -> None:
    small = encoded(Image.new("L", (1, 1))).getvalue()
    ihdr = small[12:16] + struct.pack(">II", 9_000, 9_000) + small[24:29]
    large = small[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + small[33:]
    with pytest.raises(UserError, match=r"9000x9000 is too large"):
        levels(io.BytesIO(large), "here")
