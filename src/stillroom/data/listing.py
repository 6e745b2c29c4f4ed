"""Which files of a user's folder are data, and which are left out, counted so that it can be told."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

_SYSTEM = {
    "__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "lost+found",
}  # fmt: skip


def hidden(name: str) -> bool:
    """Whether a system or a tool keeps the file or folder for itself: ``.DS_Store``, ``._a.png`` (macOS's companion of
    a.png), ``.ipynb_checkpoints``, ``__MACOSX``."""
    return name.startswith(".") or name in _SYSTEM


def seen(folder: Path) -> list[Path]:
    """What stands in a folder, by name, without what is hidden."""
    return sorted(path for path in folder.iterdir() if not hidden(path.name))


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and the folders in it, by path, without what is hidden."""
    for path in seen(folder):
        if path.is_dir():
            yield from files_below(path)
        elif path.is_file():
            yield path


def left_out(folder: Path, read: Iterable[Path]) -> str:
    """`` (left out: 3 files: 2 .heic, 1 hidden)``, of all files of ``folder`` that are not ``read``; or nothing."""
    known = {str(path) for path in read}
    used = {path.relative_to(folder).parts[0] for path in map(Path, known)} if known else set()
    kinds: Counter[str] = Counter()
    for place, _, names in os.walk(folder):
        parts = Path(place).relative_to(folder).parts
        for name in names:
            if str(Path(place, name)) in known:
                continue
            if any(map(hidden, (*parts, name))):
                kinds["hidden"] += 1
            elif parts and parts[0] not in used:
                kinds[f"in {parts[0]}/"] += 1
            else:
                kinds[Path(name).suffix.lower() or name] += 1
    if not kinds:
        return ""
    count, named = kinds.total(), [f"{number:,} {kind}" for kind, number in kinds.most_common(5)]
    more = kinds.total() - sum(number for _, number in kinds.most_common(5))
    told = ", ".join(named + [f"{more:,} others"] * bool(more))
    return f" (left out: {count:,} {'file' if count == 1 else 'files'}: {told})"
