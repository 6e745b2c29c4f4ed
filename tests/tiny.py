"""A teacher and data so small that a whole run takes a second: 8x8 grey images in three classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SIZE, CLASSES = 8, ("bar", "cross", "dot")
FAST = ["engine.batch=6", "engine.log_every=1", "engine.warmup=0", "engine.checkpoint_every=2", "evaluate.n=0"]


def make_teacher(folder: Path, **config: Any) -> Path:
    """An untrained ``DiTTransformer2DModel`` in diffusers' layout."""
    from stillroom.diffusion.sampling import ODESampler
    from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network
    from stillroom.tasks.class_images.model import ImageGenerator

    shape = {
        "in_channels": 1, "out_channels": 1, "sample_size": SIZE, "patch_size": 4, "num_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": len(CLASSES),
        "norm_type": "ada_norm_zero", "attention_bias": True, "activation_fn": "gelu-approximate", "dropout": 0.0,
    }  # fmt: skip
    network = make_network("DiTTransformer2DModel", shape | config)
    denoiser = denoiser_from_diffusers(network, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, prediction="x0")
    ImageGenerator(denoiser, ODESampler("euler", steps=2), CLASSES).save(folder)
    return folder


def make_data(folder: Path, size: int = SIZE, channels: int = 1, classes: int = 3) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shape = (12 * classes, size, size) if channels == 1 else (12 * classes, size, size, channels)
    names = (*CLASSES, *(f"class{i}" for i in range(3, classes)))[:classes]
    images, labels = rng.integers(0, 256, shape, dtype=np.uint8), np.arange(12 * classes) % classes
    np.savez(folder / "train.npz", images=images, labels=labels, classes=np.array(names))
    return folder
