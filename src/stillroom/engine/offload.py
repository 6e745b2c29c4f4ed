"""Weights that no turn trains, kept in host memory and copied to the device while they are used."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from stillroom.errors import UserError
from stillroom.method import Method

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
CAST = (nn.Linear, nn.modules.conv._ConvNd)
"""Modules all of whose weights autocast rounds: they are copied as it would round them."""


def untrained(method: Method) -> list[nn.Parameter]:
    """The weights that no turn trains."""
    roles = {role for turn in method.turns() for role in turn.trains}
    made = [role for role in roles if isinstance(getattr(method, role, None), nn.Module)]  # others come in prepare()
    trained = {id(p) for role in made for p in method.trained_parameters(role).values()}
    return [p for p in method.parameters() if id(p) not in trained]


class Weight(NamedTuple):
    """One place of a weight: ``owner._parameters[name]``."""

    owner: nn.Module
    name: str
    value: nn.Parameter


@dataclass
class _Frame:
    """A module that is running, what it has brought to the device, and the hooks for what autograd saves of it."""

    module: nn.Module
    brought: list[Weight] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    hooks: AbstractContextManager = field(default_factory=nullcontext)


class _Saved(NamedTuple):
    """What autograd keeps of a copied weight in place of the copy."""

    value: nn.Parameter
    dtype: torch.dtype
    layout: tuple[Any, Any, Any]  # size, stride, offset


class Offload:
    """Holds the untrained weights of a method in host memory (``held``).

    A module that has no list of modules inside brings all its weights when it is called and drops them when it is done:
    at any time the device has those of one block, or of one part of a block. What autograd would save of a copy for the
    backward pass is a note where it came from, and the backward pass copies that one weight again. So nothing depends
    on the order in which parts run, and a weight is the same number wherever it is used.

    Weights of a module that has lists inside (a position table, a mask token) stay on the device: they may be used at
    any time. Recomputed blocks (activation checkpointing) keep their copies for their own backward pass.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        self.device = device
        self._running: list[_Frame] = []
        self._copies: dict[int, tuple[nn.Parameter, torch.dtype]] = {}  # by the storage of a copy
        self._handles: list[Any] = []
        wanted = {id(p) for p in untrained(method) if p.ndim}  # single numbers are not worth a trip
        self.scopes: dict[nn.Module, list[Weight]] = {}
        for module in method.modules():
            if not any(isinstance(part, LISTS) for part in module.modules()):
                places = [(owner, *entry) for owner in module.modules() for entry in owner._parameters.items()]
                weights = [Weight(owner, name, p) for owner, name, p in places if p is not None and id(p) in wanted]
                if weights:
                    self.scopes[module] = weights
        found = (weight.value for weights in self.scopes.values() for weight in weights)
        self.held: list[nn.Parameter] = list({id(p): p for p in found}.values())

    def start(self, method: Method) -> None:
        """Move the held weights to host memory, all others to the device, and watch the modules."""
        kept = {id(p) for p in self.held}
        method._apply(lambda t: t.cpu() if id(t) in kept else t.to(self.device))
        if self.device.type == "cuda":
            for p in self.held:
                p.data = p.data.pin_memory()
        enter, leave = self._hooks()
        for module in self.scopes:
            self._handles += [
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ]
        for module in method.modules():
            module.__dict__["runs_on"] = self.device

    def again(self, method: Method) -> Offload:
        """In place of this one, when the method may have other networks. Raises UserError where nothing is frozen."""
        self.stop()
        new = Offload(method, self.device)
        if not new.held:
            raise UserError(
                "engine.offload is on, but every weight of this method is trained", cure="set engine.offload to false"
            )
        new.start(method)
        return new

    def handed_over(self, method: Method) -> list[nn.Parameter]:
        """The frozen weights, where FSDP2 takes over from here."""
        self.stop()
        return untrained(method)

    def stop(self) -> None:
        """Leave the modules alone; the weights stay where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hooks(self) -> tuple[Any, Any]:
        """Plain functions, which a copy of a module keeps without copying this object; on a copy they do nothing."""

        def enter(module: nn.Module, args: Any) -> None:
            if module in self.scopes:
                self._enter(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._running and self._running[-1].module is module:
                self._leave()

        enter.of_engine = leave.of_engine = True  # type: ignore[attr-defined]
        return enter, leave

    def _enter(self, module: nn.Module) -> None:
        frame = _Frame(module)
        self._running.append(frame)
        copies: dict[tuple[int, torch.dtype], Tensor] = {}
        for weight in self.scopes[module]:
            owner, name, p = weight
            if owner._parameters[name] is not p:
                continue  # an outer module has brought it
            dtype = self._dtype(owner, p)
            copy = copies.get((id(p), dtype))
            if copy is None:
                copy = copies[id(p), dtype] = self._copy(p, dtype)
                key = copy.untyped_storage()._cdata
                self._copies[key] = (p, dtype)
                frame.keys.append(key)
            owner._parameters[name] = copy  # type: ignore[assignment]
            frame.brought.append(weight)
        # One pair of hooks acts at a time. Where another does, it is activation checkpointing, which saves no weights.
        if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            frame.hooks = saved_tensors_hooks(self._pack, self._unpack)
        frame.hooks.__enter__()

    def _leave(self) -> None:
        frame = self._running.pop()
        frame.hooks.__exit__(None, None, None)
        for owner, name, p in frame.brought:
            owner._parameters[name] = p
        for key in frame.keys:
            del self._copies[key]

    def _dtype(self, owner: nn.Module, p: Tensor) -> torch.dtype:
        kind = self.device.type
        rounded = isinstance(owner, CAST) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if rounded else p.dtype

    @torch.no_grad()
    def _copy(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        return p.to(self.device, copy=True, non_blocking=True).to(dtype)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        found = self._copies.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor.detach()
        return _Saved(*found, (tensor.size(), tensor.stride(), tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return self._copy(saved.value, saved.dtype).as_strided(*saved.layout)


def place(method: Method, device: torch.device, offload: bool) -> Offload | None:
    """The method to the device, but for what ``engine.offload`` keeps in host memory."""
    if not offload:
        method.to(device)
        return None
    made = Offload(method, device)
    made.start(method)
    return made
