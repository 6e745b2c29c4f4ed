"""Memory that `stillroom plan` predicts, against what the trainer then takes.

    python benchmarks/plan_memory.py            all; METHOD, gloo or ddp: only those rows anew, the others stay

Predicted: on tensors without values, from configs. Measured: the real trainer on the CPU, weights, data and all;
torch's profiler reports every allocation and release during a turn, and their highest sum is added to what was there.
Two processes are the first of two that torchrun starts (gloo); where a network is too slow for that, one of them whose
peers do nothing (torch's "fake" process group). What ``engine.offload`` keeps in host memory is not counted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import OUT, Row, record
from torch import Tensor
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from stillroom.engine.counting import storage_bytes
from stillroom.engine.offload import untrained
from stillroom.engine.trainer import Trainer
from stillroom.method import get_method
from stillroom.networks.mae import make_encoder
from stillroom.planning import plan
from stillroom.recipe import Recipe
from stillroom.task import make_task
from stillroom.training import build_method

LIMIT = 0.15
CHECKPOINTING = "engine.activation_checkpointing=true"
OFFLOAD = "engine.offload=true"
DDP, FSDP = "engine.parallel=ddp", "engine.parallel=fsdp"
LIGHTGEN = ("options.synthesis.pairs=64", "options.head_steps=2")
UNTRAINED = {"dmae": {"student": "mae-nano", "teacher": "mae-micro"}}
"""Networks in place of those that would be trained first; memory does not depend on the weights."""
CASES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("dmd2", 1, ("engine.batch=8",)),
    ("dmd2", 1, ("engine.batch=32",)),
    ("dmd2", 1, ("engine.batch=32", CHECKPOINTING)),
    ("dmd2", 1, ("engine.batch=32", "engine.precision=bf16")),
    ("dmd2", 1, ("engine.batch=32", "engine.accumulate=4")),
    ("swiftbrush", 1, ("engine.batch=8",)),
    ("swiftbrush", 1, ("engine.batch=32",)),
    ("swiftbrush", 1, ("engine.batch=32", CHECKPOINTING)),
    ("sid-lsg", 1, ("engine.batch=8",)),
    ("sid-lsg", 1, ("engine.batch=32",)),
    ("sid-lsg", 1, ("engine.batch=32", CHECKPOINTING)),
    ("sid-lsg", 1, ("engine.batch=8", OFFLOAD)),
    ("swiftbrush", 1, ("engine.batch=8", OFFLOAD)),
    ("swiftbrush", 1, ("engine.batch=8", OFFLOAD, CHECKPOINTING)),
    ("meal-v2", 1, ("engine.batch=8",)),
    ("meal-v2", 1, ("engine.batch=32",)),
    ("dmae", 1, ("engine.batch=8",)),
    ("dmae", 1, ("engine.batch=32",)),
    ("dmae", 1, ("engine.batch=32", CHECKPOINTING)),
    ("lightgen", 1, ("engine.batch=8", *LIGHTGEN)),
    ("lightgen", 1, ("engine.batch=32", *LIGHTGEN)),
    ("lightgen", 2, ("engine.batch=32", FSDP, "options.dpo_share=0")),
    ("lightgen", 4, ("engine.batch=32", FSDP, "options.dpo_share=0")),
)
PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("dmd2", ("engine.batch=8", DDP)),
    ("dmd2", ("engine.batch=32", DDP)),
    ("dmd2", ("engine.batch=8", FSDP)),
    ("dmd2", ("engine.batch=32", FSDP)),
    ("dmd2", ("engine.batch=8", FSDP, CHECKPOINTING)),
    ("swiftbrush", ("engine.batch=8", DDP)),
    ("swiftbrush", ("engine.batch=8", DDP, OFFLOAD)),
    ("sid-lsg", ("engine.batch=8", FSDP)),
    ("sid-lsg", ("engine.batch=8", FSDP, OFFLOAD)),
    ("meal-v2", ("engine.batch=8", DDP)),
    ("dmae", ("engine.batch=8", DDP)),
    ("dmae", ("engine.batch=8", FSDP)),
)
"""Recipes that two gloo processes run."""


class Measured(Trainer):
    """A trainer that notes the most memory of each turn of each stage, in bytes, after a first step."""

    def measure(self) -> dict[tuple[str, str], int]:
        self.peaks: dict[tuple[str, str], int] = {}
        for span in self.spans:
            self.method.stage = span.stage
            self.enter(span, resumed=False)
            cycle = math.lcm(*(player.period for player in self.players.values()))
            for step in (0, cycle, cycle + 1):
                self.step = self.method.step = span.start + step
                batches = [self.to_device(span.data.batch(0, self.step, self.config.batch, r)) for r in self.rows]
                shared: list[dict[str, Any]] = [{} for _ in batches]
                for player in self.players.values():
                    due = span.stage.turns is None or player.turn.name in span.stage.turns
                    if due and step % player.period == 0:
                        self._watch(player, batches, shared, (span.stage.name, player.turn.name))
        return self.peaks

    def _watch(self, player: Any, batches: list[Any], shared: list[Any], key: tuple[str, str]) -> None:
        states = [state for p in self.players.values() for state in p.optimizer.state.values()]
        averages = [value for average in self.averages.values() for value in average.values.values()]
        there = [*self.method.parameters(), *self.method.buffers(), *averages]
        there += [leaf for leaf in tree_leaves([states, batches, shared]) if isinstance(leaf, Tensor)]
        held = () if self.offload is None else untrained(self.method) if self.sharded else self.offload.held
        before = storage_bytes(map(_local, there)) - storage_bytes(map(_local, held))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.take_turn(player, batches, shared)
        now = most = 0
        for change in _changes(seen):
            now += change
            most = max(most, now)
        self.peaks[key] = max(self.peaks.get(key, 0), before + most)


def _changes(seen: profile) -> list[int]:
    """Bytes of every allocation, and minus those of every release, in order."""
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyrefly: ignore
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def peers(world: int) -> Iterable[None]:  # type: ignore[misc]
    """As the first of ``world`` processes, the others of which do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if world == 1:
        yield
        return
    os.environ["WORLD_SIZE"] = str(world)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        del os.environ["WORLD_SIZE"]


