"""Taps: read any named module's input or output while its network runs, by hooks, without touching the network.

    taps = Taps(teacher, {"hidden": "encoder.layer.8", "attention": Tap("encoder.layer.8.attention", "attention")})
    output, features = taps(**inputs)
    features["hidden"]  # [B, N, D]

A :class:`Taps` adds no parameters, no buffers and no submodules: ``state_dict`` keys stay as they are. It keeps no
features: they live as long as the :class:`Features` that a recording gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stillroom.errors import UserError, nearest

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Path segments that torch.compile and checkpoint wrappers put in; no path that a user writes holds them."""


@dataclass(frozen=True)
class Tap:
    """What to read, and where.

    path: the module, e.g. ``encoder.layer.3`` (a hidden state), ``encoder.layer.3.mlp`` (FFN),
        ``encoder.layer.3.attention.q_proj`` (queries ``[B, N, heads * head width]``, see :func:`split_heads`).
    read: ``output``; ``input``; or ``attention``, the attention probabilities ``[B, heads, queries, keys]`` that an
        attention module returns last (in train mode with the module's own dropout in them).
    item: which one where the module takes or returns several: a position, the name of a keyword argument (input) or
        field (output), or ``last`` for the last tensor returned (blocks of two streams, SD3 and Flux, return text first
        and image last).
    part: ``(i, n)``: the i-th of n equal parts of the last dimension, for fused projections: ``(0, 3)`` reads the
        queries of GPT-2's ``c_attn``.
    """

    path: str
    read: Literal["output", "input", "attention"] = "output"
    item: int | str = 0
    part: tuple[int, int] | None = None

    def of_output(self, output: Any) -> Tensor:
        if self.read == "attention":
            found = output[-1] if isinstance(output, tuple | list) else None
            if not isinstance(found, Tensor) or found.ndim != 4:
                raise UserError(
                    f"{self.path!r} returned no attention map",
                    cure="load the network with attn_implementation='eager' (or call "
                    "network.set_attn_implementation('eager')), and tap the attention module itself; "
                    "fused attention never makes the map",
                )
        elif isinstance(output, Tensor):
            found = output
        elif self.item == "last":
            found = next((part for part in reversed(output) if isinstance(part, Tensor)), None)
        else:
            found = _item(output, self.item)
        return self._tensor(found, output)

    def of_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if isinstance(self.item, str):
            found = kwargs.get(self.item)
        else:
            values = (*args, *kwargs.values())
            found = values[self.item] if self.item < len(values) else None
        return self._tensor(found, kwargs if isinstance(self.item, str) else args)

    def _tensor(self, found: Any, of: Any) -> Tensor:
        if not isinstance(found, Tensor):
            names = f", which has {', '.join(map(str, of))}" if isinstance(of, Mapping) else ""
            raise UserError(
                f"item {self.item!r} of the {self.read} of {self.path!r} is a {type(found).__name__}, not a tensor"
                f"{names}",
                cure="name a position or a field that holds one: Tap(path, read, item)",
            )
        if self.part is None:
            return found
        index, count = self.part
        if found.shape[-1] % count or not 0 <= index < count:
            raise UserError(
                f"{self.path!r}: part {self.part} of {found.shape[-1]} channels does not exist",
                cure="part is (index, number of equal parts), e.g. (0, 3) for the queries of a fused q, k, v",
            )
        return found.chunk(count, -1)[index]


def _item(output: Any, item: int | str) -> Any:
    try:
        return output[item]
    except (IndexError, KeyError, TypeError):
        return None


class Features(Mapping[str, Tensor]):
    """What one recording read, by the names of the taps. Indexing wants a tap that was reached exactly once; a network
    that is run twice, or that shares a module between layers, is read by :meth:`calls`."""

    def __init__(self, names: Iterable[str], early_exit: bool) -> None:
        self._calls: dict[str, list[Tensor]] = {name: [] for name in names}
        self.with_gradients, self.early_exit = torch.is_grad_enabled(), early_exit

    def __getitem__(self, name: str) -> Tensor:
        calls = self.calls(name)
        if len(calls) != 1:
            raise UserError(
                f"tap {name!r} was reached {len(calls)} times in this recording",
                cure=f"features.calls({name!r}) has them all"
                if calls
                else "run the network inside the recording; a branch that it skips is never read; with blocks compiled "
                "one by one, set torch._dynamo.config.skip_nnmodule_hook_guards = False before their first call",
            )
        return calls[0]

    def calls(self, name: str) -> list[Tensor]:
        """One tensor for each time that the module ran, in order."""
        if name not in self._calls:
            raise UserError(f"no tap {name!r}{nearest(name, self._calls)}", cure=f"taps: {', '.join(self._calls)}")
        return self._calls[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)


class _Exit(Exception):
    """Ends a forward pass once every tap has been read."""

    def __init__(self, sink: _Sink) -> None:
        self.sink = sink


