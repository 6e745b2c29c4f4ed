"""What everything that must survive a crash or be trusted later is written and checked with."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
from pathlib import Path

from stillroom.errors import UserError

LARGEST_UNPACKED = 1 << 30
"""Bytes of a compressed file after its decompression."""


def sync(path: Path) -> None:
    """fsync a file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpacked(file: Path) -> bytes:
    """What a file holds, decompressed if its name ends in ``.gz``. Raises ValueError for a decompressed size above
    :data:`LARGEST_UNPACKED`, and OSError, EOFError or zlib.error for a file that cannot be read."""
    if file.suffix != ".gz":
        return file.read_bytes()
    with gzip.open(file) as opened:
        content = opened.read(LARGEST_UNPACKED + 1)
    if len(content) > LARGEST_UNPACKED:
        raise ValueError(f"it unpacks to more than {LARGEST_UNPACKED:,} bytes")
    return content


def stay_inside(place: Path) -> None:
    """Check a folder of the user's before it is read or written: none of its files may be another one elsewhere.

    A snapshot in Hugging Face's cache may link to the blobs of its own model. Raises UserError, naming the file, for a
    symbolic link that leads out of the folder or nowhere, and for pipes and devices, which could be read for ever. A
    place that is no folder is left to its reader.
    """
    whole = place.resolve()
    if whole.parent.name == "snapshots" and (whole.parents[1] / "blobs").is_dir():
        whole = whole.parents[1]
    waiting = [place] if place.is_dir() else []
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be read ({error.strerror})", cure="check its permissions") from None
        for entry in entries:
            if entry.is_symlink():
                _check_link(Path(entry.path), whole)
            elif entry.is_dir():
                waiting.append(Path(entry.path))
            elif not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                raise UserError(f"{entry.path} is neither a file nor a folder", cure="remove it")


def _check_link(path: Path, whole: Path) -> None:
    try:
        there = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise UserError(f"the symbolic link {path} leads nowhere", cure="remove it, or copy the file there") from None
    if not there.is_relative_to(whole):
        raise UserError(f"the symbolic link {path} leads out of its folder", cure="put a copy in its place")
    if not there.is_dir() and not there.is_file():
        raise UserError(f"{path} is neither a file nor a folder", cure="remove it")
