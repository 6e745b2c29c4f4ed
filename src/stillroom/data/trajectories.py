"""A teacher's guided paths from noise to data, computed once and kept: the states that a guided sampler visits, their
times, conditions and scales, and what the teacher answered there (arXiv 2503.07274).

The store is that of stored outputs: shards with checksums, resumable. A path follows from its number and the seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.data.rows import RowStore
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import visited
from stillroom.draws import mix
from stillroom.surgery.modules import weights_hash

TRAJECTORIES = RowStore("trajectories")
COND = "cond."
"""Before the names of conditions among the tensors of a store."""
KEPT_APART = ("states", "answers")
"""Of a store: too much for memory."""


@dataclass(frozen=True)
class Paths:
    """Which paths. count: of them; conditions are taken in turn. steps: of the sampler; all its states are kept, or the
    two ``ends`` alone. eta: 0 is the deterministic sampler, 1 the ancestral one. low, high: guidance scales are uniform
    between them. precision: of states and answers."""

    count: int
    steps: int = 50
    eta: float = 0.0
    low: float = 1.0
    high: float = 1.0
    seed: int = 0
    keep: Literal["all", "ends"] = "all"
    precision: Literal["float16", "float32"] = "float16"


class Pieces:
    """Rows of a tensor that lie in several others, one after another: indexed as the whole one would be, by numbers of
    rows and what follows, or by ``:`` and what follows. Of pieces in files only what is asked for is read."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = list(parts)
        self.starts = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)

    def __getitem__(self, index: tuple[Any, ...]) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0][index]
        rows, *rest = index
        if isinstance(rows, slice):
            return torch.cat([part[index] for part in self.parts])
        rows = torch.as_tensor(rows)
        rest = [torch.as_tensor(one).expand_as(rows) for one in rest]
        piece = torch.searchsorted(self.starts, rows, right=True) - 1
        found = rows.new_empty(len(rows), *self.parts[0].shape[1 + len(rest) :], dtype=self.parts[0].dtype)
        for number in piece.unique().tolist():
            here = piece == number
            own = (rows[here] - self.starts[number], *(one[here] for one in rest))
            found[here] = self.parts[number][own]
        return found


class Trajectories:
    """``noise [N, ...]`` that paths began with, ``end [N, ...]`` where they ended, ``scale [N]`` and ``cond`` by name;
    with all states kept also ``states [N, T, ...]``, ``answers [N, T, ...]`` in the teacher's own output space and
    ``times [N, T]``. parts: of the paths, in their order; states and answers stay where they are."""

    def __init__(self, *parts: Mapping[str, Tensor]) -> None:
        tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key not in KEPT_APART}
        self.cond = {key.removeprefix(COND): value for key, value in tensors.items() if key.startswith(COND)}
        self.noise, self.end, self.scale = tensors["noise"], tensors["end"], tensors["scale"]
        self.states, self.answers = (
            Pieces([part[key] for part in parts]) if key in parts[0] else None for key in KEPT_APART
        )
        self.times = tensors.get("times")

    @property
    def n(self) -> int:
        return len(self.scale)

    @property
    def size(self) -> int:
        """States in all."""
        assert self.times is not None
        return self.times.numel()

    def read(self, rows: Tensor) -> dict[str, Any]:
        """States by number, int64 ``[B]``, 0 .. size - 1: ``x_t``, ``answer`` (float32), ``t``, ``scale``, ``cond``."""
        assert self.states is not None
        assert self.answers is not None
        assert self.times is not None
        path, step = rows // self.times.shape[1], rows % self.times.shape[1]
        return {
            "x_t": self.states[path, step].float(),
            "answer": self.answers[path, step].float(),
            "t": self.times[path, step],
            "scale": self.scale[path],
            "cond": {name: value[path] for name, value in self.cond.items()},
        }