class _Sink:
    """Where the hooks put what they see. It knows neither the network nor its :class:`Taps`: torch.compile refuses to
    trace a module that can be reached from its own hook."""

    def __init__(self, taps: dict[str, Tap]) -> None:
        self.taps = taps
        self.open: list[Features] = []

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.open and not _recomputing():
            self._keep(name, module, self.taps[name].of_input(args, kwargs))

    def after(self, name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.open and not _recomputing():
            self._keep(name, module, self.taps[name].of_output(output))

    def _keep(self, name: str, module: nn.Module, value: Tensor) -> None:
        features = self.open[-1]
        if (
            features.with_gradients
            and not torch.is_grad_enabled()
            and any(p.requires_grad for p in module.parameters())
        ):
            raise UserError(
                f"{self.taps[name].path!r} is trained, but ran without gradients inside a recording that has them",
                cure="use non-reentrant checkpointing (use_reentrant=False); to read without gradients, open the "
                "recording under torch.no_grad()",
            )
        features._calls[name].append(value)
        # what a compiled pass has recorded would be lost if an exception ended it
        if features.early_exit and not torch.compiler.is_compiling() and all(features._calls.values()):
            raise _Exit(self)


class Recording:
    """A context in which a :class:`Taps` reads. A class, not a generator, so that torch.compile can trace it."""

    def __init__(self, taps: Taps, early_exit: bool) -> None:
        self.taps, self.early_exit = taps, early_exit

    def __enter__(self) -> Features:
        features = Features(self.taps.taps, self.early_exit)
        self.taps._sink.open.append(features)
        return features

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        features = self.taps._sink.open.pop()
        ours = isinstance(error, _Exit) and error.sink is self.taps._sink
        if ours or error is None:
            self.taps._tell_sharded(features, ours)
        return ours


class Taps:
    """Hooks on named modules of a network. Reads only inside a recording: a call of the taps, or :meth:`recording`.

    taps: paths, or name -> path or :class:`Tap`; a bare path is its own name.
    early_exit: stop the network as soon as every tap has been read (a teacher whose later blocks nobody needs); the
        output is then None. A compiled pass is not cut short.

    The network is any ``nn.Module``, also compiled or wrapped in DDP or FSDP2; paths are those of the network itself.
    Hooks stay until :meth:`remove`, or to the end of a ``with Taps(...) as taps`` block. Make the taps before the first
    call of a compiled network: torch.compile does not see later hooks inside it. Recomputation under activation
    checkpointing is not read a second time.

    Raises UserError for an unknown path (naming the nearest) and, while running, for what is not a tensor, for an
    attention map that fused attention does not make, and for a trained module read inside reentrant checkpointing,
    where a feature would carry no gradient.
    """

    def __init__(
        self, network: nn.Module, taps: Mapping[str, str | Tap] | Iterable[str | Tap], early_exit: bool = False
    ) -> None:
        self.network, self.early_exit = network, early_exit
        if isinstance(taps, str):
            taps = [taps]
        if isinstance(taps, Mapping):
            named = [(str(name), t) for name, t in taps.items()]
        else:
            named = [(t if isinstance(t, str) else t.path, t) for t in taps]
        listed = [(name, Tap(t) if isinstance(t, str) else t) for name, t in named]
        self.taps: dict[str, Tap] = dict(listed)
        if not listed or len(self.taps) < len(listed):
            raise UserError("taps need one name each", cure="give {name: Tap(...)} where one module is read twice")
        self._sink = _Sink(self.taps)
        self._handles: list[Any] = []
        self._units: dict[str, list[nn.Module]] = {}
        modules = module_paths(network)
        for name, tap in self.taps.items():
            module = modules.get(tap.path)
            if module is None:
                raise UserError(
                    f"{type(network).__name__} has no module {tap.path!r}{nearest(tap.path, modules, 3)}",
                    cure="name a module by its path, as in network.named_modules()",
                )
            segments = tap.path.split(".") if tap.path else []
            above = [modules[".".join(segments[:depth])] for depth in range(len(segments) + 1)]
            self._units[name] = [network, *above[1:]]
        for name, tap in self.taps.items():  # only when every path is known: a failed Taps leaves no hook behind
            module = modules[tap.path]
            if tap.read == "input":
                handle = module.register_forward_pre_hook(partial(self._sink.before, name), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(self._sink.after, name))
            self._handles.append(handle)

    # --- use ------------------------------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Features]:
        """Run the network once: ``(its output, features)``; with ``early_exit`` the output is None."""
        output = None
        with self.recording() as features:
            output = self.network(*args, **kwargs)
        return (None if self.early_exit else output), features

    def recording(self, early_exit: bool | None = None) -> Recording:
        """A context that gives :class:`Features` of what the network does inside it, however it is called. With
        ``early_exit`` (by default, that of the taps) the rest of the block is skipped once every tap is read."""
        return Recording(self, self.early_exit if early_exit is None else early_exit)

    def shapes(self, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
        """Shape of every feature, from one dry run in eval mode that leaves modes and random state as they were."""
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                _, features = self(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
        return {name: tuple(features[name].shape) for name in features}

    def remove(self) -> None:
        """Take the hooks off; the taps read nothing from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _tell_sharded(self, features: Features, exited: bool) -> None:
        """FSDP2 gathers a unit's weights when a gradient reaches the unit's output. A gradient may enter by a tap
        inside the unit instead. And a unit whose forward pass an exit cut short must be told that the pass is over."""
        for name, units in self._units.items():
            around = [(unit, state) for unit in units if (state := _sharded(unit)) is not None]
            calls = features._calls[name]
            for _, state in around:
                calls[:] = [state._register_pre_backward_hook(t) if t.requires_grad else t for t in calls]
            for unit, state in reversed(around if exited else []):
                if state._training_state.name == "FORWARD":
                    state._post_forward(unit, (), None)


def _recomputing() -> bool:
    """Whether a backward pass runs here: what hooks see then is activation checkpointing's second pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _sharded(module: nn.Module) -> Any:
    """FSDP2's state of a module that is one of its units, else None."""
    find = getattr(module, "_get_fsdp_state", None)
    return None if find is None else find()


def module_paths(network: nn.Module) -> dict[str, nn.Module]:
    """Modules by the path that the bare network gives them, whatever wraps the network or its parts (torch.compile,
    DDP, checkpoint wrappers). Of a wrapper and what it wraps, the wrapper counts."""
    found: dict[str, nn.Module] = {}
    ddp = {name for name, module in network.named_modules() if isinstance(module, DistributedDataParallel)}
    for name, module in network.named_modules():
        kept: list[str] = []
        segments = name.split(".") if name else []
        for depth, segment in enumerate(segments):
            in_ddp = segment == "module" and ".".join(segments[:depth]) in ddp
            if segment not in WRAPPERS and not in_ddp:
                kept.append(segment)
        found.setdefault(".".join(kept), module)
    return found


def block_paths(network: nn.Module, under: str = "") -> list[str]:
    """Paths of the blocks in order: the elements of the longest of the outermost lists of modules (below ``under``,
    where a network has several: ``encoder``, ``decoder``). A network of one block has a list of one.

    Raises UserError when there is no list of modules.
    """
    modules = module_paths(network)
    below = f"{under}." if under else ""
    lists = {
        name: list(module)
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) and f"{name}.".startswith(below)
    }
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    chosen = [_within_one(name, lists) for name in outermost]
    if not chosen:
        where = f" under {under!r}{nearest(under, modules, 3)}" if under else ""
        raise UserError(
            f"{type(network).__name__} has no list of blocks{where} to tap", cure="name the modules to tap yourself"
        )
    name = min(chosen, key=lambda n: (len(lists[n]) == 1, n.count("."), -len(lists[n])))
    return [f"{name}.{index}" for index in range(len(lists[name]))]


def _within_one(name: str, lists: Mapping[str, list[nn.Module]]) -> str:
    """The list of this name; where its one element is no block but holds a list of several of one kind, that list."""
    if len(lists[name]) > 1:
        return name
    inner = [
        other
        for other, parts in lists.items()
        if other.startswith(f"{name}.0.")
        and len(parts) > 1
        and all(type(part) is type(parts[0]) and len(list(part.children())) > 1 for part in parts)
    ]
    return min(inner, key=lambda n: (n.count("."), -len(lists[n])), default=name)


PROJECTIONS = {"query": ("query", "q_proj", "q_lin", "q"), "key": ("key", "k_proj", "k_lin", "k")}
"""What transformers' encoders call the projections of their attention."""


def projection_path(
    network: nn.Module,
    block: str,
    which: str,
    cure: str = "give an encoder of transformers with separate queries and keys",
) -> str:
    """The path of a block's ``query`` or ``key`` projection. Raises UserError for a block without a separate one."""
    for path in module_paths(network):
        if path.startswith(f"{block}.") and path.rsplit(".", 1)[-1] in PROJECTIONS[which]:
            return path
    raise UserError(f"{block!r} of {type(network).__name__} has no {which} projection", cure=cure)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Queries, keys or values ``[B, N, D]`` as ``[B, heads, N, D / heads]``. ``heads`` need not be the network's own:
    relation losses re-split student and teacher into equally many (arXiv 2012.15828)."""
    if x.shape[-1] % heads:
        raise UserError(
            f"{x.shape[-1]} channels cannot be split into {heads} heads",
            cure="give a number of relation heads that divides the widths of student and teacher",
        )
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def as_tokens(features: Tensor) -> Tensor:
    """Feature maps ``[B, D, H, W]`` and vectors ``[B, D]`` as tokens ``[B, N, D]``."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features.unsqueeze(1) if features.ndim == 2 else features
