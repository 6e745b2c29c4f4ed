"""Checkpoints that survive a crash at any moment: written aside, synced, renamed; checksummed. Tensors are safetensors,
all else is one JSON manifest: reading one runs no code."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.engine.distributed import World
from stillroom.errors import UserError, reading
from stillroom.files import digest, sync, write, writing
from stillroom.parsing import parse_json

MANIFEST = "manifest.json"
FORMAT = 1

log = logging.getLogger("stillroom")


class BadCheckpoint(Exception):
    """A checkpoint folder that cannot be trusted; the message says why."""


class Checkpoints:
    """The checkpoints of a run, ``folder/step-0000100/`` each, the last ``keep`` of them kept."""

    def __init__(self, folder: Path, keep: int = 2, world: World | None = None) -> None:
        self.folder, self.keep, self.world = folder, keep, world or World()

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints present, good or bad, in order."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())

    # --- writing --------------------------------------------------------------------------------------------------
    def save(
        self, step: int, files: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, Any], sharded: bool = False
    ) -> None:
        """Write ``{file stem: {name: tensor}}`` and ``info`` as the checkpoint of ``step``; collective.

        Raises ``UserError`` on a full disk, with all earlier checkpoints intact.
        """
        final, aside = self.path(step), self.folder / f".step-{step:07d}.tmp"
        try:
            self._together(final, lambda: self._clear(aside))
            written = self._together(
                final, lambda: self._write_sharded(aside, files) if sharded else self._write_whole(aside, files)
            )
            manifest = {
                **info,
                "format": FORMAT,
                "step": step,
                "sharded": sharded,
                "files": {name: entry for part in written for name, entry in part.items()},
                "tensors": {
                    name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
                    for tensors in files.values()
                    for name, tensor in tensors.items()
                },
            }
            self._together(final, lambda: self._commit(aside, final, manifest))
        except UserError:
            if self.world.first:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _together(self, final: Path, act: Callable[[], Any]) -> list[Any]:
        """Every process's outcome of ``act``; a full disk on one is a ``UserError`` on all."""
        outcome, failure = None, None
        try:
            with writing(final, full_disk_only=True):
                outcome = act()
        except UserError as error:
            failure = error
        outcomes = self.world.gather([outcome, failure and [failure.message, failure.cure]])
        for _, message in outcomes:
            if message:
                raise failure or UserError(*message)
        return [outcome for outcome, _ in outcomes]

    def _clear(self, aside: Path) -> None:
        if self.world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(".*.tmp"):
                shutil.rmtree(left_over)
            aside.mkdir()

    def _write_whole(self, aside: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        from safetensors.torch import save_file

        written = {}
        if self.world.first:
            for stem, tensors in files.items():
                path = aside / f"{stem}.safetensors"
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
                sync(path)
                written[path.name] = {"sha256": digest(path), "bytes": path.stat().st_size}
        return written

    def _write_sharded(self, aside: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        tensors = {name: tensor.detach() for group in files.values() for name, tensor in group.items()}
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True))
        mine = f"shard-{self.world.rank + 1:05d}-"
        written = {}
        for path in sorted(aside.iterdir()):
            if path.name.startswith(mine):
                sync(path)
                written[path.name] = {"sha256": digest(path), "bytes": path.stat().st_size}
        return written

    def _commit(self, aside: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        if not self.world.first:
            return
        write(aside / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():
            shutil.rmtree(final)
        os.rename(aside, final)
        sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(step), ignore_errors=True)

    # --- reading --------------------------------------------------------------------------------------------------
    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint whose every file is as it was written; else raises ``BadCheckpoint``."""
        folder = self.path(step)
        try:
            manifest = parse_json((folder / MANIFEST).read_bytes())
            files = dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(f"its {MANIFEST} is missing or unreadable") from error
        if manifest.get("format") != FORMAT:
            raise BadCheckpoint(f"its format is {manifest.get('format')!r}; this version reads {FORMAT}")
        for name, entry in files.items():
            if Path(name).name != name:
                raise BadCheckpoint(f"its {MANIFEST} names {name!r}, which is no file of its own")
            path = folder / name
            if not path.is_file():
                raise BadCheckpoint(f"{name} is missing")
            if path.stat().st_size != entry["bytes"] or digest(path) != entry["sha256"]:
                raise BadCheckpoint(f"{name} does not match its checksum")
        return manifest

    def newest(self) -> dict[str, Any] | None:
        """The manifest of the newest good checkpoint, with a warning for every bad one passed over; None if none.

        Raises ``UserError`` if there are checkpoints and all are bad.
        """
        found: dict[str, Any] | None = None
        reason = ""
        if self.world.first:
            for step in reversed(self.steps()):
                try:
                    found = self.manifest(step)
                    break
                except BadCheckpoint as error:
                    log.warning("checkpoint %s is damaged: %s; trying the one before it", self.path(step), error)
                    reason = reason or f"step {step}: {error}"
        found, reason = self.world.share([found, reason])
        if found is None and reason:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({reason})",
                cure="delete the folder to train from the start, or restore it from a copy",
            )
        return found

    def forget_after(self, step: int) -> None:
        """Remove checkpoints later than ``step``: damaged ones that a resumed run has passed over."""
        if self.world.first:
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self.path(later))
        self.world.barrier()

    def read(self, manifest: Mapping[str, Any], into: Mapping[str, Tensor]) -> None:
        """Copy the checkpoint's tensors into ``into`` (in place, by name; whole or sharded on either side)."""
        folder = self.path(manifest["step"])
        if manifest["sharded"]:
            self._read_sharded(folder, into)
        else:
            self._read_whole(folder, manifest, into)

    def _read_whole(self, folder: Path, manifest: Mapping[str, Any], into: Mapping[str, Tensor]) -> None:
        from safetensors import safe_open

        for name in manifest["files"]:
            with reading(folder / name), safe_open(folder / name, framework="pt") as file, torch.no_grad():
                for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    target = into[key]
                    target.copy_(_like(file.get_tensor(key), target))

    def _read_sharded(self, folder: Path, into: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

        with reading(folder), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=self.world.size == 1)
            except CheckpointException as error:  # no Exception of Python's
                raise ValueError(str(error).strip().splitlines()[-1]) from error


def _like(value: Tensor, target: Tensor) -> Tensor:
    """``value`` laid out as ``target`` is: each process keeps its own shard, nothing is sent."""
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)