def conditions(data: Any, seed: int, count: int) -> dict[str, Tensor]:
    """Of ``count`` rows of ``data``, ``[count, ...]`` by name. The rows are asked for some at a time, so that no more
    of their pictures are in memory."""
    rows = max(ROWS, -(-count // 64))  # each time the order of all of them is looked up
    parts = [data.batch(seed, 0, count, slice(k, min(k + rows, count)))["cond"] for k in range(0, count, rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def paths_for(data: Any, teacher: Denoiser, paths: Paths, folder: str = "", batch: int = 64) -> Trajectories:
    """:func:`trajectories` for conditions of ``data``, whose images are not looked at; for a plan's teacher, which has
    no values, :func:`blank` ones."""
    if type(next(teacher.parameters()).detach()) is not Tensor:
        return blank(teacher, conditions(data, paths.seed, 1), paths)
    cond = conditions(data, paths.seed, paths.count)
    name = weights_hash(teacher.network) if folder else ""  # only what is kept has to be known again
    return trajectories(folder, teacher, cond, paths, name=name, batch=batch)


ROWS = 256
"""Of data, that are in memory at a time while their conditions are read."""
SHARD_BYTES = 2**31
"""A shard of states and answers is smaller, one path apart, so that little need be in memory while they are made."""


def trajectories(
    folder: str | Path,
    teacher: Denoiser,
    cond: Cond,
    paths: Paths,
    *,
    name: str,
    batch: int = 64,
    shard: int = 256,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Trajectories:
    """What is in ``folder``, after writing it where that is still to be done; no folder: made and held in memory.

    cond: conditions ``[C, ...]`` by name. name: of the teacher, by which the store knows it again: a hash of its
    weights. report: ``(paths done, of how many)``. Raises UserError as :class:`~stillroom.data.rows.RowStore` does.
    """
    kept = paths.steps if paths.keep == "all" else 1
    numbers = 2 * kept * math.prod(teacher.shape)  # of one path: states and answers, or its two ends
    shard = max(1, min(shard, SHARD_BYTES // (numbers * getattr(torch, paths.precision).itemsize)))
    batch = min(batch, shard) if str(folder) else batch
    batches = -(-paths.count // batch)
    done = 0

    def made(rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        nonlocal done
        parts = []
        for chosen in rows.split(batch):
            parts.append(_walked(teacher, cond, paths, chosen))
            done += 1
            report(min(done * batch, paths.count), paths.count)
        return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}, {}

    if not str(folder):
        return Trajectories(made(torch.arange(paths.count))[0] if batches else {})
    about = {"teacher": name, "paths": asdict(paths), "conditions": _hash(cond)}
    if not TRAJECTORIES.is_complete(folder):
        TRAJECTORIES.write(folder, about, paths.count, made, shard)
    found, _, parts = TRAJECTORIES.shards(folder)
    TRAJECTORIES.check_same(found, about, folder)
    return Trajectories(*parts)


def blank(teacher: Denoiser, cond: Cond, paths: Paths) -> Trajectories:
    """One path of zeros: for a plan, in which no tensor has values."""
    shape = (1, paths.steps, *teacher.shape)
    found = {"noise": torch.zeros(1, *teacher.shape), "end": torch.zeros(1, *teacher.shape), "scale": torch.ones(1)}
    found |= {"states": torch.zeros(shape), "answers": torch.zeros(shape), "times": torch.zeros(shape[:2])}
    return Trajectories(found | {f"{COND}{name}": value[:1] for name, value in cond.items()})


@torch.no_grad()
def _walked(teacher: Denoiser, cond: Cond, paths: Paths, rows: Tensor) -> dict[str, Tensor]:
    """Paths by number, ``[R, ...]`` of each tensor, on the CPU."""
    weight = next(teacher.parameters(), torch.empty(0))
    device, kept = weight.device, getattr(torch, paths.precision)
    generators = [torch.Generator().manual_seed(mix("path", paths.seed, int(row))) for row in rows]
    noise = torch.stack([torch.randn(teacher.shape, generator=one) for one in generators])
    share = torch.stack([torch.rand((), generator=one) for one in generators])
    scale = paths.low + (paths.high - paths.low) * share
    which = rows % max((len(value) for value in cond.values()), default=1)
    own = {name: value[which].to(device) for name, value in cond.items()}

    def fresh() -> Tensor:
        return torch.stack([torch.randn(teacher.shape, generator=one) for one in generators]).to(device)

    guidance: Tensor | float = scale.to(device) if paths.low != 1 or paths.high != 1 else 1.0
    states, answers, times, end = [], [], [], noise
    x, grid = noise.to(device), teacher.process.grid(paths.steps).to(noise)
    for p in visited(teacher, x, grid, own, guidance, paths.eta, fresh):
        if paths.keep == "all":
            states.append(p.x_t.to(kept).cpu())
            answers.append(p.value.to(kept).cpu())
            times.append(p.t.expand(len(rows)).cpu())
        end = p.x0
    found = {"noise": noise.to(kept), "end": end.to(kept).cpu(), "scale": scale}
    found |= {f"{COND}{name}": value[which].cpu() for name, value in cond.items()}
    if paths.keep == "all":
        found |= {"states": torch.stack(states, 1), "answers": torch.stack(answers, 1), "times": torch.stack(times, 1)}
    return found


def _hash(cond: Cond) -> str:
    digest = hashlib.sha256()
    for name in sorted(cond):
        digest.update(f"{name}{cond[name].dtype}{list(cond[name].shape)}".encode())
        digest.update(cond[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
