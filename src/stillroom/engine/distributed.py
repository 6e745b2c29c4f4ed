"""One process or many: who am I, what do we agree on, and how a method is spread over processes."""

from __future__ import annotations

import gc
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from stillroom.errors import UserError
from stillroom.method import Method, Parted, Terms, Turn


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process (collective); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass(frozen=True)
class World:
    """This process among its peers. With ``size == 1`` every operation is the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def join(cls, device: str = "auto") -> World:
        """Join the process group that ``torchrun`` describes in the environment; alone where there is none."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise UserError(f"engine.device is {device!r}", cure="use auto, cpu or cuda") from error
        if place.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "engine.device is 'cuda', but torch sees no CUDA device", cure="set engine.device to cpu or auto"
            )
        if size == 1:
            return cls(device=place)
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(place)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), place)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes; a NaN anywhere is a NaN everywhere."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor = tensor / self.size
        return tensor

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                sent = tensor.detach().to(self.device)  # what engine.offload holds elsewhere is sent from here
                dist.broadcast(sent, 0)
                if sent.device != tensor.device:
                    tensor.detach().copy_(sent)

    def share(self, value: Any) -> Any:
        """Rank 0's JSON value, on every process."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        length = torch.tensor([len(text)], device=self.device)
        dist.broadcast(length, 0)
        data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.first:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return json.loads(bytes(data.cpu().tolist()))

    def gather(self, value: Any) -> list[Any]:
        """Every process's JSON value, in rank order, on every process."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        length = torch.tensor([len(text)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        data = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        parts = [torch.zeros_like(data) for _ in range(self.size)]
        dist.all_gather(parts, data)
        return [json.loads(bytes(part[: int(n)].cpu().tolist())) for part, n in zip(parts, lengths, strict=True)]

    def leave(self) -> None:
        """Leave the process group. The barrier keeps gloo from aborting while a peer still talks; what still holds the
        group in a circle of references is collected, so that its threads end before the interpreter does."""
        if self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
            gc.collect()


def finished(terms: Terms) -> dict[str, Tensor]:
    """The terms, with those made that wait."""

    def made(term: Tensor | Callable[[], Tensor] | Parted) -> Tensor:
        if isinstance(term, Parted):
            return term.now + term.later()
        return term() if callable(term) else term

    return {name: made(term) for name, term in terms.items()}


class Plain:
    """A turn on one process."""

    def __init__(self, method: Method, turn: Turn) -> None:
        self.call = getattr(method, turn.name)

    def begin(self, last: bool) -> None:
        """A micro-batch follows, the ``last`` of its step or not."""

    def averaging(self) -> AbstractContextManager:
        """Around the last backward pass of a step: behind it the gradients are those of all processes."""
        return nullcontext()


BUCKET = 25 * 2**20
"""Bytes of gradients that processes send each other at a time."""


