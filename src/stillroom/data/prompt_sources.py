"""Prompts, with pictures or without: text files, folders, parquet, datasets on disk, webdataset tars; one at a time."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stillroom.data.captioned_folders import FolderTeacher, caption_key, check_caption, read_captions
from stillroom.data.listing import hidden
from stillroom.data.pictures import READING, SUFFIXES, rgb
from stillroom.data.tables import parquet_reader
from stillroom.errors import UserError, shortened
from stillroom.files import stay_inside
from stillroom.parsing import parse_json, read_json

_TARS = (".tar", ".tar.gz", ".tgz")
LARGEST_MEMBER = 1 << 28
"""Bytes of an image or a caption in a tar."""
FORMS = (
    "a text file with one prompt per line, a .jsonl or .csv file with 'caption', a folder of images with captions, "
    "parquet files, a dataset saved by datasets.save_to_disk, or webdataset tars"
)


class PromptSource:
    """``pictures``: whether each prompt has an image. ``files``: what is read. ``origin``: in words.

    Iterating gives ``(prompt, image)``: float32 ``[3, H, W]`` in [-1, 1], or None. Nothing is kept in memory.
    """

    pictures = True

    def __init__(self, files: Sequence[Path], origin: str) -> None:
        self.files, self.origin = list(files), origin

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hex digest over names, sizes and times of the files: cheap, and another one after any change."""
        digest = hashlib.sha256(f"{type(self).__name__} {READING}".encode())
        for path in self.files:
            state = path.stat()
            digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class PromptList(PromptSource):
    """Prompts alone."""

    pictures = False

    def __init__(self, source: str) -> None:
        path = Path(source).expanduser()
        self.texts = read_captions(source).texts
        super().__init__([path] if path.is_file() else [], f"{len(self.texts):,} prompts of {source}")

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        return ((text, None) for text in self.texts)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


_FILE = re.compile(r"\S+\.(txt|caption|csv|tsv|jsonl|json|parquet)(\.gz)?", re.IGNORECASE)
"""What nobody would have a picture show, or not show: the name of a file, which is missing."""


class Texts(PromptSource):
    """Prompts that are given as they are; one that names a file stands for those in it."""

    pictures = False

    def __init__(self, given: Sequence[str]) -> None:
        files = [path for one in given if (path := Path(one).expanduser()).suffix and path.is_file()]
        self.texts: list[str] = []
        for place, one in enumerate(given, 1):
            listed = Path(one).expanduser() in files
            if not listed and _FILE.fullmatch(one.strip()):
                raise UserError(f"text {place}: there is no file {one.strip()}", cure="check its name, or give a text")
            self.texts += read_captions(one).texts if listed else [check_caption(one, f"text {place}")]
        if not self.texts:
            raise UserError("no texts were given", cure="give at least one, or a text file with one on each line")
        super().__init__(files, f"{len(self.texts):,} texts")

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        return ((text, None) for text in self.texts)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


class PictureFolder(PromptSource):
    """Images with captions beside them, or listed in ``metadata.jsonl`` or ``metadata.csv``."""

    def __init__(self, folder: Path) -> None:
        found = FolderTeacher(folder)
        self.pairs = [(caption, file) for caption, files in found.files.items() for file in files]
        beside = [path for path in folder.rglob("*") if path.suffix.lower() in (".txt", ".caption", ".jsonl", ".csv")]
        super().__init__(
            [file for _, file in self.pairs] + sorted(beside),
            f"{len(self.pairs):,} captioned images of {folder}{found.left_out}",
        )

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        return ((caption, read_picture(file.read_bytes(), str(file))) for caption, file in self.pairs)


