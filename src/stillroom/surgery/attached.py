"""Networks that speak inside another one without being part of it: by hooks on its modules, while they are told
something. The network keeps its class, its weights and their names; silent, they leave every bit of it alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction, asked_rows, asking_for
from stillroom.diffusion.process import RectifiedFlow
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import some_conditions

FLOW = RectifiedFlow()
_TIME = re.compile(r"(.*\.)?([a-z_]*time[a-z_]*|t_embedder|embed_t|distilled_guidance_layer)")
_OF_TEXTS = re.compile(r"[a-z_]*(context|text)[a-z_]*\..*")


class Attachment(nn.Module):
    """Base. paths: of the modules whose outputs it may change. reads: names of the conditions that are told to it and
    not to the network. timed: whether it is told the network's time as well. ``config``: what its class makes it from
    again, as JSON can hold it."""

    reads: ClassVar[tuple[str, ...]]
    timed: ClassVar[bool] = False
    ATTACHMENTS: ClassVar[dict[str, type[Attachment]]] = {}

    def __init_subclass__(cls) -> None:
        Attachment.ATTACHMENTS[cls.__name__] = cls

    def __init__(self, paths: Sequence[str], config: Mapping[str, Any]) -> None:
        super().__init__()
        self.paths, self.config = list(paths), dict(config)
        self.told: dict[str, Any] | None = None

    def install(self, network: nn.Module) -> list[Any]:
        """Put the hooks by which it speaks on a network's modules; what takes them off again."""
        return [
            network.get_submodule(path).register_forward_hook(_Hook(self, path), with_kwargs=True)
            for path in self.paths
        ]

    def answer(self, path: str, inputs: Mapping[Any, Any], output: Any) -> Any:
        """What the module at ``path`` hands out, given its output and its inputs by place or name; None: as it is."""
        raise NotImplementedError

    def of_rows(self, value: Tensor) -> Tensor:
        """What is told of a batch, ``[B, ...]``, of those of its rows that the network is asked for just now."""
        rows = asked_rows()
        return value if rows is None else value[rows]

    @contextmanager
    def speaking(self, told: dict[str, Any] | None) -> Iterator[None]:
        """Inside, the network answers with what this makes of ``told``, conditions ``[B]`` or ``[1]`` by name; None:
        without it. What it keeps for the rest of a pass, it keeps there."""
        before, self.told = self.told, told
        try:
            yield
        finally:
            self.told = before


class _Hook:
    """On one module. An object, so that a copy of the network asks the copy of the attachment."""

    def __init__(self, attachment: Attachment, path: str) -> None:
        self.attachment, self.path = attachment, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        if self.attachment.told is None:
            return None
        return self.attachment.answer(self.path, {**dict(enumerate(args)), **given}, output)


class AttachedDenoiser(Denoiser):
    """``base`` with an attachment on its network, which both share. Conditions that the attachment reads are told to
    it; where none of them is given, it is silent and the answer is that of ``base``, bit for bit.

    alone: the attachment's weights are all that is trained. With guidance it is told the same in both branches. A
    condition ``sign`` (``[B]``, -1 or 1) turns the time that the network is fed as well. An
    attachment that is ``timed`` is told that time as well: as ``u``, the flow's, ``[B]`` or one for all.
    """

    def __init__(self, base: Denoiser, attachment: Attachment, alone: bool = True) -> None:
        super().__init__(
            base.network, base.process, base.prediction, null=base.null, shape=base.shape, call=base.call,
            guide=base.guide,
        )  # fmt: skip
        self.adapter, self.attachment, self.alone = base.adapter, attachment, alone
        attachment.install(self.network)

    def base(self) -> Denoiser:
        """The same network, asked without the attachment."""
        plain = Denoiser(
            self.network, self.process, self.prediction, null=self.null, shape=self.shape, call=self.call,
            guide=self.guide,
        )  # fmt: skip
        plain.adapter = self.adapter
        return plain.eval()

    def role_parameters(self) -> dict[str, nn.Parameter]:
        own = self.attachment if self.alone else self
        prefix = "attachment." if self.alone else ""
        return {f"{prefix}{name}": p for name, p in own.named_parameters()}

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        own = {name: value for name, value in cond.items() if name in self.attachment.reads}
        return super().null_cond({name: value for name, value in cond.items() if name not in own}) | own

    def native(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told: dict[str, Any] = {name: cond[name] for name in cond if name in self.attachment.reads}
        rest = {name: value for name, value in cond.items() if name not in told}
        if "sign" in told:
            t = t * told["sign"].to(t)
        if told and self.attachment.timed:
            told["u"] = FLOW.time_of(self.process.alpha(t), self.process.sigma(t))
        with self.attachment.speaking(told or None):
            return super().native(x_t, t, rest)

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None, guidance: Any = 1.0) -> Prediction:
        """As :class:`Denoiser`; conditions of the attachment alone count as none for guidance."""
        if not set(cond or {}) - set(self.attachment.reads):
            guidance = 1.0
        return super().forward(x_t, t, cond, guidance)

    def told(self, given: Cond) -> AbstractContextManager[None]:
        return self.attachment.speaking({k: v for k, v in given.items() if k in self.attachment.reads} or None)

    def checkpoint_function(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        """Activation checkpointing that recomputes ``block`` with what was told in the forward pass."""
        told, rows = self.attachment.told, asked_rows()

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            with self.attachment.speaking(told), asking_for(rows):
                return block(*inner, **inner_kwargs)

        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, **kwargs)


