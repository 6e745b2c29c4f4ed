"""Captions at the mechanism level: one coloured pattern in one of four cells of an 8x8 picture, said in four words.

A picture is four tokens, a caption four words, and what a caption leaves open is pixel noise alone, so that a proof
about a masked-autoregressive student of captions takes minutes. 24 of the 120 captions are never shown in training,
though each of their words is: what is scored is whether the words are understood, not whether pictures are remembered.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench import bench
from stillroom.bench.base import Bench, only
from stillroom.bench.captioned import mismatched
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError, nearest
from stillroom.evaluation.scores import Score
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.tasks.text_images.data import CaptionedData
from stillroom.tasks.text_images.model import TextImageGenerator

COLOURS = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "purple": (1, -1, 1),
    "cyan": (-1, 1, 1),
}
PATTERNS = {
    "block": ("####", "####", "####", "####"),
    "ring": ("####", "#..#", "#..#", "####"),
    "pillar": (".##.", ".##.", ".##.", ".##."),
    "tee": ("####", "####", ".##.", ".##."),
    "cup": ("#..#", "#..#", "####", "####"),
}
"""Each its own mirror image: a mirrored picture shows the same thing on the other side, and nothing else changes."""
SIDES, HEIGHTS = ("left", "right"), ("top", "bottom")
KINDS: tuple[Sequence[str], ...] = (tuple(COLOURS), tuple(PATTERNS), SIDES, HEIGHTS)
WORDS = tuple(itertools.chain(*KINDS))
CELL, SIZE = 4, 8
TEACHERS = {"clean": 0.05, "noisy": 0.3}
"""The renderers by the standard deviation of their noise."""
HELD_OUT = 24


class TileText(nn.Module):
    """Captions to features: one axis per word, scaled to a mean square of 1, as a text encoder's features are, which
    this stands in for."""

    width, length, name = 16, len(KINDS), "tile-words"

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``{"encoder_hidden_states": [B, 4, 16]}``; a missing word (the empty caption) is zero."""
        states = torch.zeros(len(captions), self.length, self.width)
        for row, caption in enumerate(captions):
            for place, word in enumerate(caption.split()):
                states[row, place, WORDS.index(word)] = self.width**0.5
        return {"encoder_hidden_states": states}

    def check(self, caption: str) -> None:
        """Raises UserError unless the caption is a colour, a pattern, a side and a height."""
        words = caption.split()
        for word in words:
            if word not in WORDS:
                raise UserError(f"unknown word {word!r}{nearest(word, WORDS)}", cure=f"known: {', '.join(WORDS)}")
        if len(words) != len(KINDS) or any(word not in kind for word, kind in zip(words, KINDS, strict=True)):
            raise UserError(f"caption {caption!r} is not complete", cure="say it like: red ring left top")


