"""Memory that `stillroom plan` predicts, against what the trainer then takes.

    python benchmarks/plan_memory.py

Predicted: on tensors without values, from configs. Measured: the real trainer on the CPU, weights, data and all;
torch's profiler reports every allocation and release during a turn, and their highest sum is added to what was there.
Several processes are measured as one of them whose peers do nothing (torch's "fake" process group).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from common import Row, record
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from stillroom.engine.rehearsal import storage_bytes
from stillroom.engine.trainer import Trainer
from stillroom.method import get_method
from stillroom.models.mae import make_encoder
from stillroom.planning import plan
from stillroom.recipe import Recipe
from stillroom.tasks import make_task
from stillroom.tasks.base import build_method

LIMIT = 0.15
CHECKPOINTING = "engine.activation_checkpointing=true"
LIGHTGEN = ("synthesis.pairs=64", "options.head_steps=2")
UNTRAINED = {"dmae": ("mae-nano", "mae-micro")}
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
    ("meal-v2", 1, ("engine.batch=8",)),
    ("meal-v2", 1, ("engine.batch=32",)),
    ("dmae", 1, ("engine.batch=8",)),
    ("dmae", 1, ("engine.batch=32",)),
    ("dmae", 1, ("engine.batch=32", CHECKPOINTING)),
    ("lightgen", 1, ("engine.batch=8", *LIGHTGEN)),
    ("lightgen", 1, ("engine.batch=32", *LIGHTGEN)),
    ("lightgen", 2, ("engine.batch=32", "engine.parallel=fsdp", "options.dpo_share=0")),
    ("lightgen", 4, ("engine.batch=32", "engine.parallel=fsdp", "options.dpo_share=0")),
)


class Measured(Trainer):
    """A trainer that notes the most memory of each turn of each stage, in bytes, after a first step."""

    def measure(self) -> dict[tuple[str, str], int]:
        self.peaks: dict[tuple[str, str], int] = {}
        for span in self.spans:
            self.method.stage = span.stage
            self._enter(span, resumed=False)
            cycle = math.lcm(*(player.period for player in self.players.values()))
            for step in (0, cycle, cycle + 1):
                self.step = self.method.step = span.start + step
                batches = [self._to_device(span.data.batch(0, self.step, self.config.batch, r)) for r in self._rows]
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
        before = storage_bytes(map(_local, there))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self._take_turn(player, batches, shared)
        assert seen.profiler is not None
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyrefly: ignore
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        self.peaks[key] = max(self.peaks.get(key, 0), before + most)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def peers(world: int) -> Iterable[None]:  # type: ignore[misc]
    """As the first of ``world`` processes, the others of which do nothing."""
    import os

    from torch import distributed as dist
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
    untrained = UNTRAINED.get(recipe.method)
    task.load(recipe, [make_encoder(name, 1, 28) for name in untrained] if untrained else None)
    with peers(world):
        return Measured(build_method(recipe, task), task.data, recipe.engine, show=False).measure()


def compare(method: str, world: int, changes: tuple[str, ...]) -> list[Row]:
    """A row for each turn."""
    recipe = Recipe.load(method, [*changes, "engine.device=cpu"])
    found = measured(recipe, world)
    rows: list[Row] = []
    for turn in plan(recipe, world=world).turns:
        real = max(found[stage, turn.turn] for stage in turn.stages)
        what = [change.partition(".")[2] for change in changes if change not in LIGHTGEN]
        rows.append(
            {
                "method": method,
                "processes": world,
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


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    rows = [row for case in CASES if not wanted or case[0] in wanted for row in compare(*case)]
    if wanted:
        return
    worst = max(abs(row["error, %"]) for row in rows)
    record(
        "Memory of a plan",
        f"`stillroom plan` predicts the memory of every turn within {LIMIT:.0%} of what the trainer takes (shipped "
        "recipes with the changes in the table; the most of three steps on the CPU, by torch's profiler, and with "
        f"several processes on one whose peers do nothing; worst: {worst:.1f}%).",
        "python benchmarks/plan_memory.py",
        rows,
        worst <= 100 * LIMIT,
    )


if __name__ == "__main__":
    main()
