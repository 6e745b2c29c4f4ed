"""Captions from files, and folders of images with captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.data.listing import files_below, left_out, seen
from stillroom.data.pictures import READING, SUFFIXES, rgb
from stillroom.data.source import METADATA, listed_file
from stillroom.data.tables import CAPTION_KEYS, kind_of, lines, read_text, rows
from stillroom.errors import UserError
from stillroom.files import stay_inside

LONGEST_CAPTION = 4000
"""In characters. A teacher's own text encoder usually allows far fewer words."""
EXAMPLE = '{"caption": "..."}'
_CAPTION_FILES = (".txt", ".caption", ".TXT", ".CAPTION")
_SPLITS = {"train", "test", "val", "valid", "validation", "dev"}


class Captions(NamedTuple):
    """texts: captions in order, repeated ones too; places: where each of them stands (``captions.txt:17``); redraw:
    whether a caption that comes again asks for another image."""

    texts: list[str]
    places: list[str]
    redraw: bool = False


def read_captions(source: str | Path, seed: int = 0) -> Captions:
    """Captions from ``scenes:N`` (N drawn from the grammar of the scenes world by ``seed``, evenly over its categories;
    ``scenes`` alone: each of its training captions once), from a text file with one caption per line, or from a table
    (:mod:`stillroom.data.tables`) with ``caption``, ``text`` or ``prompt`` in each row.

    Raises UserError naming file and line for empty files, empty or over-long captions and broken rows.
    """
    name, _, number = str(source).partition(":")
    if name == "scenes":
        return _scenes_captions(str(source), number, seed)
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file of captions", cure="give a text file, one caption per line")
    if not path.exists():
        raise UserError(f"there is no file of captions {path}", cure="give a text file, a .jsonl file, or scenes:N")
    if path.suffix.lower() == ".json":
        raise UserError(f"{path} is one JSON text, not lines", cure=f"save it as .jsonl, {EXAMPLE} on each line")
    found = list(_table_captions(path) if kind_of(path) else _lines(path))
    if not found:
        raise UserError(f"{path} holds no captions", cure="write one caption per line")
    return Captions([check_caption(text, place) for place, text in found], [place for place, _ in found])


def check_caption(text: str, place: str) -> str:
    """The caption on one line, every run of blanks one blank. Raises UserError, naming ``place``, if it is empty, too
    long or no text."""
    if not isinstance(text, str):
        raise UserError(f"{place}: the caption is {text!r:.40}, not a text", cure="write it in quotes")
    text = " ".join(text.split())
    if not text:
        raise UserError(f"{place}: the caption is empty", cure="write a caption, or remove it")
    if len(text) > LONGEST_CAPTION:
        raise UserError(
            f"{place}: the caption has {len(text):,} characters", cure=f"at most {LONGEST_CAPTION:,} are allowed"
        )
    if any(character < " " or "\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{place}: the caption holds control characters", cure="write it as plain text")
    return text


def _scenes_captions(source: str, number: str, seed: int) -> Captions:
    from stillroom.data.scenes import captions

    if ":" not in source:
        categories = captions.categories("train")
        texts = [caption.text for category in categories for caption in captions.all_captions(category, "train")]
    elif number.isdecimal() and int(number) > 0:
        drawn = captions.sample_captions(int(number), torch.Generator().manual_seed(seed), "train")
        texts = [caption.text for caption in drawn]
    else:
        raise UserError(f"captions {source!r} are no number of captions", cure="write scenes:12000 or the like")
    return Captions(texts, [f"{source}, caption {i}" for i in range(1, len(texts) + 1)], redraw=True)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines(read_text(path)), 1):
        yield f"{path}:{number}", line


def _table_captions(path: Path) -> Iterator[tuple[str, str]]:
    for place, row in rows(path, CAPTION_KEYS, EXAMPLE):
        yield place, row[caption_key(row, place)]


def caption_key(names: Iterable[str], place: str) -> str:
    """The column that holds captions. Raises UserError, naming ``place``, where there is none."""
    known = [str(name) for name in names]
    key = next((key for key in CAPTION_KEYS if key in known), None)
    if key is None:
        raise UserError(f"{place} has no {' or '.join(CAPTION_KEYS)}", cure=f"it has: {', '.join(known) or 'nothing'}")
    return key


