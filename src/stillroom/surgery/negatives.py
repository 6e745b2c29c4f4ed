"""What a picture must not show, without a second pass: negative texts inside cross-attention (arXiv 2412.02687, version
3, eq. 7 to 9).

Where image tokens Q read a text, they read a negative one as well, through the same projections, and what they find
there is taken away before the output projection:

    Z = softmax(Q K+^T / sqrt d) V+  -  alpha softmax(Q K-^T / sqrt d) V-

The network is called once, with both texts behind each other; hooks on its cross-attention modules divide them. Its
weights, self-attention, times and pooled texts are left alone, and at alpha = 0 it is not touched at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.routed import RoutedDenoiser
from stillroom.errors import UserError
from stillroom.surgery.attached import AttachedDenoiser, Attachment, text_of

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
"""What networks of diffusers call a text's tokens ``[B, n, C]``, and which of them are no padding ``[B, n]``."""
NEGATIVE, NEGATIVE_MASK, SCALE = "negative", "negative_mask", "negative_scale"
"""Conditions of a :class:`Negatives`: the negative text ``[B, m, C]``, which of its tokens count ``[B, m]``, and alpha
``[B]``; of one row where it is the same for all."""


class _Found(Exception):
    """Ends an attention that is asked for what it reads, and not for what is made of it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Negatives(Attachment):
    """Steers a network away from a negative text, while it is told one. paths: of its cross-attention modules."""

    reads = (NEGATIVE, NEGATIVE_MASK, SCALE)

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths, {"paths": list(paths)})

    def install(self, network: nn.Module) -> list[Any]:
        handles = [network.register_forward_pre_hook(_Hook(self.join), with_kwargs=True)]
        for path in self.paths:
            attention = network.get_submodule(path)
            handles.append(attention.register_forward_pre_hook(_Hook(self.divide, path), with_kwargs=True))
            out = network.get_submodule(f"{path}.to_out.0")
            handles.append(out.register_forward_pre_hook(_Take(self, path, attention)))
        return handles

    # --- hooks ----------------------------------------------------------------------------------------------------
    def join(self, network: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Before the network: its text and the negative one behind it, and so their masks."""
        told = self.told
        if told is None:
            return None
        text = given.get(TEXT)
        if not isinstance(text, Tensor):
            raise UserError(f"{type(network).__name__} was given no text to steer", cure="give it captions")
        negative = _rows(self.of_rows(told[NEGATIVE]), text)
        if negative.shape[-1] != text.shape[-1]:
            raise UserError(
                f"the negative text has {negative.shape[-1]} channels, the text {text.shape[-1]}",
                cure="encode both with one text encoder",
            )
        told["lengths"], told["kept"] = (text.shape[1], negative.shape[1]), {}
        given = {**given, TEXT: torch.cat([text, negative], 1)}
        mask = given.get(MASK)
        if isinstance(mask, Tensor):
            other = told.get(NEGATIVE_MASK)
            other = mask.new_ones(len(mask), negative.shape[1]) if other is None else _rows(self.of_rows(other), mask)
            given[MASK] = torch.cat([mask, other], 1)
        return args, given

    def divide(self, path: str, attention: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Before an attention: it reads its own text; what it would be given to read the negative one is kept."""
        told = self.told
        if told is None or (text := text_of({**dict(enumerate(args)), **given})) is None:
            return None
        own, other = told["lengths"]
        if text.shape[1] != own + other:
            raise UserError(
                f"{path}: {text.shape[1]} tokens of text where two texts of {own} and {other} went in",
                cure="this network does more to its texts than project them; use another family",
            )

        def cut(name: int | str, value: Any, which: slice) -> Any:
            if value is text:
                return value[:, which]
            masks = isinstance(value, Tensor) and (name == 2 or "mask" in str(name))
            return value[..., which] if masks else value

        def part(which: slice) -> tuple[list[Any], dict[str, Any]]:
            by_place = [cut(place, value, which) for place, value in enumerate(args)]
            return by_place, {name: cut(name, value, which) for name, value in given.items()}

        told["kept"][path] = part(slice(own, None))
        by_place, by_name = part(slice(own))
        return tuple(by_place), by_name

    def taken(self, path: str, attention: nn.Module, found: Tensor) -> Tensor | None:
        """Before an output projection: ``Z+ - alpha Z-``."""
        told = self.told
        if told is None:
            return None
        if told.get("asking") == path:
            raise _Found(found)
        if (kept := told.get("kept", {}).pop(path, None)) is None:
            return None
        told["asking"] = path
        try:
            attention.forward(*kept[0], **kept[1])
        except _Found as answer:
            alpha = _rows(self.of_rows(told[SCALE]), found).reshape(-1, *[1] * (found.ndim - 1))
            return away(found, answer.value, alpha)
        finally:
            told["asking"] = None
        raise UserError(f"{path} makes nothing of its output projection", cure="use another family")


def away(positive: Tensor, negative: Tensor, alpha: Tensor | float) -> Tensor:
    """``Z+ - alpha Z-``, without renormalising (arXiv 2412.02687, version 3, eq. 9)."""
    return positive - alpha * negative


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """``value`` of one row, or of all, with as many rows as ``like``, in its type and place."""
    value = value.to(like)
    return value.expand(len(like), *value.shape[1:]) if len(value) == 1 else value


class _Hook:
    """On one module. An object, so that a copy of the network asks the copy of the attachment."""

    def __init__(self, ask: Callable, *first: Any) -> None:
        self.ask, self.first = ask, first

    def __call__(self, *args: Any) -> Any:
        return self.ask(*self.first, *args)


class _Take:
    """On an output projection, which knows of the attention that it belongs to."""

    def __init__(self, negatives: Negatives, path: str, attention: nn.Module) -> None:
        self.negatives, self.path, self.attention = negatives, path, attention

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        found = self.negatives.taken(self.path, self.attention, args[0])
        return None if found is None else (found, *args[1:])


# --- where -----------------------------------------------------------------------------------------------------------
def cross_attention_paths(network: nn.Module) -> list[str]:
    """Paths of the modules in which image tokens read a text. Raises UserError for a network without any, one that
    reads no text or attends to image and text jointly, naming it."""
    modules = dict(network.named_modules())
    found = [path for path in modules if path.split(".")[-1] == "attn2" and f"{path}.to_out.0" in modules]
    if found:
        return found
    joint = any(path.endswith((".add_k_proj", ".to_added_qkv")) for path in modules)
    what = "attends to image and text jointly" if joint else "has no cross-attention"
    raise UserError(
        f"{type(network).__name__} {what}, so that no negative text can be taken away inside it",
        cure="a network with cross-attention: Stable Diffusion 1 and 2, SDXL, Kolors, PixArt, Sana, Wan",
    )


# --- use -------------------------------------------------------------------------------------------------------------
def negative_conditions(cond: Mapping[str, Tensor], alpha: Tensor) -> dict[str, Tensor]:
    """What a :class:`Negatives` is told of a negative text's conditions, under the names that networks have for them.
    Pooled texts and sizes are left out: they come from the text itself. alpha: ``[B]`` or ``[1]``."""
    if TEXT not in cond:
        raise UserError("this model's conditions have no tokens of text", cure="leave the negative text away")
    told = {NEGATIVE: cond[TEXT], SCALE: alpha}
    return told | ({NEGATIVE_MASK: cond[MASK]} if MASK in cond else {})


def with_negatives(denoiser: Denoiser) -> AttachedDenoiser:
    """``denoiser`` that may be told :func:`negative_conditions` beside its own; without them it answers as before. All
    its weights are trained. Raises UserError as :func:`cross_attention_paths` does, and for several experts."""
    if isinstance(denoiser, RoutedDenoiser):
        raise UserError(
            "a student of several experts cannot learn to heed negative texts", cure="train them one by one"
        )
    return AttachedDenoiser(denoiser, Negatives(cross_attention_paths(denoiser.network)), alone=False)


@contextmanager
def steered(denoiser: Denoiser, negative: Cond, alpha: float) -> Iterator[None]:
    """Inside, the denoiser's network draws away from the conditions of one negative text, ``[1, ...]``, however it is
    called; afterwards nothing is left on it. alpha: 0 leaves every bit as it is."""
    places = [(network, cross_attention_paths(network)) for network in networks_of(denoiser)]
    with ExitStack() as stack:
        for network, paths in places if alpha else []:
            stack.enter_context(_steered(network, paths, negative_conditions(negative, torch.tensor([alpha]))))
        yield


def networks_of(denoiser: Denoiser) -> list[nn.Module]:
    """The networks that a denoiser asks: its own, or those of its experts."""
    if isinstance(denoiser, RoutedDenoiser):
        return [network for expert in denoiser.experts.values() for network in networks_of(expert)]
    return [denoiser.network]


@contextmanager
def _steered(network: nn.Module, paths: list[str], told: dict[str, Tensor]) -> Iterator[None]:
    negatives = Negatives(paths)
    handles = negatives.install(network)
    try:
        with negatives.speaking(told):
            yield
    finally:
        for handle in handles:
            handle.remove()
