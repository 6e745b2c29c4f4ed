"""A step on two processes: gradients averaged by the engine's buckets, against DistributedDataParallel.

    python benchmarks/two_processes.py

DMD2 with GAN, both players in every step, on the fashion teacher's network, two gloo processes on one machine. The
three ways take their steps in turns, each on a method of its own, on the same batches, so that whatever else happens
falls on all. DistributedDataParallel gets a wrapper for each turn; without a search for unused parameters it may be
used only where there never are any, as here.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import Row, median, record
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.bench.teach import TeacherRecipe
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import World, finished
from stillroom.engine.stepper import Stepper
from stillroom.method import Batch, Method, get_method

BATCH, WARM_UP, STEPS = 8, 5, 80
WAYS = {"buckets of the engine": None, "DDP, unused searched": True, "DDP, none unused": False}


class TurnModule(nn.Module):
    def __init__(self, method: Method, name: str) -> None:
        super().__init__()
        self.method, self.function = method, getattr(method, name)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return finished(self.function(batch))


class Wrapped:
    """A turn under DistributedDataParallel: its own parameters only."""

    def __init__(self, method: Method, name: str, trained: list[nn.Parameter], search: bool) -> None:
        module, mine = TurnModule(method, name), {id(p) for p in trained}
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        ignored = [name for name, tensor in named if id(tensor) not in mine]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        self.call = DistributedDataParallel(
            module, broadcast_buffers=False, init_sync=False, find_unused_parameters=search
        )

    def begin(self, last: bool) -> None: ...

    def averaging(self) -> AbstractContextManager:
        return nullcontext()


def stepper(search: bool | None) -> Stepper:
    cls = get_method("dmd2")
    method = cls(cls.Options(critic_turns=1, gan_weight=3e-3))  # type: ignore[call-arg]
    method.build(copy.deepcopy(TeacherRecipe.load("fashion").denoiser()))
    optim: dict[str, Any] = {"all": {"name": "adamw", "lr": 1e-4, "clip_norm": 2.0}}
    made = Stepper(method, ClassImagesBench().train, EngineConfig(steps=1000, batch=BATCH, device="cpu", optim=optim))
    for player in made.players.values() if search is not None else ():
        made.focus(player)
        player.runner = Wrapped(method, player.turn.name, player.trained, search)  # type: ignore[assignment]
    return made


def work(found: Path) -> None:
    """What each of the two processes does; the first writes the seconds of each step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = World.join("cpu")
    steppers = {name: stepper(search) for name, search in WAYS.items()}
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for step in range(WARM_UP + STEPS):
        for name, made in steppers.items():
            world.barrier()
            began = time.perf_counter()
            made.take_step()
            if step >= WARM_UP:
                taken[name].append(time.perf_counter() - began)
    ours, *others = ([p.detach() for p in made.method.parameters()] for made in steppers.values())
    apart = max(float((a - b).abs().max()) for other in others for a, b in zip(ours, other, strict=True))
    if world.first:
        found.write_text(json.dumps({"seconds": taken, "apart": apart}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run([*launch, __file__, "--work", str(found)], check=True)
        told = json.loads(found.read_text())
    ours, *_ = told["seconds"].values()
    rows: list[Row] = [
        {
            "way": name,
            "steps timed": len(times),
            "step, ms": 1000 * median(times),
            "time of its step over that of the engine's": median(b / a for a, b in zip(ours, times, strict=True)),
        }
        for name, times in told["seconds"].items()
    ]
    record(
        "Two processes",
        f"A step on two processes (gloo on one machine; DMD2 with GAN, batch {BATCH}, median of interleaved steps). "
        f"After them the weights of the three ways differ by at most {told['apart']:.1e}.",
        "python benchmarks/two_processes.py",
        rows,
    )


if __name__ == "__main__":
    main()
