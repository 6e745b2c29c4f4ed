"""What is made once and kept: the cache folder, and tensors in it by a key that names all that they depend on."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def cache_folder() -> Path:
    """``$STILLROOM_CACHE``, else ``$XDG_CACHE_HOME/stillroom``, else ``~/.cache/stillroom``."""
    if chosen := os.environ.get("STILLROOM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stillroom"


def cached_tensors(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gives, kept in the cache under ``key``, which must name all that it depends on."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    file = cache_folder() / "statistics" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError):
        made = make()

    def keep() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        aside.write_bytes(save(made))
        aside.replace(file)

    _writable(keep)
    return made


def _writable(action: Callable[[], None]) -> bool:
    """A cache that cannot be written costs time, not results."""
    try:
        action()
    except OSError:
        return False
    return True


def kept_tensors(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gave once; it lies in the cache."""
    file = cache_folder() / "glosses" / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        if not file.exists():
            aside = Path(f"{file}.part")
            save_file({key: value.contiguous() for key, value in make().items()}, aside)
            aside.replace(file)
    return load_file(file)
