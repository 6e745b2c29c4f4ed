"""Adapters that make a frozen network answer as if it were guided, in one pass (arXiv 2503.07274)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.errors import UserError
from stillroom.networks.scalars import ScalarEncoder, zeroed
from stillroom.surgery.attached import (
    Attachment,
    Widths,
    attention_paths,
    hidden_of,
    label_paths,
    named_paths,
    text_of,
    time_paths,
    tokens_of,
    widths_at,
)

Kind = Literal["auto", "offset", "attention"]


class Adapter(nn.Module):
    """What an adapter is told: the scale, and what the base makes of time, label and text, each at the adapter's
    width."""

    def __init__(self, widths: Widths, time: int, label: int, width: int, scale: float) -> None:
        super().__init__()
        self.encode = ScalarEncoder(width, scale)
        self.time = nn.Linear(time, width) if time else None
        self.label = nn.Linear(label, width) if label else None
        self.text = nn.Linear(widths.text, width) if widths.text else None

    def embedded(self, seen: Mapping[str, Tensor]) -> list[Tensor]:
        """Time and label ``[B, width]``, of those that there are."""
        layers = (self.time, seen.get("time")), (self.label, seen.get("label"))
        return [layer(value) for layer, value in layers if layer is not None and value is not None]


class Offset(Adapter):
    """``a = W_o LN(ReLU(W c))``, the same vector for all tokens, with ``c = E(w) + W_t temb(t) + W_y yemb(y) + W_p mean
    of the text's tokens``, of those that there are; ``temb`` and ``yemb`` are the base's own embedders. ``W_o`` is 0 at
    the start."""

    def __init__(self, widths: Widths, time: int, label: int, width: int, scale: float) -> None:
        super().__init__(widths, time, label, width, scale)
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))
        self.out = zeroed(nn.Linear(width, widths.output))

    def forward(self, w: Tensor, seen: Mapping[str, Tensor], hidden: Tensor, text: Tensor | None) -> Tensor:
        """``[B, 1, D]`` for scales ``[B]``."""
        c = self.encode(w)
        for value in self.embedded(seen):
            c = c + value
        if self.text is not None and text is not None:
            c = c + self.text(text.mean(1))
        return self.out(self.body(c))[:, None]


class CrossAttention(Adapter):
    """``a = W_o Attn(W_q h, W_k S, W_v S)``, one head, with the memory ``S = [E(w), W_t temb(t), W_y yemb(y), W_p text
    tokens]``, of those that there are, plus a sinusoidal code of positions. ``W_o`` is 0 at the start."""

    def __init__(self, widths: Widths, time: int, label: int, width: int, scale: float) -> None:
        super().__init__(widths, time, label, width, scale)
        self.to_q = nn.Linear(widths.input, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = zeroed(nn.Linear(width, widths.output))

    def forward(self, w: Tensor, seen: Mapping[str, Tensor], hidden: Tensor, text: Tensor | None) -> Tensor:
        """``[B, n, D]`` for scales ``[B]`` and tokens ``hidden [B, n, C]``."""
        rows, memory = len(hidden), [value[:, None] for value in (self.encode(w), *self.embedded(seen))]
        if self.text is not None and text is not None:
            memory.append(self.text(text))
        s = torch.cat([part.expand(rows, -1, -1) for part in memory], 1)
        s = s + positions(s.shape[1], s.shape[2]).to(s)
        answer = nn.functional.scaled_dot_product_attention(self.to_q(hidden), self.to_k(s), self.to_v(s))
        return self.out(answer)


def positions(count: int, width: int) -> Tensor:
    """Sinusoidal code ``[count, width]`` (arXiv 1706.03762, sec. 3.5)."""
    half = (width + 1) // 2
    angles = torch.arange(count)[:, None] * 10_000.0 ** -(torch.arange(half) / half)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


class GuidanceAdapters(Attachment):
    """An adapter on each of some modules: ``A'(h) = A(h) + a(h; w, t, c)``, with w the condition ``guidance_scale``.

    widths: of these modules, by path, as :class:`~stillroom.surgery.attached.Widths`. times, labels: paths of the
    base's embedders whose answers are read, and their widths.
    """

    reads = ("guidance_scale",)

    def __init__(
        self,
        widths: Mapping[str, Sequence[int]],
        times: Mapping[str, int],
        labels: Mapping[str, int],
        kind: str,
        width: int,
        scale: float = 1.0,
    ) -> None:
        config = {"widths": {path: list(sizes) for path, sizes in widths.items()}, "times": dict(times)}
        config |= {"labels": dict(labels), "kind": kind, "width": width, "scale": scale}
        super().__init__([*times, *labels, *widths], config)
        self.times, self.labels, self.places = list(times), list(labels), list(widths)
        adapter = {"offset": Offset, "attention": CrossAttention}[kind]
        time, label = (max(found.values(), default=0) for found in (times, labels))
        self.adapters = nn.ModuleList(adapter(Widths(*sizes), time, label, width, scale) for sizes in widths.values())

    def answer(self, path: str, inputs: Mapping[Any, Any], output: Any) -> Any:
        told = self.told or {}
        seen = told.setdefault("seen", {})
        if path in self.times or path in self.labels:
            value = output[0] if isinstance(output, tuple) else output
            seen["time" if path in self.times else "label"] = value.mean(1) if value.ndim == 3 else value
            return None
        adapter, hidden = self.adapters[self.places.index(path)], tokens_of(hidden_of(inputs))
        seen = {name: value[: len(hidden)] for name, value in seen.items()}  # some embed a time of 0 besides
        scale = self.of_rows(told["guidance_scale"]).float()
        added = adapter(scale, seen, hidden, text_of(inputs))
        first: Tensor = output[0] if isinstance(output, tuple) else output
        if first.ndim == 2:
            added = added[:, 0]
        elif first.ndim == 4:
            added = added.transpose(1, 2)
            added = added.reshape(*added.shape[:2], *(first.shape[2:] if added.shape[2] > 1 else (1, 1)))
        answered = first + added.to(first)
        return (answered, *output[1:]) if isinstance(output, tuple) else answered


def guidance_adapters(
    denoiser: Denoiser, kind: Kind = "auto", modules: Sequence[str] = (), width: int = 256, scale: float = 1.0
) -> GuidanceAdapters:
    """New adapters for a denoiser: silent and, when told a scale, without effect until they are trained.

    kind: ``auto`` is ``attention`` where the modules read texts, else ``offset``. modules: endings of module paths;
    none: every cross-attention, or attention, or block. width: of the adapters. scale: what guidance scales are
    multiplied by. Raises UserError for endings that name nothing and networks that have nothing of the kind.
    """
    network = denoiser.network
    paths = named_paths(network, modules) if modules else attention_paths(network)
    times, labels = time_paths(network), label_paths(network)
    found = widths_at(denoiser, [*times, *labels, *paths])
    places = {path: found[path] for path in paths if path in found}
    if not places:
        raise UserError(f"none of {', '.join(paths[:3])} takes part in an answer", cure="name others: options.modules")
    if kind == "auto":
        kind = "attention" if any(sizes.text for sizes in places.values()) else "offset"
    time, label = ({path: found[path].output for path in some if path in found} for some in (times, labels))
    return GuidanceAdapters(places, time, label, kind, width, scale)