# --- where -----------------------------------------------------------------------------------------------------------
def time_paths(network: nn.Module) -> list[str]:
    """Modules that turn a time into the vector that a network of diffusers, or one of ours, is steered by. Raises
    UserError for a network without one."""
    found = [
        path
        for path, module in network.named_modules()
        if _TIME.fullmatch(path)
        and re.search(r"Timestep(Embedding|Embedder)$|Approximator$|^Linear$", type(module).__name__)
        and not path.endswith(("time_proj", "guidance_embedder"))
        and (type(module).__name__ != "Linear" or path.endswith("embed_t"))
    ]
    if not found:
        raise UserError(f"{type(network).__name__} has no embedding of times that is known", cure="use another family")
    return found


def label_paths(network: nn.Module) -> list[str]:
    """Modules that turn a label into a vector; empty for a network without labels."""
    return [
        path
        for path, module in network.named_modules()
        if path.endswith(("class_embedder", "class_embedding", "embed_label"))
        and type(module).__name__ in ("LabelEmbedding", "Embedding", "TimestepEmbedding")
    ]


def attention_paths(network: nn.Module) -> list[str]:
    """Where guidance acts: every cross-attention; of a network without any, every attention that its picture takes
    part in; of one without attention, its blocks. Raises UserError where there is nothing of the kind."""
    attentions = [
        path
        for path, module in network.named_modules()
        if type(module).__name__.endswith("Attention") and not _OF_TEXTS.fullmatch(path)
    ]
    crossed = [path for path in attentions if path.endswith("attn2")]
    blocks = [path for path, _ in network.named_modules() if re.fullmatch(r"blocks\.[0-9]+", path)]
    if not (found := crossed or attentions or blocks):
        raise UserError(
            f"{type(network).__name__} has neither attention nor blocks", cure="name modules: options.modules=[...]"
        )
    return found


def named_paths(network: nn.Module, endings: Sequence[str]) -> list[str]:
    """Modules whose paths end in one of ``endings``. Raises UserError for an ending that there is none of."""
    paths = [path for path, _ in network.named_modules()]
    for ending in endings:
        if not any(path == ending or path.endswith(f".{ending}") for path in paths):
            some = sorted({path.rsplit(".", 1)[-1] for path in paths if path} - {str(i) for i in range(1000)})
            raise UserError(
                f"{ending!r} names no module of {type(network).__name__}", cure=f"for example {', '.join(some[:8])}"
            )
    return [path for path in paths if any(path == ending or path.endswith(f".{ending}") for ending in endings)]


class Widths(NamedTuple):
    """Channels of what a module is given, of what it hands out, and of the texts that it is given; 0: no texts."""

    input: int
    output: int
    text: int


def tokens_of(value: Any) -> Tensor:
    """``[B, C]``, ``[B, n, C]``, a picture ``[B, C, h, w]``, or a tuple that begins with one: tokens ``[B, n, C]``."""
    first: Tensor = value[0] if isinstance(value, tuple) else value
    if first.ndim == 4:
        return first.flatten(2).transpose(1, 2)
    return first[:, None] if first.ndim == 2 else first


def text_of(inputs: Mapping[Any, Any]) -> Tensor | None:
    """The texts ``[B, n, C]`` among the inputs of an attention, if there are any."""
    found = inputs.get("encoder_hidden_states", inputs.get(1))
    return found if isinstance(found, Tensor) and found.ndim == 3 and found.is_floating_point() else None


def hidden_of(inputs: Mapping[Any, Any]) -> Any:
    """What a module of a network works on: its first input."""
    return inputs[0] if 0 in inputs else next(inputs[name] for name in ("hidden_states", "x") if name in inputs)


@torch.no_grad()
def widths_at(denoiser: Denoiser, paths: Sequence[str]) -> dict[str, Widths]:
    """Of the modules at ``paths``, when ``denoiser`` is asked about one sample. One that is not asked is left out."""
    found: dict[str, Widths] = {}

    def seen(path: str) -> Callable:
        def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            inputs: dict[Any, Any] = {**dict(enumerate(args)), **given}
            text, hidden = text_of(inputs), hidden_of(inputs)
            given_width = tokens_of(hidden).shape[-1] if isinstance(hidden, Tensor) and hidden.ndim > 1 else 0
            found[path] = Widths(given_width, tokens_of(output).shape[-1], 0 if text is None else text.shape[-1])

        return note

    handles = [
        denoiser.network.get_submodule(path).register_forward_hook(seen(path), with_kwargs=True) for path in paths
    ]
    try:
        ask_once(denoiser)
    finally:
        for handle in handles:
            handle.remove()
    return {path: found[path] for path in paths if path in found}


@torch.no_grad()
def ask_once(denoiser: Denoiser) -> None:
    """Ask about one sample, for what hooks on the network's modules see."""
    weight = next(denoiser.network.parameters())
    x = weight.new_zeros(1, *denoiser.shape)
    cond = {name: value[None].to(weight.device) for name, value in some_conditions(denoiser).items()}
    denoiser(x, x.new_full((1,), denoiser.process.t_max / 2), cond)