class Parquet(PromptSource):
    """Parquet files with a column ``caption`` (or ``text``, ``prompt``) and, for pictures, ``image`` (bytes, or the
    ``{bytes, path}`` of Hugging Face's) or ``file_name`` beside the file. Read a batch of rows at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        parquet = parquet_reader()
        self.opened = {}
        for file in files:
            try:
                self.opened[file] = parquet.ParquetFile(file)
            except (OSError, ValueError) as problem:
                raise UserError(f"cannot read {file}: {str(problem)[:200]}", cure="copy the file again") from None
        first = next(iter(self.opened.values()))
        self.caption = caption_key(first.schema_arrow.names, str(files[0]))
        self.picture = next((key for key in ("image", "file_name") if key in first.schema_arrow.names), "")
        self.pictures = bool(self.picture)
        rows = sum(one.metadata.num_rows for one in self.opened.values())
        super().__init__(files, f"{rows:,} rows of {files[0].parent}")

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        columns = [self.caption, *([self.picture] if self.picture else [])]
        for path, opened in self.opened.items():
            number = 0
            for batch in opened.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{path}, row {number}"
                    text = check_caption(row[self.caption], place)
                    yield text, _stored_picture(row[self.picture], path.parent, place) if self.picture else None


class SavedDataset(PromptSource):
    """A dataset of Hugging Face's ``datasets``, as ``save_to_disk`` wrote it: ``caption`` (or ``text``, ``prompt``),
    and ``image`` for pictures. Of several splits ``train`` is read; the Arrow files a batch of rows at a time."""

    def __init__(self, folder: Path) -> None:
        try:
            import pyarrow  # type: ignore[import-not-found]
        except ImportError:
            raise UserError(f"{folder} is read by pyarrow", cure="pip install 'stillroom[data]'") from None
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json").get("splits", [])
            if "train" not in splits:
                raise UserError(
                    f"{folder} has the splits {', '.join(splits)}, none of them train", cure="give a split's own folder"
                )
            folder = folder / "train"
        named = [entry["filename"] for entry in read_json(folder / "state.json").get("_data_files", [])]
        files = [folder / name for name in named if (folder / name).resolve().is_relative_to(folder.resolve())]
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"{folder} lacks data files that its state.json names", cure="save it again")
        self.folder = folder
        with pyarrow.memory_map(str(files[0])) as opened:
            names = pyarrow.ipc.open_stream(opened).schema.names
        self.caption = caption_key(names, str(folder))
        self.pictures = "image" in names
        super().__init__([folder / "state.json", *files], f"dataset {folder}")

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        import pyarrow  # type: ignore[import-not-found]

        number = 0
        for file in self.files[1:]:
            with pyarrow.memory_map(str(file)) as opened:
                for batch in pyarrow.ipc.open_stream(opened):
                    for i in range(batch.num_rows):
                        number += 1
                        place = f"{self.folder}, row {number}"
                        text = check_caption(batch.column(self.caption)[i].as_py(), place)
                        image = batch.column("image")[i].as_py() if self.pictures else None
                        yield text, _stored_picture(image, self.folder, place) if self.pictures else None


class Tars(PromptSource):
    """webdataset shards: members of one name are one sample, an image and its ``.txt`` or ``.json`` with ``caption``.
    Read from front to back, compressed or not, without unpacking. Members that a system added (macOS's ``._a.png``)
    are passed over; ``origin`` counts them once all samples were read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.whole = f"{len(files):,} webdataset tar{'s' if len(files) > 1 else ''} of {files[0].parent}"
        super().__init__(files, self.whole)

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        self.passed = 0
        for file in self.files:
            try:
                with tarfile.open(file, "r|*") as opened:
                    yield from self._samples(file, opened)
            except (tarfile.TarError, OSError, EOFError) as problem:
                raise UserError(f"cannot read {file}: {problem}", cure="copy the file again") from None
        self.origin = f"{self.whole} (left out: {self.passed:,} hidden)" if self.passed else self.whole

    def _samples(self, file: Path, opened: tarfile.TarFile) -> Iterator[tuple[str, Tensor | None]]:
        name, parts = "", {}
        for member in itertools.chain(opened, [None]):
            if member is not None and (member.isdir() or any(map(_added, member.name.split("/")))):
                self.passed += not member.isdir()
                continue
            if member is not None:
                _check_member(member, file)
            folder, _, leaf = member.name.rpartition("/") if member is not None else ("", "", "")
            stem, _, ending = leaf.partition(".")
            key = f"{folder}/{stem}"
            if parts and (member is None or key != name):
                yield self._sample(f"{file}, {name.strip('/')}", parts)
                parts = {}
            if member is not None:
                content = opened.extractfile(member)
                name, parts[f".{ending.lower()}"] = key, content.read() if content is not None else b""

    def _sample(self, place: str, parts: dict[str, bytes]) -> tuple[str, Tensor | None]:
        picture = next((parts[ending] for ending in SUFFIXES if ending in parts), None)
        try:
            if ".txt" in parts:
                text: Any = parts[".txt"].decode("utf-8-sig")
            elif ".json" in parts:
                row = parse_json(parts[".json"])
                if not isinstance(row, dict):
                    raise ValueError("it holds no mapping")
                text = row[caption_key(list(row), place)]
            else:
                raise UserError(f"{place}: there is no caption", cure="put a .txt or .json beside the image")
        except ValueError:
            raise UserError(f"{place}: the caption is neither UTF-8 text nor JSON", cure="write it again") from None
        if picture is None:
            raise UserError(f"{place}: there is no image", cure=f"one of {', '.join(SUFFIXES)}")
        return check_caption(text, place), read_picture(picture, place)


def _added(part: str) -> bool:
    return hidden(part) and part not in (".", "..")


def _check_member(member: tarfile.TarInfo, file: Path) -> None:
    """Nothing is unpacked. But a tar with such members is no store of samples, and none is passed over in silence."""
    if not member.isfile():
        raise UserError(
            f"{file}: member {shortened(member.name)} is a link or a device, no file", cure="pack copies of the files"
        )
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(
            f"{file}: member {shortened(member.name)} leads out of the archive",
            cure="pack it from its own folder",
        )
    if member.size > LARGEST_MEMBER:
        raise UserError(
            f"{file}: member {shortened(member.name)} has {member.size:,} bytes", cure=f"at most {LARGEST_MEMBER:,}"
        )


def prompt_source(source: str) -> PromptSource:
    """What a recipe's ``data`` names, by its form. Raises UserError for what is none of them."""
    path = Path(source).expanduser()
    stay_inside(path)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return SavedDataset(path)
        if tars := sorted(file for file in path.iterdir() if file.name.endswith(_TARS)):
            return Tars(tars)
        if files := sorted(path.glob("*.parquet")):
            return Parquet(files)
        return PictureFolder(path)
    if path.is_file() and path.name.endswith(_TARS):
        return Tars([path])
    if path.is_file() and path.suffix == ".parquet":
        return Parquet([path])
    if path.is_file() and path.suffix.lower() in (*SUFFIXES, ".npz", ".zip", ".bin", ".pt"):
        raise UserError(f"data {source!r} holds no prompts", cure=f"give {FORMS}")
    if not path.exists() and source.partition(":")[0] != "scenes":
        raise UserError(f"no prompts at {source!r}", cure=f"give {FORMS}")
    return PromptList(source)


# --- pictures ---------------------------------------------------------------------------------------------------------
def read_picture(content: bytes, place: str) -> Tensor:
    """float32 ``[3, H, W]`` in [-1, 1]. Raises UserError naming ``place`` for what is no image."""
    return rgb(io.BytesIO(content), place)


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``[3, H, W]`` in [-1, 1], scaled (bicubic, antialiased) to cover ``size`` (height, width), its middle cut out."""
    height, width = image.shape[1:]
    scale = max(size[0] / height, size[1] / width)
    wanted = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if wanted != (height, width):
        image = F.interpolate(image[None], wanted, mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)
    top, left = (wanted[0] - size[0]) // 2, (wanted[1] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def _stored_picture(value: Any, folder: Path, place: str) -> Tensor:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        file = folder / value
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{place}: {value} lies outside the folder", cure="keep the images beside it")
        if not file.is_file():
            raise UserError(f"{place}: there is no image {file}", cure="restore the file, or remove the row")
        value = file.read_bytes()
    if not isinstance(value, bytes):
        raise UserError(f"{place}: there is no image", cure="remove the row")
    return read_picture(value, place)
