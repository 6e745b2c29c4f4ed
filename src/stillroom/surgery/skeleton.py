"""Networks without weights: made from their configs alone, of fake tensors that have a shape and no memory, so that
what a training takes can be known before anything is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.folders.transformers_layout import auto_config
from stillroom.surgery.repeats import repeated

NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where a fake tensor's values would be needed."""

_MODE: ContextVar[FakeTensorMode | None] = ContextVar("skeleton", default=None)


@contextmanager
def weights_unread() -> Iterator[FakeTensorMode]:
    """Inside, everything that reads a model folder makes the network from its config instead. Yields the mode that its
    fake tensors belong to."""
    mode, ordinary = FakeTensorMode(allow_non_fake_inputs=True), nn.Module._apply
    token = _MODE.set(mode)
    nn.Module._apply = _convert  # type: ignore[method-assign]  # torch's own fails where a fake tensor stays as it is
    copied, Tensor.__deepcopy__ = Tensor.__deepcopy__, _copied  # type: ignore[method-assign]  # and this for buffers
    try:
        yield mode
    finally:
        Tensor.__deepcopy__ = copied  # type: ignore[method-assign]
        nn.Module._apply = ordinary  # type: ignore[method-assign]
        _MODE.reset(token)


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``: what stands behind ``.to()`` and ``.float()``."""
    for child in module.children() if recurse else ():
        child._apply(function)
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in tables:
        for name, tensor in tensors.items():
            if tensor is not None:
                with torch.no_grad():
                    new = function(tensor)
                if new is not tensor:
                    weight = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(new, tensor.requires_grad) if weight else new
    return module


def _copied(tensor: Tensor, known: dict[int, Any]) -> Tensor:
    """``copy.deepcopy`` of a tensor, without a look at its storage."""
    if id(tensor) not in known:
        new = tensor.detach().clone()
        known[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return known[id(tensor)]


def unread() -> bool:
    """Whether weights are left where they are (:func:`weights_unread`)."""
    return _MODE.get() is not None


@contextmanager
def making() -> Iterator[None]:
    """Around the making of networks: their tensors are fake where weights are left unread, and ordinary ones else."""
    mode = _MODE.get()
    if mode is None:
        yield
    else:
        with mode, Answered():
            yield


class Answered(TorchDispatchMode):
    """Answers for the values that fake tensors lack, where the answer is clear: checks are passed, a seed is 0, and a
    mask is true everywhere, so that as many words are counted as there is room for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which takes longer than most of what is done here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default and hasattr(args[0], "answer"):
            return args[0].answer
        kwargs = kwargs or {}
        if kwargs.get("device") == _META and forward_ad._current_level >= 0:
            # what torch's rules for derivatives along a direction take a fake tensor's device for
            kwargs = {**kwargs, "device": _CPU}
        made = repeated(func, args, kwargs)
        if func in _ANSWERS and isinstance(made, FakeTensor):
            made.answer = _ANSWERS[func]  # type: ignore[attr-defined]
        elif func is torch.ops.aten.sum.dim_IntList and isinstance(made, FakeTensor) and args[0].dtype == torch.bool:
            made.answer = args[0].numel() // max(made.numel(), 1)  # type: ignore[attr-defined]
        elif func in _PARTS and hasattr(args[0], "answer"):
            for part in made if isinstance(made, list | tuple) else [made]:
                part.answer = args[0].answer
        return made


_DEVICE = torch.ops.prim.device.default
_META, _CPU = torch.device("meta"), torch.device("cpu")
_ANSWERS: dict[Any, Any] = {
    torch.ops.aten.all.default: True,
    torch.ops.aten.any.default: False,
    torch.ops.aten.randint.default: 0,
    torch.ops.aten.randint.low: 0,
}
_PARTS = (torch.ops.aten.select.int, torch.ops.aten.unbind.int)
"""Whose results have the values of what they are parts of."""


def from_config(cls: Any, folder: Path) -> nn.Module:
    """A network of a class of diffusers or transformers, made from the ``config.json`` in its folder."""
    with making():
        if hasattr(cls, "load_config"):  # diffusers
            return cls.from_config(cls.load_config(folder)).eval()
        config = auto_config(folder)
        if hasattr(cls, "config_class") and cls.config_class and not isinstance(config, cls.config_class):
            config = cls.config_class.from_pretrained(folder, local_files_only=True)
        return (
            cls.from_config(config, trust_remote_code=False) if cls.__name__.startswith("Auto") else cls(config)
        ).eval()


def pipeline_from_configs(cls: Any, folder: Path, index: Mapping[str, Any]) -> Any:
    """A pipeline of a class of diffusers whose networks have no weights; ``index``: its ``model_index.json``."""
    import diffusers
    import transformers

    given: dict[str, Any] = {key: value for key, value in index.items() if not key.startswith("_")}
    for name, value in given.items():
        if not isinstance(value, list) or len(value) != 2 or any(isinstance(word, int | float) for word in value):
            continue  # a setting
        library, kind = value
        places = (diffusers, transformers, getattr(diffusers.pipelines, str(library), None))
        part = next((getattr(place, str(kind)) for place in places if hasattr(place, str(kind))), None)
        if library is None or part is None or name == "safety_checker":
            given[name] = None
        elif isinstance(part, type) and issubclass(part, nn.Module):
            given[name] = from_config(part, folder / name)
        else:
            given[name] = part.from_pretrained(folder / name, local_files_only=True)
    return cls(**given)


def unshared(thing: Any) -> Any:
    """A copy of a network, or of what holds networks, in which parameters and buffers can be replaced: they are still
    the same tensors, so it takes no memory."""
    return copy.deepcopy(thing, {id(tensor): tensor for tensor in _tensors(thing)})


def tensors_in(thing: Any, depth: int = 5) -> Iterator[Tensor]:
    """Tensors of networks and data in it, as deep as tasks hold them."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.parameters()
        yield from thing.buffers()
    elif depth:
        if isinstance(thing, Mapping):
            inner: Any = thing.values()
        elif isinstance(thing, list | tuple):
            inner = thing
        else:
            inner = vars(thing).values() if hasattr(thing, "__dict__") and not isinstance(thing, type) else ()
        for one in inner:
            yield from tensors_in(one, depth - 1)


def _tensors(thing: Any, depth: int = 3) -> Iterator[Tensor]:
    """Those of the networks in it, as deep as pipelines and finished models hold them."""
    if isinstance(thing, nn.Module):
        yield from thing.parameters()
        yield from thing.buffers()
    elif depth:
        inner = thing if isinstance(thing, list | tuple) else vars(thing).values() if hasattr(thing, "__dict__") else ()
        for one in inner:
            yield from _tensors(one, depth - 1)


def emptied(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace what is left of ordinary parameters and buffers by fake ones, in place. Shared ones stay shared."""
    known: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in known:
                    with mode:
                        fake = tensor.detach().new_empty(tensor.shape)
                    is_weight = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = (tensor, nn.Parameter(fake, tensor.requires_grad) if is_weight else fake)
                tensors[name] = known[id(tensor)][1]
    return module
