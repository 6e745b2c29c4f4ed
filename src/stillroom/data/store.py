"""A store: images with captions and their provenance, as webdataset shards with a manifest.

``shard-00000.tar`` holds ``000000000.png`` and ``000000000.json`` for each sample; ``manifest.json`` holds the SHA-256
and the count of every shard. The same samples give the same bytes. Hugging Face ``datasets`` and ``webdataset`` read
the shards as they are; :func:`read_store` and :func:`store_data` also check them against the manifest.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillroom.data.pictures import opened
from stillroom.errors import UserError, nearest
from stillroom.files import digest, stay_inside, write
from stillroom.parsing import parse_json

MANIFEST = "manifest.json"
UNFINISHED = ".synthesis"
"""The folder that a store has while it is being made."""
FORMAT = 1
OnCorrupt = Literal["refuse", "skip"]
_SHARD = re.compile(r"shard-\d{5,}\.tar")
_MEMBER = re.compile(r"(\d{9,})\.(png|json)")


class Samples(NamedTuple):
    """images: uint8 ``[N, 3, H, W]``; captions: N texts; records: N dictionaries of provenance, with the caption."""

    images: Tensor
    captions: list[str]
    records: list[dict[str, Any]]


class BadShard(Exception):
    """A shard that cannot be trusted; the message says why."""


# --- writing ----------------------------------------------------------------------------------------------------------
def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


def encode_json(value: Any) -> bytes:
    """JSON with sorted keys: equal values are equal bytes. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def encode_png(image: Tensor) -> bytes:
    """A uint8 ``[3, H, W]`` image as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, bytes]], aside: Path) -> dict[str, Any]:
    """Write ``(key, PNG, JSON)`` samples as the tar file ``path``, whole or not at all; its manifest entry.

    Members carry no time and no owner. ``aside`` is where the file waits, on the same disk.
    """
    entry: dict[str, Any] = {}

    def tarred(aside: Path) -> None:
        count = 0
        with aside.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, png, record in samples:
                for ending, data in (("png", png), ("json", record)):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size, member.mode, member.mtime = len(data), 0o644, 0
                    tar.addfile(member, io.BytesIO(data))
                count += 1
        entry.update(sha256=digest(aside), bytes=aside.stat().st_size, count=count)

    write(path, tarred, aside)
    return entry


# --- reading ----------------------------------------------------------------------------------------------------------
def read_manifest(folder: str | Path) -> dict[str, Any]:
    """A store's manifest. Raises UserError for a folder that is no store, an unfinished one or a damaged manifest."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"store {folder} does not exist", cure="make one with `stillroom synthesize`")
    if not path.is_file():
        if (folder / UNFINISHED).is_dir():
            raise UserError(f"store {folder} is unfinished", cure="finish it: the same command again, with --resume")
        raise UserError(f"{folder} is no store: it has no {MANIFEST}", cure="make one with `stillroom synthesize`")
    damaged = UserError(f"{path} is damaged", cure="restore it from a copy, or make the store again")
    try:
        manifest = parse_json(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {manifest['format']!r}; this version reads {FORMAT}",
                cure="read it with the version of stillroom that wrote it",
            )
        entries = manifest["shards"].values()
        whole = all(isinstance(entry["sha256"], str) and entry["count"] > 0 for entry in entries)
        height, width = manifest["size"]
        whole = whole and height > 0 and width > 0 and sum(entry["count"] for entry in entries) == manifest["count"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if not whole or any(not _SHARD.fullmatch(name) for name in manifest["shards"]):
        raise damaged
    return manifest


def read_shard(file: BinaryIO) -> Iterator[tuple[str, bytes, bytes]]:
    """``(key, PNG, JSON)`` of each sample of an open tar file, nothing unpacked to disk.

    Raises :class:`BadShard` for anything but regular files of plain names, in pairs.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            waiting: tuple[str, bytes] | None = None
            for member in tar:
                name = _MEMBER.fullmatch(member.name)
                if name is None or not member.isreg() or member.issparse():
                    raise BadShard(f"it holds {member.name!r}, which is no sample")
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if name[2] == "png" and waiting is None:
                    waiting = name[1], data
                elif name[2] == "json" and waiting is not None and waiting[0] == name[1]:
                    yield name[1], waiting[1], data
                    waiting = None
                else:
                    raise BadShard(f"{member.name!r} is not where it should be")
            if waiting is not None:
                raise BadShard(f"sample {waiting[0]} has no record")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadShard(f"it is no readable tar file ({error})") from error


def _check_shard(path: Path, entry: Mapping[str, Any]) -> None:
    """Raises BadShard for a file that is missing or not the one that the manifest knows."""
    if not path.is_file():
        raise BadShard("it is missing")
    if digest(path) != entry["sha256"]:
        raise BadShard("it does not match its checksum")


def _decode_png(data: bytes, size: tuple[int, int]) -> np.ndarray:
    try:
        with opened(io.BytesIO(data), ("PNG",)) as picture:
            if picture.size != (size[1], size[0]) or picture.mode != "RGB":
                raise BadShard(f"it holds an image of {picture.size[0]}x{picture.size[1]} {picture.mode}")
            return np.asarray(picture)
    except ValueError as error:
        raise BadShard(f"it holds an image that cannot be read ({error})") from error


def _decode_record(data: bytes) -> dict[str, Any]:
    try:
        record = parse_json(data)
        if isinstance(record["caption"], str):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise BadShard("it holds a record without a caption")


def check_store(
    folder: str | Path, on_corrupt: OnCorrupt = "refuse", report: Callable[[str], None] = print
) -> tuple[dict[str, Any], list[str]]:
    """The manifest of a store and its good shards, in order: those that are there and match their checksums.

    on_corrupt: ``refuse`` raises UserError naming the bad shards; ``skip`` leaves them out and tells ``report`` which
    they are and how many samples are lost with them. Raises UserError too where nothing is left.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise UserError(
            f"on_corrupt is {on_corrupt!r}{nearest(on_corrupt, ('refuse', 'skip'))}", cure="use refuse or skip"
        )
    folder = Path(folder)
    manifest = read_manifest(folder)
    stay_inside(folder)
    good: list[str] = []
    bad: dict[str, str] = {}
    for name in sorted(manifest["shards"], key=lambda name: int(name[6:-4])):
        try:
            _check_shard(folder / name, manifest["shards"][name])
            good.append(name)
        except (BadShard, OSError) as problem:
            bad[name] = str(problem)
    if bad:
        named = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:8])
        named += f"; and {len(bad) - 8} more" if len(bad) > 8 else ""
        lost = sum(manifest["shards"][name]["count"] for name in bad)
        what = (
            f"store {folder}: {len(bad)} of {len(manifest['shards'])} shards are bad, with {lost:,} of "
            f"{manifest['count']:,} samples ({named})"
        )
        if on_corrupt == "refuse":
            raise UserError(what, cure="restore them from a copy, or leave them out with on_corrupt=skip")
        report(f"skipped: {what}")
    if not good:
        raise UserError(f"store {folder} has no readable samples", cure="make it again with `stillroom synthesize`")
    return manifest, good


def read_store(folder: str | Path, on_corrupt: OnCorrupt = "refuse", report: Callable[[str], None] = print) -> Samples:
    """All samples of a store in memory, in the order of its plan. Arguments and errors: see :func:`check_store`."""
    manifest, good = check_store(folder, on_corrupt, report)
    return _read(Path(folder), manifest, good)


def _read(folder: Path, manifest: Mapping[str, Any], shards: Iterable[str]) -> Samples:
    height, width = manifest["size"]
    images: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    for name in shards:
        with (folder / name).open("rb") as file:
            before = len(images)
            try:
                for _, png, record in read_shard(file):
                    images.append(_decode_png(png, (height, width)))
                    records.append(_decode_record(record))
                if len(images) - before != manifest["shards"][name]["count"]:
                    raise BadShard(f"it holds {len(images) - before} samples")
            except BadShard as problem:  # with a right checksum: the store was made like this
                raise UserError(
                    f"{folder / name} cannot be used: {problem}",
                    cure="make the store again with `stillroom synthesize`",
                ) from problem
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Samples(pixels, [record["caption"] for record in records], records)


# --- for training -----------------------------------------------------------------------------------------------------
