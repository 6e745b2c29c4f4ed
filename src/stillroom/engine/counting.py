"""What operations take, counted while they are gone through: bytes and floating-point operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from stillroom.surgery.repeats import Unlike, again, outline, way
from stillroom.surgery.skeleton import Answered


class Counted(Answered):
    """Counts the bytes of all storages alive, gradients apart, and floating-point operations.

    ``peak``: the most bytes alive at once since :meth:`restart`; ``other``: the same without gradients. Works on fake
    tensors and on real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Any, int]] = {}
        self._gradients: set[int] = set()
        self.alive = self.in_gradients = 0
        self.restart()

    def restart(self) -> None:
        self.flops = 0
        self.peak, self.other = self.alive, self.alive - self.in_gradients

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is a new one."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.alive -= size
            if key in self._gradients:
                self._gradients.discard(key)
                self.in_gradients -= size

        self._known[key] = (weakref.ref(storage, freed), size)
        self.alive += size
        self.rise(0)

    def rise(self, size: int) -> None:
        """So many bytes more have been there for a moment."""
        self.peak = max(self.peak, self.alive + size)
        self.other = max(self.other, self.alive - self.in_gradients + size)

    def overlook(self, tensors: Iterable[Tensor]) -> None:
        """Count these storages as nothing: they are not on the device."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self._known[id(storage)] = (storage, 0)

    def is_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient has been summed up: its bytes are gradients from now on."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._known and key not in self._gradients:
            self._gradients.add(key)
            self.in_gradients += self._known[key][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(made, torch.device):
            return made
        for tensor in [made] if isinstance(made, Tensor) else tensors_in(made):
            self.see(tensor)
        self.flops += _flops(func, args, kwargs, made)
        return made


class KnownCalls:
    """In place of a network's ``forward``: of calls without gradient that are alike (the steps of a sampler, a teacher
    in every turn) the first alone is gone through, the others take as much and hand out the like."""

    def __init__(self, network: nn.Module, counted: Counted) -> None:
        self.network, self.counted = network, counted
        self.forward = network.forward
        self.found: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        counted, tensors = self.counted, list[Any]()
        key = None if torch.is_grad_enabled() else self._key(args, kwargs, tensors)
        if key is None:
            return self.forward(*args, **kwargs)
        if key not in self.found:
            made, self.found[key] = self._first(args, kwargs, tensors)
            return made
        if self.found[key] is None:
            return self.forward(*args, **kwargs)
        known, rise, flops = self.found[key]
        counted.rise(rise)
        counted.flops += flops
        made = again(known, tensors)
        for tensor in tensors_in(made):
            counted.see(tensor)
        return made

    def _key(self, args: Any, kwargs: Any, tensors: list[Any]) -> Any:
        """What the call depends on; None where it may do more than answer: hooks may keep something of it, and a
        derivative may run along."""
        if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
            return None
        modules = list(self.network.modules())
        hooks = (hook for m in modules for table in (m._forward_hooks, m._forward_pre_hooks) for hook in table.values())
        if not all(hasattr(hook, "of_engine") for hook in hooks):
            return None
        voice = getattr(getattr(self.network, "lora_switch", None), "active", None)
        state = voice, tuple(m.training for m in modules), torch.is_autocast_enabled("cpu")
        try:
            key = state, outline(args, tensors), outline(kwargs, tensors)
            hash(key)
        except (Unlike, TypeError):
            return None
        return key

    def _first(self, args: Any, kwargs: Any, tensors: list[Any]) -> Any:
        """What is made, and how, with the bytes that are there at most on the way and the operations; None where
        anything else is left behind."""
        counted = self.counted
        before, peak, flops = counted.alive, counted.peak, counted.flops
        counted.peak = before
        made = self.forward(*args, **kwargs)
        rise, counted.peak = counted.peak - before, max(peak, counted.peak)
        try:
            known = way(made, tensors)
        except Unlike:
            return made, None
        asked = {tensor.untyped_storage()._cdata for tensor in tensors}
        new = storage_bytes(t for t in tensors_in(made) if t.untyped_storage()._cdata not in asked)
        return made, (known, rise, counted.flops - flops) if counted.alive - before == new else None


def _flops(func: Any, args: Any, kwargs: Any, made: Any) -> int:
    """By torch's own formulas; it has none for the CPU's fused attention, whose shapes are those of the others."""
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=made)) if formula else 0


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages behind the tensors, each counted once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def tensors_in(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
