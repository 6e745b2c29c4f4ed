"""Rows of tensors that are made once and kept: shards with checksums, resumable, written by several processes.

``outputs-00000.safetensors`` holds a shard, one row of each tensor for each row; ``outputs.json`` the SHA-256 of every
shard and what the rows were made from. Until all are there, ``plan.json`` says what is being made, and each
finished shard has an entry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch import distributed as dist

from stillroom.data.store import encode_json
from stillroom.errors import UserError
from stillroom.files import digest, make_folder, stay_inside, write
from stillroom.parsing import parse_json, read_json

FORMAT = 1
PLAN = "plan.json"
Made = tuple[dict[str, Tensor], dict[str, Any]]
"""A shard's tensors, and facts about it for the index."""


@dataclass(frozen=True)
class RowStore:
    """A kind of store. what: what its rows are called, in file names and messages (``outputs``)."""

    what: str

    @property
    def index(self) -> str:
        return f"{self.what}.json"

    def is_complete(self, folder: str | Path) -> bool:
        return (Path(folder) / self.index).is_file()

    def write(
        self, folder: str | Path, about: Mapping[str, Any], count: int, make: Callable[[Tensor], Made], shard: int
    ) -> None:
        """Make ``count`` rows, ``shard`` to a file: ``make`` is given row numbers, int64 ``[R]``. What is already there
        and whole is not made again; under several processes each makes its part.

        about: what the rows depend on, as JSON has it. Raises UserError where the folder holds rows of something else,
        and for a disk that cannot be written.
        """
        folder = Path(folder)
        plan = folder / PLAN
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if rank == 0:
            make_folder(folder)
            self.check_same(read_json(plan) if plan.is_file() else about, about, folder)
            write(plan, encode_json(dict(about)))
        _wait(size)
        starts = range(0, count, shard)
        for number in range(rank, len(starts), size):
            path = folder / self._file(number)
            entry = path.with_suffix(".json")
            if entry.is_file() and path.is_file() and read_json(entry).get("sha256") == digest(path):
                continue
            rows = torch.arange(starts[number], min(starts[number] + shard, count))
            tensors, facts = make(rows)
            write(path, save(tensors))
            write(entry, encode_json({"sha256": digest(path), "count": len(rows), **facts}))
        _wait(size)
        if rank == 0:
            files = [self._file(number) for number in range(len(starts))]
            entries = [(folder / file).with_suffix(".json") for file in files]
            shards = {file: read_json(entry) for file, entry in zip(files, entries, strict=True)}
            write(folder / self.index, encode_json({"format": FORMAT, "about": dict(about), "shards": shards}))
            for path in (*entries, plan):
                path.unlink()
        _wait(size)

    def _file(self, number: int) -> str:
        return f"{self.what}-{number:05d}.safetensors"

    def check_same(self, found: Mapping[str, Any], wanted: Mapping[str, Any], folder: str | Path) -> None:
        """Raises UserError naming the first thing in which a store differs from what is wanted."""
        for key, value in wanted.items():
            if found.get(key) != value:
                raise UserError(
                    f"the {self.what} in {folder} were stored for another {key}: {found.get(key)}, not {value}",
                    cure="use the settings that they were made with, or choose another folder",
                )

    def read(self, folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Tensor]]:
        """``(about, entries of the shards, tensors)`` of a finished store; every shard is checked against its SHA-256.

        Raises UserError for a folder without one, and naming the shard that is missing or damaged.
        """
        about, entries, parts = self.shards(folder)
        return about, entries, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def shards(self, folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Tensor]]]:
        """As :meth:`read`, but the tensors of each shard apart: they lie in its file, and what of them is asked for is
        read then."""
        from stillroom.folders.weights import read_tensors

        folder = Path(folder)
        path = folder / self.index
        if not path.is_file():
            unfinished = (folder / PLAN).is_file()
            raise UserError(
                f"the {self.what} in {folder} are unfinished"
                if unfinished
                else f"{folder} holds no stored {self.what}",
                cure="write them with the same call again: what is there is kept",
            )
        try:
            index = parse_json(path.read_bytes())
            about, shards = index["about"], index["shards"]
            whole = index["format"] == FORMAT and len(shards) > 0
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged", cure="restore it from a copy") from error
        if not whole:
            raise UserError(f"{path} has another format", cure="read it with the version that wrote it")
        parts = []
        stay_inside(folder)
        for name, entry in sorted(shards.items()):
            if Path(name).name != name:
                raise UserError(f"{path} names {name!r}, which is no file of its own", cure="restore the index")
            if not (folder / name).is_file() or digest(folder / name) != entry["sha256"]:
                state = "does not match its checksum" if (folder / name).is_file() else "is missing"
                raise UserError(
                    f"shard {folder / name} {state}",
                    cure=f"restore it from a copy, or delete it and {self.index} and store the {self.what} again",
                )
            parts.append(read_tensors(folder / name))
        return about, [shards[name] for name in sorted(shards)], parts


def _wait(size: int) -> None:
    if size > 1:
        dist.barrier()