# --- folders of images with captions ----------------------------------------------------------------------------------
class FolderTeacher:
    """A folder of images with captions, given as a teacher: it "draws" the images that it has.

    Captions lie beside the images (``a.png``, ``a.txt`` or ``a.caption``), in this folder or below it, or in a
    ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and ``caption`` (or ``text``, ``prompt``), as Hugging
    Face's imagefolder has it, ``train/metadata.jsonl`` too. ``left_out`` counts the files that were not read, in words.
    size: every image is cropped to its central square and resized to ``size`` x ``size``; 0 takes the images as they
    are, which then must have one size.

    Raises UserError naming the file for an image without a caption, a caption without its image, an empty folder.
    """

    def __init__(self, folder: str | Path, size: int = 0) -> None:
        self.folder, self.size = Path(folder), size
        if not self.folder.is_dir():
            raise UserError(f"folder {self.folder} does not exist", cure="give a folder of images with captions")
        stay_inside(self.folder)
        pairs, self.left_out = _pairs(self.folder)
        if not pairs:
            raise UserError(
                f"{self.folder} holds no images with captions",
                cure="put a.png and a.txt side by side, or add a metadata.jsonl with file_name and caption",
            )
        self.captions = [caption for _, caption in pairs]
        self.files: dict[str, list[Path]] = {}
        for file, caption in pairs:
            self.files.setdefault(caption, []).append(file)

    def count(self, caption: str) -> int:
        """How many images with exactly this caption the folder holds."""
        return len(self.files.get(caption, ()))

    def source(self, caption: str, number: int) -> str:
        """The file of image ``number`` of this caption, relative to the folder."""
        return self.files[caption][number].relative_to(self.folder).as_posix()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over captions, file names and files, and how these are read."""
        whole = hashlib.sha256(READING.encode())
        for caption in sorted(self.files):
            for number, file in enumerate(self.files[caption]):
                with file.open("rb") as opened:
                    content = hashlib.file_digest(opened, "sha256").hexdigest()
                whole.update(f"{caption}\0{self.source(caption, number)}\0{content}\n".encode())
        return whole.hexdigest()

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every image."""
        if self.size:
            return self.size, self.size
        for files in self.files.values():
            for file in files:
                if (image := _picture(file)) is not None:
                    return image.shape[1], image.shape[2]
        raise UserError(f"no image in {self.folder} can be read", cure="replace the damaged files")

    def sample_each(self, captions: Sequence[str], numbers: Sequence[int]) -> Tensor:
        """Image ``numbers[i]`` of ``captions[i]``, ``[N, 3, H, W]`` float32 in [-1, 1]; NaN where it cannot be read.

        Raises UserError for an image of another size.
        """
        images = []
        for caption, number in zip(captions, numbers, strict=True):
            file = self.files[caption][number]
            image = _picture(file)
            if image is None:
                image = torch.full((3, *self.shape), torch.nan)
            elif self.size:
                image = centre_square(image[None], self.size)[0]
            elif image.shape[1:] != self.shape:
                height, width = self.shape
                raise UserError(
                    f"{file} is {image.shape[2]}x{image.shape[1]}, other images are {width}x{height}",
                    cure="give a size: the images are then cropped and resized to it",
                )
            images.append(image)
        return torch.stack(images)


def centre_square(images: Tensor, size: int) -> Tensor:
    """``[N, C, H, W]`` in [-1, 1], cut to the central square and resized (bicubic, antialiased) to ``size`` squared."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def _picture(file: Path) -> Tensor | None:
    """float32 ``[3, H, W]`` in [-1, 1]; None for a file that is no readable image."""
    try:
        return rgb(file, str(file))
    except UserError:
        return None


def _pairs(folder: Path) -> tuple[list[tuple[Path, str]], str]:
    """Pictures and their captions, and what of the folder was left out, in words.

    A table says the captions of the pictures that it names, those in folders below it too; all others have theirs
    beside them. Where ``train/`` stands among folders of other splits, it alone is read.
    """
    home = folder
    below = {path.name for path in seen(folder) if path.is_dir()}
    if "train" in below <= _SPLITS and not any(path.suffix.lower() in SUFFIXES for path in seen(folder)):
        home = folder / "train"
    tables = [path for path in files_below(home) if path.name in METADATA]
    if home != folder:
        tables = [folder / name for name in METADATA if (folder / name).is_file()] + tables
    listed: dict[Path, str] = {}
    for table in tables:
        for file, caption in _listed_pairs(table):
            if file.is_relative_to(home):
                listed.setdefault(file, caption)
    if home / "metadata.jsonl" in tables or home / "metadata.csv" in tables:  # whoever lists all means those
        found, beside = list(listed.items()), []
    else:
        found, beside = _neighbours(home, listed)
    return found, left_out(folder, [*tables, *beside, *(file for file, _ in found)])


def _neighbours(folder: Path, listed: Mapping[Path, str]) -> tuple[list[tuple[Path, str]], list[Path]]:
    found, beside = [], []
    for file in files_below(folder):
        if file.suffix.lower() not in SUFFIXES:
            continue
        if file in listed:
            found.append((file, listed[file]))
            continue
        text = next((text for end in _CAPTION_FILES if (text := file.with_suffix(end)).is_file()), None)
        if text is None:
            raise UserError(
                f"{file} has no caption", cure=f"write one into {file.stem}.txt beside it, or remove the image"
            )
        beside.append(text)
        found.append((file, check_caption(read_text(text), str(text))))
    return found, beside


def _listed_pairs(table: Path) -> Iterator[tuple[Path, str]]:
    for place, row in rows(table, ("file_name", *CAPTION_KEYS), '{"file_name": "0.png", "caption": "..."}'):
        if "file_name" not in row or not set(CAPTION_KEYS) & row.keys():
            raise UserError(f"{place}: file_name or caption is missing", cure="give both in every row")
        yield listed_file(table.parent, row, place), check_caption(row[caption_key(row, place)], place)