class TileCodec(nn.Module):
    """Pixels are the latents, also beyond [-1, 1], where noise takes them. Stands in for an autoencoder."""

    channels, factor, name = 3, 1, "tile-pixels"

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros_like(images)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@bench("tiles")
class TilesBench(Bench):
    """One thing in one of four cells, said in four words, a fifth of whose combinations training never shows. The
    teacher is the renderer, known by its pictures alone; a judge finds the nearest template in each cell.

    Captions are rows of word numbers ``[N, 4]``: colour, pattern, side, height.
    """

    task = "text-images"
    scores = (
        Score("all", "Exactly what was asked for"),
        Score("one", "Exactly one thing"),
        Score("obj", "Right colour and pattern"),
        Score("lr", "Right side"),
        Score("ud", "Right height"),
    )
    n = 480

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.space = TextImageSpace(TileText(), TileCodec(), (SIZE, SIZE))  # type: ignore[arg-type]
        colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        patterns = torch.tensor([[[c == "#" for c in line] for line in p] for p in PATTERNS.values()]).float()
        things = colours[:, None, :, None, None] * patterns[None, :, None]  # [6, 5, 3, 4, 4]
        self.things = things
        self.templates = torch.cat([torch.zeros(1, 3 * CELL * CELL), things.flatten(0, 1).flatten(1)])

    # --- captions -------------------------------------------------------------------------------------------------
    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        """Training captions ``[96, 4]`` and held-out captions ``[24, 4]``. The first training captions, taken greedily,
        know every word: a student of few captions lacks combinations, not vocabulary."""
        every = torch.cartesian_prod(*(torch.arange(len(kind)) for kind in KINDS))
        every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
        held_out, pool = every[:HELD_OUT], every[HELD_OUT:].tolist()
        chosen: list[list[int]] = []
        known: set[tuple[int, int]] = set()
        while len(known) < len(WORDS):
            new = [len(set(enumerate(row)) - known) for row in pool]
            chosen.append(pool.pop(new.index(max(new))))
            known |= set(enumerate(chosen[-1]))
        return torch.tensor(chosen + pool), held_out

    @property
    def train(self) -> Tensor:
        """``[96, 4]``, in the order in which data take them."""
        return self._split[0]

    @property
    def held_out(self) -> Tensor:
        """``[24, 4]``, never in training data; every word of them is."""
        return self._split[1]

    @staticmethod
    def say(captions: Tensor) -> list[str]:
        """``red ring left top`` and so on."""
        return [" ".join(kind[i] for kind, i in zip(KINDS, row, strict=True)) for row in captions.tolist()]

    # --- pictures -------------------------------------------------------------------------------------------------
    def render(self, captions: Tensor, generator: torch.Generator, teacher: str = "clean") -> Tensor:
        """A teacher: pictures ``[N, 3, 8, 8]`` float32 of captions ``[N, 4]``. Ground 0, colours -1 and 1, normal noise
        on every pixel, of the teacher's own standard deviation (:data:`TEACHERS`)."""
        images = TEACHERS[teacher] * torch.randn(len(captions), 3, SIZE, SIZE, generator=generator)
        colour, pattern, side, height = captions.T
        cells = images.unflatten(3, (2, CELL)).unflatten(2, (2, CELL))  # [N, 3, row, 4, column, 4], a view
        cells[torch.arange(len(captions)), :, height, :, side] += self.things[colour, pattern]
        return images

    def data(
        self,
        captions: int = 96,
        images: int = 3000,
        mirror: bool = False,
        pairs: int = 0,
        seed: int = 0,
        teachers: Sequence[str] = ("clean",),
    ) -> CaptionedData:
        """``images`` pictures of the first ``captions`` training captions, equally many of each, the teachers in turn.

        mirror: their mirror images too, under the same captions. pairs: so many pictures of all training captions, not
        mirrored, in the part ``pairs``. Raises UserError for a number of captions that there are not.
        """
        if not 1 <= captions <= len(self.train):
            raise UserError(f"there are {len(self.train)} training captions, not {captions}", cure="ask for 1 to 96")
        generator = torch.Generator().manual_seed(seed)
        data = self._drawn(self.train[:captions], images, mirror, generator, teachers)
        if pairs:
            data.parts["pairs"] = self._drawn(self.train, pairs, False, generator, ("clean",))
        return data

    def _drawn(
        self, captions: Tensor, images: int, mirror: bool, generator: torch.Generator, teachers: Sequence[str]
    ) -> CaptionedData:
        which, texts = torch.arange(images) % len(captions), self.say(captions)
        turn = torch.arange(images) // len(captions) % len(teachers)  # each teacher draws every caption
        pictures = torch.empty(images, 3, SIZE, SIZE)
        for number, teacher in enumerate(teachers):
            rows = turn == number
            pictures[rows] = self.render(captions[which[rows]], generator, teacher)
        mirrored = pictures.flip(-1) if mirror else None
        origin = f"tiles: {images:,} pictures of {len(captions)} captions"
        text = self.space.text.encode(texts)
        return CaptionedData(pictures, texts, which, text, mirrored=mirrored, name="tiles", origin=origin)

    # --- the judge ------------------------------------------------------------------------------------------------
    def judge(self, images: Tensor, captions: Tensor) -> dict[str, float]:
        """Shares of ``images [N, 3, 8, 8]`` asked for as ``captions [N, 4]``.

        Each cell shows what its nearest template is, or nothing. ``one``: exactly one cell shows something. Of the
        thing that stands out most, ``obj``: its colour and pattern, ``lr``: its side, ``ud``: its height are those
        asked for (an empty picture has none of them right). ``all``: all four at once.
        """
        cells = images.detach().float().cpu().unflatten(3, (2, CELL)).unflatten(2, (2, CELL))
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)  # [N, 4, 48], cell = 2 row + column
        distance = torch.cdist(cells, self.templates.expand(len(cells), -1, -1)).square()
        nearest_distance, shown = distance.min(2)
        at = (distance[:, :, 0] - nearest_distance).argmax(1)
        thing = shown.gather(1, at[:, None]).squeeze(1)
        colour, pattern, side, height = captions.T
        right = {
            "one": (shown > 0).sum(1) == 1,
            "obj": thing == 1 + len(PATTERNS) * colour + pattern,
            "lr": (thing > 0) & (at % 2 == side),
            "ud": (thing > 0) & (at // 2 == height),
        }
        right["all"] = torch.stack(list(right.values())).all(0)
        return {name: float(hits.double().mean()) for name, hits in right.items()}

    def asked(self, n: int) -> Tensor:
        """``n`` held-out captions ``[n, 4]``, equally many of each."""
        return self.held_out[torch.arange(n) % len(self.held_out)]

    def floor_of(self, n: int, seed: int = 1) -> dict[str, float]:
        """:meth:`judge` of ``n`` fresh pictures of the renderer."""
        captions = self.asked(n)
        return self.judge(self.render(captions, torch.Generator().manual_seed(seed)), captions)

    # --- models ---------------------------------------------------------------------------------------------------
    def given(self, **wanted: Any) -> Mapping[str, Any]:
        only("teacher", wanted)
        return {"space": self.space}

    def mislead(self, method: Any, data: CaptionedData) -> CaptionedData:
        return mismatched(data)

    def model(self, network: nn.Module, sampler: Sampler) -> TextImageGenerator:
        return TextImageGenerator(network, sampler, self.space)

    def draw(self, model: TextImageGenerator, n: int) -> Tensor:
        return model.sample(self.say(self.asked(n)))

    def score(self, model: TextImageGenerator, seed: int) -> dict[str, float]:
        captions = self.asked(self.n)
        return self.judge(model.sample(self.say(captions), seed=10_000 + seed, batch=self.n), captions)

    def floor(self) -> dict[str, float]:
        return self.floor_of(self.n)
