"""Run under torchrun by test_lightgen.py: ``masked.py FOLDER`` trains LightGen under DDP, under FSDP, and under FSDP
left and resumed inside the preference stage; leaves FOLDER/<name>.safetensors."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods" / "masked"))

from test_lightgen import Stop, trainer, weights

from stillroom.engine.distributed import World

PLAIN: dict[str, Any] = {"network": {"dropout": 0.0, "attention_dropout": 0.0}, "smooth": True}
"""Dropout is each process's own. With its usual eps Adam would magnify the rounding of gradients that are zero but for
it (those of keys' biases)."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.join("cpu")
    for name, parallel, stop in (("ddp", "ddp", None), ("fsdp", "fsdp", None), ("fsdp-resumed", "fsdp", 9)):
        if stop is not None:
            with contextlib.suppress(Stop):
                trainer(folder / name, stop=stop, parallel=parallel, **PLAIN).fit()
        run = trainer(folder / name, resume=stop is not None, parallel=parallel, **PLAIN)
        run.fit()
        tensors = weights(run)
        if world.first:
            save_file(tensors, folder / f"{name}.safetensors")
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
