"""What operations on fake tensors make, kept from the first time: torch takes a third of a millisecond to find out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Unlike(Exception):
    """An argument or a result whose like cannot be told."""


class _New(NamedTuple):
    """A tensor on the storage of the argument number ``base``, or on one of its own (-1)."""

    base: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: Any  # torch says: a whole number, or a symbol for one
    device: torch.device
    state: dict[str, Any]


class _Given(NamedTuple):
    """The argument number ``place`` itself."""

    place: int


_KNOWN: dict[Any, Any] = {}
"""By an operation and its arguments' types and shapes: how to make what it makes, or ``Unlike``."""


def repeated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``func(*args, **kwargs)``, made by what is known where it was called with such tensors and numbers before.

    What fake tensors make depends on types and shapes alone. What changes these, needs values, or takes tensors of
    other kinds is left to torch each time."""
    tensors: list[FakeTensor] = []
    key: Any = None
    try:
        key = (func, outline(args, tensors), outline(kwargs, tensors), torch.get_default_dtype())
        known = _KNOWN.get(key, _New) if tensors else Unlike
    except (Unlike, TypeError):  # TypeError: an argument that has no hash
        known = Unlike
    if known is Unlike:
        return func(*args, **kwargs)
    if known is not _New:
        return again(known, tensors)
    made = func(*args, **kwargs)
    try:
        same = key[1:3] == (outline(args, []), outline(kwargs, []))
        _KNOWN[key] = way(made, tensors) if same else Unlike
    except Unlike:
        _KNOWN[key] = Unlike
    return made


def outline(thing: Any, tensors: list[FakeTensor]) -> Any:
    """What of an argument the result's shape may depend on; the tensors in it are added to ``tensors``."""
    kind = type(thing)
    if kind is FakeTensor:
        if not _plain(thing):
            raise Unlike
        tensors.append(thing)
        return thing.shape, thing.stride(), thing.dtype, thing.storage_offset(), thing.fake_device
    if kind is list or kind is tuple:
        return tuple([outline(part, tensors) for part in thing])
    if kind is dict:
        return tuple([(name, outline(part, tensors)) for name, part in thing.items()])
    if isinstance(thing, Tensor):
        raise Unlike
    return kind, thing  # 1 and 1.0 are not alike


def _plain(tensor: FakeTensor) -> bool:
    return tensor.constant is None and tensor.layout is torch.strided and not tensor.dtype.is_complex


def way(made: Any, tensors: Sequence[FakeTensor]) -> Any:
    """How to make the like of what was made from ``tensors`` (:func:`again`). Raises Unlike where that is not told."""
    return _way(made, tensors, set())


def _way(made: Any, tensors: Sequence[FakeTensor], own: set[int]) -> Any:
    """``own``: the storages so far that are no argument's."""
    if type(made) in (list, tuple):
        return type(made)([_way(part, tensors, own) for part in made])
    if made is None:
        return None
    for place, tensor in enumerate(tensors):
        if tensor is made:
            return _Given(place)
    if type(made) is not FakeTensor or not _plain(made) or made.requires_grad:
        raise Unlike
    storage = made.untyped_storage()
    shape, stride = tuple(made.shape), made.stride()
    bases = [place for place, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage._cdata]
    if not bases:
        extent = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if made.storage_offset() or storage._cdata in own or storage.nbytes() != extent * made.itemsize:
            raise Unlike
        own.add(storage._cdata)
    elif len(bases) > 1:
        raise Unlike
    state = {name: value for name, value in vars(made).items() if name not in ("fake_mode", "answer")}
    return _New(bases[0] if bases else -1, shape, stride, made.dtype, made.storage_offset(), made.fake_device, state)


def again(known: Any, tensors: Sequence[FakeTensor]) -> Any:
    """The like of what :func:`way` has seen, from such tensors."""
    with torch._C._DisableTorchDispatch():
        return _again(known, tensors)


def _again(known: Any, tensors: Sequence[FakeTensor]) -> Any:
    kind = type(known)
    if kind is _New:
        if known.base < 0:
            made = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        else:
            storage = tensors[known.base].untyped_storage()
            made = torch.empty(0, dtype=known.dtype, device="meta")
            made.set_(storage, known.offset, known.shape, known.stride)  # type: ignore[call-overload]
        fake = Tensor._make_subclass(
            FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=known.device
        )
        fake.__dict__.update(known.state)  # a third of the time that its own constructor takes
        fake.fake_mode = tensors[0].fake_mode
        return fake
    if kind is _Given:
        return tensors[known.place]
    if kind is list:
        return [_again(part, tensors) for part in known]
    if kind is tuple:
        return tuple([_again(part, tensors) for part in known])
    return None
