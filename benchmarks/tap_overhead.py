"""A training step whose loss reads tapped features against the same step without taps.

    python benchmarks/tap_overhead.py

Both steps run the same ViT on the same images with the same loss on its output. Steps are taken in turns, so that
whatever else the machine does falls on both. The tapped step reads every block; its loss does not use them, so that the
difference is the machinery alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from common import Row, median, record
from torch import nn
from transformers import ViTConfig, ViTModel

from stillroom.surgery.taps import Taps, block_paths

BATCH, PAIRS, WARM_UP, LIMIT = 32, 150, 10, 1.03


def steps(network: nn.Module, call: Callable[[], torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

    def step() -> float:
        started = time.perf_counter()
        call().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def measure(pairs: int) -> Row:
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=28, patch_size=4
    )
    plain, images = ViTModel(config), torch.randn(BATCH, 3, 28, 28)
    tapped = copy.deepcopy(plain)
    taps = Taps(tapped, block_paths(tapped))
    without = steps(plain, lambda: plain(images).last_hidden_state)
    reading = steps(tapped, lambda: taps(images)[0].last_hidden_state)
    times = [(without(), reading()) for _ in range(WARM_UP + pairs)][WARM_UP:]
    return {
        "step": "ViT, width 128, 6 blocks tapped",
        "steps timed": pairs,
        "without taps, ms": 1000 * median(a for a, _ in times),
        "with taps, ms": 1000 * median(b for _, b in times),
        "ratio": median(b / a for a, b in times),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(PAIRS)]
    record(
        "Tap overhead",
        f"Reading every block by taps costs at most {LIMIT}x the step without them (batch {BATCH}; ratio = median over "
        "interleaved pairs, wall-clock).",
        "python benchmarks/tap_overhead.py",
        rows,
        all(row["ratio"] <= LIMIT for row in rows),
    )


if __name__ == "__main__":
    main()
