"""A small stack of blocks, and what test_taps.py runs on it under torchrun: taps on networks under DDP and FSDP2 and
the same networks on one process. Prints the name of each part that holds."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from stillroom.engine.distributed import World, full
from stillroom.surgery.taps import Taps

TAPS = {"inner": "blocks.2.inner", "block": "blocks.1"}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.runs = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.runs += 1
        h = self.outer(self.inner(x).tanh())
        return x + (h if scale is None else scale * h)


class Stack(nn.Module):
    def __init__(self, width: int = 4, depth: int = 4, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def whole(gradients: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else full(g) for g in gradients]


def trained(network: nn.Module, taps: Taps, x: Tensor, use_output: bool) -> list[Tensor | None]:
    """Gradients of a loss on the taps, with or without the network's own output. Twice: the second pass must not feel
    the first."""
    for _ in range(2):
        network.zero_grad()
        output, features = taps(x)
        loss = features["inner"].square().mean()
        if use_output:
            loss = loss + features["block"].abs().mean() + output.square().mean()
        loss.backward()
    return whole(p.grad for p in network.parameters())


def sharded(network: nn.Module, world: World) -> nn.Module:
    mesh = init_device_mesh("cpu", (world.size,))
    for block in network.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return fully_shard(network, mesh=mesh, reshard_after_forward=True)


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        # FSDP2 leaves None where one process has no gradient at all
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def main() -> None:
    torch.set_num_threads(1)
    world = World.join("cpu")
    holds = checked(world)
    gc.collect()  # wrapped networks hold the process group, whose threads must end before the interpreter does
    if world.first:
        print(*holds)
    world.leave()


def checked(world: World) -> list[str]:
    torch.manual_seed(0)
    network, x = Stack(), torch.randn(6, 4)
    mine = x[3 * world.rank : 3 * world.rank + 3]
    holds = []

    expected = trained(alone := copy.deepcopy(network), Taps(alone, TAPS), x, True)
    wrapped = DistributedDataParallel(copy.deepcopy(network))
    same(trained(wrapped, Taps(wrapped, TAPS), mine, True), expected)
    holds.append("ddp")

    for before in (True, False):  # hooks made before and after sharding
        student = copy.deepcopy(network)
        taps = Taps(student, TAPS) if before else None
        student = sharded(student, world)
        same(trained(student, taps or Taps(student, TAPS), mine, True), expected)
    holds.append("student")

    # a gradient that enters a unit by a tap inside it, and never by its output
    expected = trained(alone := copy.deepcopy(network), Taps(alone, TAPS), x, False)
    student = sharded(copy.deepcopy(network), world)
    same(trained(student, Taps(student, TAPS), mine, False), expected)
    holds.append("inner")

    teacher = sharded(copy.deepcopy(network).requires_grad_(False), world)
    _, reference = Taps(network, TAPS)(mine)
    with torch.no_grad(), Taps(teacher, TAPS, early_exit=True) as taps:
        for _ in range(2):
            _, features = taps(mine)
            for name in TAPS:
                torch.testing.assert_close(features[name], reference[name].detach())
    assert teacher.blocks[3].runs == 0  # type: ignore[union-attr]
    assert all(p.device_mesh.size() == 2 for p in teacher.parameters())  # type: ignore[attr-defined]
    torch.testing.assert_close(teacher(mine), network(mine))
    holds.append("exit")
    return holds


if __name__ == "__main__":
    main()
