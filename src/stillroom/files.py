"""What everything that must survive a crash, be held by one process or be trusted later is written and checked with."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stillroom.errors import DiskFull, UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LARGEST_UNPACKED = 1 << 30
"""Bytes of a compressed file after its decompression."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EFBIG,
    errno.ELOOP, errno.EIO,
)  # fmt: skip
_NUMBER = re.compile(r"(?:os error|Errno) (\d+)\b")
"""safetensors and torch.distributed.checkpoint report the operating system's error as text only."""


# --- writing ----------------------------------------------------------------------------------------------------------
def refusal(error: Exception, place: str | Path = "") -> UserError | None:
    """What the operating system has refused (a full disk, no permission, a file in a folder's place) in one line that
    names ``place``, or the file that the error knows; None for another error."""
    found = _NUMBER.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    where = place or getattr(error, "filename", None) or "a file"
    if number in _NO_ROOM:
        return DiskFull(
            f"no space left on the disk while writing {where}; what was finished before is intact",
            cure="free some space, then resume",
        )
    if number in _REFUSED:
        return UserError(f"cannot write {where}: {os.strerror(number)}", cure="choose a folder of your own")
    return None


@contextlib.contextmanager
def writing(place: Path, *, full_disk_only: bool = False) -> Iterator[None]:
    """Turn what the operating system refuses (a full disk, no permission) into a ``UserError`` that names ``place``.

    full_disk_only: for code that does more than write; other errors pass.
    """
    try:
        yield
    except (UserError, TimeoutError):
        raise
    except Exception as error:
        refused = refusal(error, place)
        if refused is None and isinstance(error, OSError):
            refused = UserError(f"cannot write {place}: {error.strerror or error}", cure="choose a folder of your own")
        if refused is None or (full_disk_only and not isinstance(refused, DiskFull)):
            raise
        raise refused from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are not there yet. Raises UserError for what the operating system
    refuses."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write(path: Path, content: str | bytes | Callable[[Path], object], aside: Path | None = None) -> None:
    """Write or replace a file: after a crash at any moment it holds the old content or the new, never a part.

    content: text, bytes, or what writes the file that it is given. aside: where the new content waits, on the same
    disk; by default beside ``path``, under a name that no other process uses. Raises UserError for what the operating
    system refuses.
    """
    aside = aside or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            if callable(content):
                content(aside)
            else:
                aside.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(aside)
            os.replace(aside, path)
        except Exception:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- holding ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file ``path`` and hold it; the operating system frees it at death. Not to be taken twice."""
    from filelock import FileLock

    make_folder(path.parent)
    with writing(path):
        lock = FileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process, which may hold it several times over; the operating system frees it at
    death. Raises ``UserError`` if another process holds it."""
    from filelock import Timeout

    make_folder(folder)
    lock = _folder_lock(folder)
    try:
        with writing(folder):
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"the run folder {folder} is in use by another process", cure="wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def in_use(folder: Path) -> bool:
    """Whether a living process holds the folder."""
    if not (folder / ".lock").is_file():
        return False
    lock = _folder_lock(folder)
    if lock.is_locked:
        return True
    try:
        with lock.acquire(timeout=0):
            return False
    except OSError as error:
        return isinstance(error, TimeoutError)


def _folder_lock(folder: Path) -> BaseFileLock:
    from filelock import FileLock

    return FileLock((folder / ".lock").resolve(), thread_local=False, is_singleton=True)


# --- checking ---------------------------------------------------------------------------------------------------------
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
