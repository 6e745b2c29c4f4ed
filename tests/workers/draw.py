"""Teachers that cost nothing and a synthesis with them: what test_synthesis.py kills, and runs under torchrun as
``draw.py FOLDER``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.engine.distributed import World
from stillroom.synthesis import Synthesis, synthesize

CAPTIONS = [f"a picture of thing {number}" for number in range(40)]
SIZE = 12

WORDS = ("a red three", "a blue seven", "a seven", "the three", "a red seven of blue")
FEW_CAPTIONS = [WORDS[number % 5] for number in range(14)]


def noise(seed: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Batchwise:
    """One seed for a batch, as a plain sampler has it. Every caption that ends in 7 comes out flat, in 8 as NaN."""

    fingerprint = "b" * 64
    settings = {"guidance": 2.0}

    def __init__(self, wait: float = 0.0) -> None:
        self.wait, self.calls = wait, 0

    def sample(self, captions: list[str], seed: int) -> Tensor:
        time.sleep(self.wait)
        self.calls += 1
        images = noise(seed, len(captions))
        for image, caption in zip(images, captions, strict=True):
            if caption.endswith("7"):
                image.fill_(0.25)
            if caption.endswith("8"):
                image[1, 2, 3] = torch.nan
        return images


class Samplewise:
    """A seed for each sample; captions that end in 3 or 4 all look alike but for one pixel."""

    fingerprint = "5" * 64

    def sample_each(self, captions: list[str], seeds: list[int]) -> Tensor:
        images = torch.cat([noise(1 if caption[-1] in "34" else seed) for caption, seed in zip(captions, seeds)])
        images[:, 0, 0, 0] = torch.tensor(seeds) % 100 / 300
        return images


SETTINGS: dict[str, Any] = {
    "seeds": (0, 1), "route": "all", "filters": ("dedup", "readable"), "shard_size": 11, "batch": 4
}  # fmt: skip


def draw(folder: Path, wait: float = 0.0, **settings: Any) -> Synthesis:
    teachers = {"batchwise": Batchwise(wait), "samplewise": Samplewise()}
    captions = settings.pop("captions", CAPTIONS)
    return synthesize(teachers, captions, folder, **(SETTINGS | {"progress": False} | settings))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.join("cpu")
    draw(folder, world=world)
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