class Bucket:
    """Gradients of one type that travel together, and behind them a number for each: above 0 where any process has that
    gradient at all."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        # as a gradient lies in memory: like its weight, but dense
        self.strides = [torch.empty_like(p, device="meta").stride() for p in self.parameters]
        self.ends = list(itertools.accumulate(p.numel() for p in self.parameters))
        self.awaited: set[Tensor] = set()
        self.absent: list[tuple[int, Tensor]] = []

    def send(self, size: int) -> None:
        """Start to average over ``size`` processes. Each gradient becomes a view of what is sent, so there is no second
        copy of any."""
        first, total = self.parameters[0], self.ends[-1]
        self.sent = torch.empty(total + len(self.ends), dtype=first.dtype, device=first.device)
        self.sent[total:] = 1.0
        self.absent = []
        for k, (p, strides, end) in enumerate(zip(self.parameters, self.strides, self.ends, strict=True)):
            view = self.sent.as_strided(p.shape, strides, end - p.numel())
            if p.grad is None:
                view.zero_()
                self.sent[total + k] = 0.0
                self.absent.append((k, view))
            else:
                view.copy_(p.grad)
                p.grad = view
        self.sent /= size
        self.work = dist.all_reduce(self.sent, async_op=True)

    def receive(self) -> None:
        """The averages have come; a parameter that only other processes have a gradient of gets its own."""
        self.work.wait()
        if self.absent:  # else nobody need look
            elsewhere = self.sent[self.ends[-1] :].tolist()
            for k, view in self.absent:
                if elsewhere[k]:
                    self.parameters[k].grad = view
        del self.sent, self.work
        self.absent = []


def bucketed(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """What :class:`Bucket` takes at a time, in the order in which a backward pass comes by, more or less: the last ones
    first."""
    found: list[list[nn.Parameter]] = []
    room = 0
    for p in reversed(parameters):
        like = found and (found[-1][0].dtype, found[-1][0].device) == (p.dtype, p.device)
        if not like or p.nbytes > room:
            found.append([])
            room = BUCKET
        found[-1].append(p)
        room -= p.nbytes
    return found


class DataParallel:
    """A turn whose gradients are averaged over all processes; what a process lacks counts as zero, and what all of them
    lack stays without a gradient. Build it while the turn's trained parameters require grad.

    The buckets are sent in one order, which is the same on all processes: each as soon as the last backward pass has
    filled it, the others behind that pass. So nobody need know beforehand which parameters a step leaves unused, and a
    step may take several backward passes.
    """

    def __init__(self, method: Method, turn: Turn, trained: Sequence[nn.Parameter], size: int) -> None:
        self.call, self.size = getattr(method, turn.name), size
        self.buckets = [Bucket(parameters) for parameters in bucketed(trained)]
        self.bucket_of: dict[Tensor, Bucket] = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.listening, self.sent = False, 0
        for p in trained:
            p.register_post_accumulate_grad_hook(self._arrived)

    def begin(self, last: bool) -> None: ...

    @contextmanager
    def averaging(self) -> Iterator[None]:
        for bucket in self.buckets:
            bucket.awaited = set(bucket.parameters)
        self.listening, self.sent = True, 0
        try:
            yield
        finally:
            self.listening = False
        for bucket in self.buckets[self.sent :]:
            bucket.send(self.size)
        for bucket in self.buckets:
            bucket.receive()

    def _arrived(self, parameter: Tensor) -> None:
        if not self.listening:
            return
        bucket = self.bucket_of[parameter]
        if parameter not in bucket.awaited:
            raise RuntimeError("a gradient came twice in one backward pass, as reentrant checkpoints make it")
        bucket.awaited.remove(parameter)
        while self.sent < len(self.buckets) and not self.buckets[self.sent].awaited:
            self.buckets[self.sent].send(self.size)
            self.sent += 1


class Sharded:
    """A turn of a method that :func:`shard` has spread out."""

    def __init__(self, method: Method, turn: Turn) -> None:
        self.method, self.call = method, getattr(method, turn.name)

    def begin(self, last: bool) -> None:
        self.method.set_requires_gradient_sync(last)  # type: ignore[operator]

    def averaging(self) -> AbstractContextManager:
        return nullcontext()


def shard(method: Method, world: World, host: Collection[nn.Parameter] = ()) -> None:
    """FSDP2 over all networks of a method, frozen ones too: each element of every ``ModuleList`` (the blocks of a
    transformer) is a unit, then each network, and the method itself is the root, with its turns as forward methods.

    One root lets networks share modules (LoRA roles on one base) and lets a turn run them in any order and number. All
    parameters become DTensors. Every unit is resharded after its forward pass: a unit left unsharded by a pass without
    gradients would keep the ``requires_grad`` of that turn in the next one. host: weights whose shards stay in host
    memory, for which :func:`host_units` has found units.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    apart = {id(unit) for unit, _ in host_units(method, host)}
    mesh = init_device_mesh(world.device.type, (world.size,))
    # FSDP2 shards no scalars; those that never train (a CLIP model's temperature) stay whole
    frozen = [part for part in method.modules() if getattr(part, "is_frozen", False)]
    scalars = {p for part in frozen for p in part.parameters(recurse=False) if p.ndim == 0}
    ignored: dict[str, Any] = {"ignored_params": scalars} if scalars else {}
    for unit in [*shard_units(method), method]:
        if not isinstance(unit, FSDPModule):
            away = CPUOffloadPolicy(world.device.type == "cuda") if id(unit) in apart else OffloadPolicy()
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, offload_policy=away, **ignored)
            for entry in getattr(unit, "forward_methods", ()):  # what a network is asked besides forward()
                register_fsdp_forward_method(unit, entry)
    for turn in method.turns():  # FSDP2 wants all of a turn's passes inside the one call
        function = getattr(method, turn.name)
        setattr(method, turn.name, lambda batch, function=function: finished(function(batch)))
    for name in ("enter", "fit", *(turn.name for turn in method.turns())):
        register_fsdp_forward_method(method, name)


def shard_units(method: Method) -> list[nn.Module]:
    """What :func:`shard` gathers at a time, innermost first, the method itself apart."""
    units = [
        element
        for module in method.modules()
        if isinstance(module, nn.ModuleList)
        for element in module
        if not isinstance(element, nn.ModuleList | nn.ModuleDict)
    ]
    # Parts of a block that its network also calls from outside: diffusers' DiT asks its first block's embedding again.
    units += [module for module in method.modules() if type(module).__name__ == "CombinedTimestepLabelEmbeddings"]
    # innermost first: a unit takes the parameters that no unit inside it has taken
    units = [unit for unit in reversed(list(method.modules())) if any(unit is element for element in units)]
    for role in method.children():
        for whole in (
            role.values() if isinstance(role, nn.ModuleDict) else () if isinstance(role, nn.ModuleList) else (role,)
        ):
            network = getattr(whole, "network", None)
            units += [network, whole] if isinstance(network, nn.Module) else [whole]
    return units


def owned(method: Method) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The units of :func:`shard`, the method itself last, each with the parameters that no unit inside it has."""
    taken: set[int] = set()
    for unit in [*shard_units(method), method]:
        own = [p for p in unit.parameters() if id(p) not in taken]
        taken |= {id(p) for p in own}
        yield unit, own


def host_units(method: Method, host: Collection[nn.Parameter]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The units all of whose own parameters are among ``host``, with these. Raises UserError where a unit has others
    beside them."""
    wanted, found = {id(p) for p in host}, []
    for unit, own in owned(method):
        kept = [id(p) in wanted for p in own]
        if any(kept) and not all(kept):
            raise UserError(
                "engine.offload cannot part frozen weights from the trained ones in the same block under "
                "engine.parallel=fsdp (LoRA roles on one base)",
                cure="engine.parallel=ddp, which can, or copies in place of adapters",
            )
        if any(kept):
            found.append((unit, own))
    return found


def statistics(role: nn.Module) -> list[Tensor]:
    """Running statistics of a role's batch normalisations: what differs between processes that see different rows."""
    return [
        buffer
        for part in role.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        for buffer in part.buffers(recurse=False)
    ]
