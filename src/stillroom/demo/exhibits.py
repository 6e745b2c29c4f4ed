"""What the page does, without the page: models that load when first asked, pictures with their times, holes from brush
strokes, mistakes as one line."""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.bench import Bench, benches
from stillroom.errors import UserError
from stillroom.pictures import PictureGenerator

MOST_IMAGES = 8
LONGEST_MESSAGE = 600


@dataclass(frozen=True)
class Drawing:
    """Images ``[N, C, H, W]`` in [-1, 1], the seconds that all of them took, and for each whether it obeys its caption
    (``None``: nobody can tell)."""

    images: Tensor
    seconds: float
    verdicts: Sequence[bool | None]

    @property
    def milliseconds(self) -> float:
        """Per image."""
        return 1000 * self.seconds / len(self.images)


class Exhibit:
    """A model under the name that the page calls it.

    load: called once, when the model is first needed.
    """

    def __init__(self, name: str, load: Callable[[], PictureGenerator], judge: Judge | None = None) -> None:
        self.name, self._load, self._judge = name, load, judge or Judge(())
        self._warm = False

    @cached_property
    def model(self) -> PictureGenerator:
        return self._load()

    @property
    def by_class(self) -> bool:
        return self.model.asked_by == "labels"

    def draw(self, wish: str, n: int, seed: int, **changes: float) -> Drawing:
        """``n`` images of a wish. changes: of the sampler's settings; those that it has not, and None, are left out.
        The time is that of the drawing alone: the first call draws one image more, before the clock runs."""
        known = self._known(changes)
        return self._timed(wish, n, lambda k: self.model.draw(wish, k, seed, **known))

    def fill(self, wish: str, image: Tensor, hole: Tensor, n: int, seed: int, **changes: float) -> Drawing:
        """``n`` ways to fill the ``hole`` (bool ``[H, W]``) of ``image [C, H, W]``."""
        known = self._known(changes)
        return self._timed(wish, n, lambda k: self.model.fill(wish, image, hole, k, seed, **known))

    def facts(self, **changes: float) -> tuple[str, ...]:
        """How it draws, in a few words."""
        known = self._known(changes)
        sampler, settings = self.model.changed(**known), self.model.settings | known
        steps, guidance = settings.get("steps", len(getattr(sampler, "times", ()))), settings.get("guidance", 1)
        return (
            f"{self.model.parameters / 1e6:.1f} M parameters",
            str(getattr(sampler, "solver", sampler.name)),
            f"{steps} step{'' if steps == 1 else 's'}",
            f"guidance {guidance:g}" if guidance != 1 else "no guidance",
        )

    def surprise(self) -> str:
        """A wish at random; nothing where the model knows none."""
        return self.model.surprise(torch.Generator().manual_seed(random.getrandbits(62)))

    def _known(self, changes: Mapping[str, float]) -> dict[str, Any]:
        kept = {name: changes[name] for name in self.model.settings if changes.get(name) is not None}
        return {name: int(value) if name == "steps" else float(value) for name, value in kept.items()}

    def _timed(self, wish: str, n: int, draw: Callable[[int], Tensor]) -> Drawing:
        if not self._warm:
            draw(1)
            self._warm = True
        began = time.perf_counter()
        images = draw(n)
        seconds = time.perf_counter() - began
        return Drawing(images, seconds, self._judge.verdicts(wish, images))


class Judge:
    """Says whether pictures obey their captions, where a bench can tell. benches: by default all."""

    def __init__(self, benches: Iterable[Bench] | None = None) -> None:
        self._given = benches

    @cached_property
    def benches(self) -> list[Bench]:
        if self._given is not None:
            return list(self._given)
        return [cls() for cls in {cls.verdicts: cls for cls in benches().values()}.values()]  # who judges alike: once

    def verdicts(self, caption: str, images: Tensor) -> Sequence[bool | None]:
        for bench in list(self.benches):
            try:
                found = bench.verdicts(caption, images)
            except UserError as problem:
                print(f"pictures are not judged: {problem}", file=sys.stderr, flush=True)
                self.benches.remove(bench)
                continue
            if found is not None:
                return found
        return [None] * len(images)


# --- wishes -----------------------------------------------------------------------------------------------------------
def whole_number(value: Any, what: str, low: int, high: int) -> int:
    """A number typed on the page. Raises UserError for what is none, or out of range."""
    if isinstance(value, int | float) and low <= value <= high and value == int(value):
        return int(value)
    shown = "nothing" if value is None else f"{value:g}" if isinstance(value, int | float) else repr(value)
    raise UserError(f"{what} must be a whole number from {low} to {high}, got {shown}")


# --- holes and pictures -----------------------------------------------------------------------------------------------
def hole_from_brush(strokes: str, size: tuple[int, int], cell: int) -> Tensor:
    """Where the brush went, grown to whole cells: bool ``[H, W]``.

    strokes: one character per pixel, row by row, ``1`` where painted. cell: side of the squares that the student draws
    at once; one that the brush touched is drawn anew as a whole. Raises UserError when nothing was painted, or the
    strokes are those of a picture of another size.
    """
    height, width = size
    if len(strokes) != height * width or set(strokes) - {"0", "1"}:
        raise UserError(f"the strokes are not those of a picture of {width}x{height} pixels", cure="paint again")
    painted = torch.tensor([float(mark) for mark in strokes]).view(1, 1, height, width)
    if not painted.any():
        raise UserError("nothing is painted yet", cure="paint over the part of the picture that is to be drawn anew")
    cells = F.max_pool2d(painted, cell, ceil_mode=True)
    return F.interpolate(cells, scale_factor=cell, mode="nearest")[0, 0, :height, :width] > 0


def image_from_file(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture from a visitor's file as ``[3, H, W]`` in [-1, 1]: the middle of it, in the shape of ``size`` (height,
    width), reduced or enlarged. Raises UserError for a file that is no picture."""
    import numpy as np
    from PIL import Image

    from stillroom.data.pictures import levels

    height, width = size
    try:
        found = levels(Path(path), "this file")
    except UserError:
        raise UserError("this file is no picture that can be read", cure="choose a PNG or JPEG") from None
    picture = Image.fromarray(found.transpose(1, 2, 0).repeat(3 // len(found), 2))
    scale = min(picture.width / width, picture.height / height)
    crop = (round(width * scale), round(height * scale))
    left, top = (picture.width - crop[0]) // 2, (picture.height - crop[1]) // 2
    picture = picture.crop((left, top, left + crop[0], top + crop[1]))
    # A small picture enlarged by a whole factor comes back exactly.
    whole = crop[0] % width == 0 and crop[1] % height == 0
    picture = picture.resize((width, height), Image.Resampling.BOX if whole else Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


# --- mistakes ---------------------------------------------------------------------------------------------------------
def message(problem: Exception) -> str:
    """A mistake in one line: what is wrong and its cure. What no one foresaw is named in one line too; where it came
    from is printed for whoever started the page."""
    if not isinstance(problem, UserError):
        traceback.print_exception(problem)
        return shortened(f"This did not work: {type(problem).__name__}: {problem}")
    text = problem.message[:1].upper() + problem.message[1:]
    return shortened(f"{text}; {problem.cure}." if problem.cure else f"{text}.")


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