def measured(recipe: Recipe, world: int) -> dict[tuple[str, str], int]:
    task = make_task(get_method(recipe.method).task, recipe.teacher)
    names = UNTRAINED.get(recipe.method, {})
    task.load(recipe, {role: make_encoder(name, 1, 28) for role, name in names.items()})
    with peers(world):
        return Measured(build_method(recipe, task.given, task.check), task.data, recipe.engine, show=False).measure()


def first_of_two(cases: list[tuple[str, tuple[str, ...]]]) -> list[dict[tuple[str, str], int]]:
    """Peaks of the first of two gloo processes for each case."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "cases.json", Path(folder) / "found.json"
        wanted.write_text(json.dumps(cases))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run([*launch, __file__, "--of-two", str(wanted), str(found)], check=True)
        return [{(stage, turn): peak for stage, turn, peak in case} for case in json.loads(found.read_text())]


def of_two(wanted: Path, found: Path) -> None:
    """What each of the two does."""
    peaks = [measured(read(method, changes), 1) for method, changes in json.loads(wanted.read_text())]
    if dist.get_rank() == 0:
        found.write_text(json.dumps([[(*key, peak) for key, peak in case.items()] for case in peaks]))
    dist.barrier()
    dist.destroy_process_group()


def read(method: str, changes: Iterable[str]) -> Recipe:
    return Recipe.load(method, [*changes, "engine.device=cpu"])


def compare(
    method: str, world: int, changes: tuple[str, ...], found: dict[tuple[str, str], int], peers: str = ""
) -> list[Row]:
    """A row for each turn. found: what was measured."""
    rows: list[Row] = []
    for turn in plan(read(method, changes), world=world).turns:
        real = max(found[stage, turn.turn] for stage in turn.stages)
        what = [change.partition(".")[2] for change in changes if change not in LIGHTGEN]
        rows.append(
            {
                "method": method,
                "processes": f"{world}, {peers}" if peers else world,
                "recipe": ", ".join(what),
                "stage": turn.stages[0],
                "turn": turn.turn,
                "predicted, MB": turn.total / 1e6,
                "measured, MB": real / 1e6,
                "error, %": 100 * (turn.total / real - 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def merged(rows: list[Row]) -> list[Row]:
    """The recorded rows, these in the place of their own."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("method", "processes", "recipe", "stage", "turn"))

    new = {key(row): row for row in rows}
    return [new.get(key(row), row) for row in json.loads((OUT / "plan_memory.json").read_text())["rows"]]


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--of-two"]:
        of_two(*map(Path, sys.argv[2:]))
        return
    wanted = sys.argv[1:]
    rows: list[Row] = []
    for method, world, changes in CASES:
        if not wanted or method in wanted:
            peaks = measured(read(method, changes), world)
            rows += compare(method, world, changes, peaks, "idle peers" if world > 1 else "")
    pairs = [case for case in PAIRS if not wanted or "gloo" in wanted or ("ddp" in wanted and DDP in case[1])]
    for (method, changes), peaks in zip(pairs, first_of_two(pairs) if pairs else (), strict=True):
        rows += compare(method, 2, changes, peaks, "gloo")
    if wanted:
        rows = merged(rows)
    worst = max(abs(row["error, %"]) for row in rows)
    record(
        "Memory of a plan",
        f"`stillroom plan` predicts the memory of every turn within {LIMIT:.0%} of what the trainer takes (shipped "
        "recipes with the changes in the table; the most of three steps on the CPU, by torch's profiler; with several "
        f"processes on the first of two that talk over gloo, or on one whose peers do nothing; worst: {worst:.1f}%).",
        "python benchmarks/plan_memory.py",
        rows,
        worst <= 100 * LIMIT,
    )


if __name__ == "__main__":
    main()
