"""The parts of the page that hold pictures, as HTML: no script, nothing from outside, every text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from stillroom.demo.exhibits import Drawing
from stillroom.evaluation.metrics import to_uint8

SHOWN = 256
"""Pixels that smaller pictures are enlarged to, by a whole factor, so that a saved copy is as crisp as the page."""


@dataclass(frozen=True)
class Entry:
    """A model on the page: still waiting (neither drawing nor problem), done, or with a problem."""

    name: str
    role: str
    drawing: Drawing | None = None
    facts: tuple[str, ...] = ()
    problem: str = ""


def picture_uri(image: Tensor, hole: Tensor | None = None) -> str:
    """``[C, H, W]`` in [-1, 1], C 1 or 3, as a PNG in a ``data:`` address. ``hole``: bool ``[H, W]``, shown striped."""
    from PIL import Image

    pixels = to_uint8(image[None])[0]
    pixels = pixels.expand(3, *pixels.shape[1:]) if len(pixels) == 1 else pixels[:3]
    factor = max(1, SHOWN // max(pixels.shape[1:]))
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if hole is not None:
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in pixels.shape[1:]), indexing="ij")
        stripe = torch.where((rows + columns) // 8 % 2 == 0, 70, 110).to(torch.uint8)
        pixels = torch.where(hole.repeat_interleave(factor, 0).repeat_interleave(factor, 1), stripe, pixels)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def notice(text: str) -> str:
    """A message to the visitor, or nothing."""
    return f'<p class="sr-notice" role="alert">{escape(text)}</p>' if text else ""


def sheet(wish: str, seed: int, n: int, entries: Sequence[Entry]) -> str:
    """The models side by side, the student first."""
    slowest = max((entry.drawing.milliseconds for entry in entries if entry.drawing), default=0.0)
    cards = "".join(_card(entry, wish, n, slowest, _compared(entry, entries[0])) for entry in entries)
    return _sheet(wish, seed, f'<div class="sr-cards">{cards}</div>')


def filled(wish: str, seed: int, before: Tensor, hole: Tensor, entry: Entry) -> str:
    """The picture with its hole, and the ways in which it was filled. Raises ValueError when nothing was drawn."""
    if entry.drawing is None:
        raise ValueError("nothing was drawn")
    first = (
        f'<figure><img alt="before, with the hole" src="{picture_uri(before, hole)}">'
        "<figcaption>before</figcaption></figure>"
    )
    told = f"{_speed(entry.drawing)}{_told(_kept(entry.drawing), '')}"
    grid = f'<div class="sr-grid sr-strip">{first}{_figures(entry.drawing, wish)}</div>'
    return _sheet(wish, seed, f'<article class="sr-card">{_head(entry)}{told}{grid}{_facts(entry)}</article>')


def _sheet(wish: str, seed: int, body: str) -> str:
    asked = f"<q>{escape(wish)}</q> " if wish else ""
    return (
        f'<section class="sr-sheet" aria-live="polite"><p class="sr-asked">{asked}<span>seed {seed}</span></p>'
        f"{body}</section>"
    )


def _card(entry: Entry, wish: str, n: int, slowest: float, compared: str) -> str:
    if entry.problem:
        body = f'<p class="sr-notice" role="alert">{escape(entry.problem)}</p>'
    elif entry.drawing is None:
        blank = '<figure><div class="sr-blank"></div></figure>' * n
        body = (
            f'<p class="sr-speed">drawing…</p>{_told("", "")}{_bar(0)}<div class="sr-grid {_columns(n)}">{blank}</div>'
        )
    else:
        grid = f'<div class="sr-grid {_columns(n)}">{_figures(entry.drawing, wish)}</div>'
        share = entry.drawing.milliseconds / slowest if slowest else 0.0
        body = f"{_speed(entry.drawing)}{_told(_kept(entry.drawing), compared)}{_bar(share)}{grid}"
    return f'<article class="sr-card sr-{escape(entry.role)}">{_head(entry)}{body}{_facts(entry)}</article>'


def _told(left: str, right: str) -> str:
    return f'<p class="sr-told"><span>{escape(left)}</span><b>{escape(right)}</b></p>'


def _bar(share: float) -> str:
    """The time of an image as a share of the slowest model's."""
    return f'<div class="sr-bar"><span style="width:{share:.1%}"></span></div>'


def _columns(n: int) -> str:
    return "sr-one" if n == 1 else "sr-two" if n <= 4 else "sr-three"


def _head(entry: Entry) -> str:
    return f"<header><h3>{escape(entry.name)}</h3><span>{escape(entry.role)}</span></header>"


def _facts(entry: Entry) -> str:
    facts = "".join(f"<span>{escape(fact)}</span>" for fact in entry.facts)
    return f'<p class="sr-facts">{facts}</p>' if facts else ""


def _speed(drawing: Drawing) -> str:
    return f'<p class="sr-speed"><b>{duration(drawing.milliseconds)}</b> per image</p>'


def _kept(drawing: Drawing) -> str:
    verdicts = [verdict for verdict in drawing.verdicts if verdict is not None]
    return f"{sum(verdicts)} of {len(verdicts)} obey the caption" if verdicts else ""


def duration(milliseconds: float) -> str:
    if milliseconds < 10:
        return f"{milliseconds:.1f} ms"
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def _compared(entry: Entry, student: Entry) -> str:
    """A teacher's speed beside the student's."""
    if entry is student or entry.drawing is None or student.drawing is None:
        return ""
    ratio = entry.drawing.milliseconds / student.drawing.milliseconds
    return f"{student.name} is {ratio:.1f}× faster" if ratio >= 1 else f"{student.name} is {1 / ratio:.1f}× slower"


def _figures(drawing: Drawing, wish: str) -> str:
    return "".join(
        f'<figure><img alt="{escape(wish) or "a picture"}, number {i + 1}" src="{picture_uri(image)}">{_mark(verdict)}'
        f"</figure>"
        for i, (image, verdict) in enumerate(zip(drawing.images, drawing.verdicts, strict=True))
    )


def _mark(verdict: bool | None) -> str:
    if verdict is None:
        return ""
    told = "✓ obeys" if verdict else "✗ does not"
    title = "a judge has read the picture: exactly what the caption asks for" + ("" if verdict else " was not found")
    return f'<figcaption class="{"sr-yes" if verdict else "sr-no"}" title="{title}">{told}</figcaption>'
