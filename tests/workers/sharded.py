"""What test_sharded.py runs, alone and under torchrun: ``sharded.py FOLDER`` trains a masked encoder with FSDP2 and
leaves FOLDER/dmae.safetensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillroom.data.source import ArrayData
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import World
from stillroom.engine.trainer import Trainer
from stillroom.methods.masked.dmae import DMAE
from stillroom.networks.mae import make_encoder


def trained(**settings: Any) -> dict[str, Tensor]:
    method = DMAE(DMAE.Options(mask_ratio=0.5))
    torch.manual_seed(1)
    method.build(make_encoder("mae-nano", 1, 12), make_encoder("mae-mini", 1, 12))
    images = torch.randn(24, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    optim = {"all": {"name": "sgd", "lr": 0.05, "betas": (0.9, 0.0)}}
    config = EngineConfig(steps=4, batch=8, log_every=2, optim=optim, **settings)
    run = Trainer(method, ArrayData(images), config, show=False)
    run.fit()
    return run.export_role().state_dict()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.join("cpu")
    found = trained(parallel="fsdp")
    if world.first:
        save_file(found, folder / "dmae.safetensors")
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
