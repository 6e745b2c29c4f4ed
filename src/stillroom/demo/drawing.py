"""What the page does, without the page: models that load when first asked, pictures with their times, holes from brush
strokes, mistakes as one line."""

from __future__ import annotations

import dataclasses
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.bench.scenes.bench import PARSER_DIR
from stillroom.data.scenes.captions import parse_caption, sample_captions, satisfied
from stillroom.data.scenes.pictures import SHAPE
from stillroom.diffusion.masking import MaskedSampler
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.evaluation.metrics import to_uint8
from stillroom.evaluation.scene_parser import SceneParser, load_parser
from stillroom.surgery.modules import parameter_count
from stillroom.tasks.class_images.model import ImageGenerator, class_count
from stillroom.tasks.text_images.model import EXAMPLES

SETTINGS = ("guidance", "steps", "temperature")
"""What the page lets a visitor change of the student's sampler, where that has it."""
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


class Model:
    """A generator under the name that the page calls it.

    load: called once, when the model is first needed; gives a
    :class:`~stillroom.tasks.text_images.model.TextImageGenerator` (asked in words) or an
    :class:`~stillroom.tasks.class_images.model.ImageGenerator` (asked by class).
    """

    def __init__(self, name: str, load: Callable[[], Any], judge: Judge | None = None) -> None:
        self.name, self._load, self._judge = name, load, judge or Judge(None)
        self._warm = False

    @cached_property
    def generator(self) -> Any:
        return self._load()

    @property
    def sampler(self) -> Sampler:
        return self.generator.sampler

    @property
    def by_class(self) -> bool:
        return isinstance(self.generator, ImageGenerator)

    @property
    def classes(self) -> list[str]:
        """Names of the classes that can be asked for; empty for a model that is asked in words, or for nothing."""
        if not self.by_class:
            return []
        return list(self.generator.classes) or [str(i) for i in range(class_count(self.generator.denoiser))]

    @property
    def fills(self) -> bool:
        """Whether it can fill a hole in a picture: masked generators can."""
        return not self.by_class and isinstance(self.sampler, MaskedSampler)

    @property
    def settings(self) -> dict[str, float]:
        """Those of :data:`SETTINGS` that its sampler has, as they are saved with the model."""
        return {name: getattr(self.sampler, name) for name in SETTINGS if hasattr(self.sampler, name)}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images."""
        shape = self.generator.denoiser.shape[1:] if self.by_class else self.generator.space.size
        return int(shape[0]), int(shape[1])

    @property
    def cell(self) -> int:
        """Side in pixels of the squares that holes are made of: what one token of the network becomes."""
        patch = getattr(self.generator.network, "config", {}).get("patch", 1)
        return self.generator.space.codec.factor * int(patch)

    def check(self, wish: str) -> None:
        """Raises UserError for a caption that the text encoder refuses or a class that there is not."""
        if not self.by_class:
            self.generator.space.text.check(wish)
        elif self.classes and wish not in self.classes:
            raise UserError(f"no class {wish!r}", cure=f"choose one of: {', '.join(self.classes)}")

    def draw(self, wish: str, n: int, seed: int, **changes: float) -> Drawing:
        """``n`` images of a caption or class. ``changes``: of the sampler's settings; those that it has not, and None,
        are left out. The time is that of the drawing alone: the first call draws one image more, before the clock runs.
        """
        if self.by_class:
            sampler = dataclasses.replace(self.sampler, **self._known(changes))  # type: ignore[type-var]
            generator = ImageGenerator(self.generator.denoiser, sampler, self.generator.classes)
            label = self.classes.index(wish) if self.classes else 0
            return self._timed(wish, n, lambda k: generator.sample([label] * k if self.classes else k, seed=seed))
        known = self._known(changes)
        return self._timed(wish, n, lambda k: self.generator.sample([wish] * k, seed=seed, **known))

    def fill(self, wish: str, image: Tensor, hole: Tensor, n: int, seed: int, **changes: float) -> Drawing:
        """``n`` ways to fill the ``hole`` (bool ``[H, W]``) of ``image [C, H, W]``."""
        known = self._known(changes)
        images = image.expand(n, *image.shape)
        return self._timed(wish, n, lambda k: self.generator.inpaint([wish] * k, images[:k], hole, seed=seed, **known))

    def facts(self, **changes: float) -> tuple[str, ...]:
        """How it draws, in a few words."""
        sampler = dataclasses.replace(self.sampler, **self._known(changes))  # type: ignore[type-var]
        network = self.generator.denoiser if self.by_class else self.generator.network
        steps, guidance = getattr(sampler, "steps", len(getattr(sampler, "times", ()))), getattr(sampler, "guidance", 1)
        return (
            f"{parameter_count(network) / 1e6:.1f} M parameters",
            str(getattr(sampler, "solver", sampler.name)),
            f"{steps} step{'' if steps == 1 else 's'}",
            f"guidance {guidance:g}" if guidance != 1 else "no guidance",
        )

    def _known(self, changes: dict[str, float]) -> dict[str, Any]:
        kept = {name: changes[name] for name in self.settings if changes.get(name) is not None}
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
    """Says whether pictures obey their captions, where the scenes' grammar and parser can tell.

    folder: of the parser; None judges nothing, as does a folder without one.
    """

    def __init__(self, folder: Path | None = PARSER_DIR) -> None:
        self.folder = folder

    @cached_property
    def parser(self) -> SceneParser | None:
        try:
            return None if self.folder is None else load_parser(self.folder)
        except UserError as problem:
            print(f"pictures are not judged: {problem}", file=sys.stderr, flush=True)
            return None

    def verdicts(self, caption: str, images: Tensor) -> list[bool | None]:
        if self.parser is None or tuple(images.shape[1:]) != SHAPE:
            return [None] * len(images)
        try:
            wanted = parse_caption(re.sub(r"[.,;:!?]", " ", caption))  # the text encoder does not read them either
        except UserError:
            return [None] * len(images)
        return [satisfied(wanted, scene) for scene in self.parser.read(to_uint8(images)).scenes()]


# --- wishes -----------------------------------------------------------------------------------------------------------
def examples(student: Model) -> list[str]:
    """Wishes to choose from: classes, or those captions of the scenes world in which the student knows every word."""
    if student.by_class:
        return student.classes
    return [caption for caption in EXAMPLES.values() if _understands(student, caption)]


def surprise(student: Model) -> str:
    """Any class, or any caption of the scenes world, held-out combinations included; nothing where the student knows
    none of them."""
    wishes = examples(student)
    if not wishes or student.by_class:
        return random.choice(wishes or [""])
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    split = random.choice(("train", "train", "heldout"))
    caption = sample_captions(1, generator, split)[0].text
    return caption if _understands(student, caption) else random.choice(wishes)


def _understands(model: Model, caption: str) -> bool:
    try:
        model.check(caption)
    except UserError:
        return False
    return True


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
    from PIL import Image, ImageOps

    from stillroom.data.pictures import opened

    height, width = size
    try:
        with opened(Path(path)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except ValueError:
        raise UserError("this file is no picture that can be read", cure="choose a PNG or JPEG") from None
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
