"""How the encoders' masked teachers are made."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor, nn

from stillroom.data.source import ArrayData
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.methods.masked.dmae import DMAE


def train_autoencoder(
    network: nn.Module, data: ArrayData, mask_ratio: float, steps: int, seed: int
) -> dict[str, Tensor]:
    """The weights of a masked autoencoder, decoder and all, after so many steps on pixels."""
    method = DMAE(DMAE.Options(alpha=0.0, mask_ratio=mask_ratio))
    method.build(network)
    engine = EngineConfig(
        steps=steps, batch=64, seed=seed, schedule="cosine", warmup=steps // 20, optim={"pretrain": {"lr": 1.5e-3}},
        checkpoint_every=steps,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Trainer(method, data, engine, Path(folder), show=False).fit()
    parts = {"vit": method.student, "decoder": method.decoder}
    return {f"{part}.{key}": value for part, net in parts.items() for key, value in net.state_dict().items()}
