"""Trackers: the rows of ``metrics.jsonl``, as they are written, for TensorBoard, trackio or Weights & Biases.

``metrics.jsonl`` stays the source of truth. A tracker that opens is first given the rows that the file holds (none, or
after a resume those up to the checkpoint) and must then show each of them once, whatever it was told before.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stillroom.errors import UserError, nearest
from stillroom.files import write

PROJECT = "stillroom"
Row = Mapping[str, Any]


class Tracker(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Numbers as scalars in the run's ``tensorboard/``, which a resume writes anew."""

    def __init__(self, run_dir: Path, rows: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(str(folder))
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Service(ABC):
    """What trackio and wandb share: ``init``, ``log(row, step)``, ``finish``. Rows up to the last step that they
    have seen are not sent again: the run's ``<name>.step`` says which that was."""

    name = ""

    def __init__(self, run_dir: Path, rows: Sequence[Row]) -> None:
        self.module: Any = importlib.import_module(self.name)
        self.seen = run_dir / f"{self.name}.step"
        resumed = self.seen.is_file()
        self.last = int(self.seen.read_text()) if resumed else 0
        self.begin(run_dir, resumed)
        for row in rows:
            self.write(row)

    @abstractmethod
    def begin(self, run_dir: Path, resumed: bool) -> None: ...

    def write(self, row: Row) -> None:
        if row["step"] > self.last:
            self.last = row["step"]
            write(self.seen, f"{self.last}\n")  # first: a crash in between costs a row, none comes twice
            self.module.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        self.module.finish()


class Trackio(Service):
    """trackio's own store on this machine; project ``stillroom``, run by the folder's name."""

    name = "trackio"

    def begin(self, run_dir: Path, resumed: bool) -> None:
        self.module.init(
            project=PROJECT, name=run_dir.name, resume="allow" if resumed else "never", auto_log_cpu=False,
            auto_log_gpu=False,
        )  # fmt: skip


class WandB(Service):
    """Weights & Biases into the run's ``wandb/``: offline unless ``WANDB_MODE`` says otherwise."""

    name = "wandb"

    def begin(self, run_dir: Path, resumed: bool) -> None:
        identity = run_dir / "wandb.id"
        if not identity.is_file():
            identity.write_text(f"{secrets.token_hex(4)}\n")
        mode = os.environ.get("WANDB_MODE") or "offline"
        self.module.init(
            project=PROJECT, name=run_dir.name, dir=str(run_dir), mode=mode, id=identity.read_text().strip(),
            resume="allow" if resumed and mode == "online" else None,
        )  # fmt: skip


TRACKERS: dict[str, Callable[[Path, Sequence[Row]], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def names_of(track: str) -> list[str]:
    """The trackers in a comma-separated list. Raises UserError for unknown names, and for one given twice."""
    names = [name.strip() for name in track.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"recipe key 'track': no tracker {name!r}{nearest(name, TRACKERS)}",
                cure=f"known: {', '.join(TRACKERS)}; several by commas",
            )
    if len(set(names)) < len(names):
        raise UserError(f"recipe key 'track' names one tracker twice: {track!r}", cure="give each once")
    return names


def check_installed(names: Iterable[str]) -> None:
    """Raises UserError where the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracking by {name} needs the package {name}", cure="pip install 'stillroom[track]'")
