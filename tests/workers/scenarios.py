"""Run under torchrun by test_distributed.py: ``scenarios.py FOLDER`` trains every scenario of FOLDER/scenarios.json, in
order, in one process group, and leaves FOLDER/<name>.safetensors and <name>.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy import Stop, stop_after, trainer, weights

from stillroom.engine import distributed
from stillroom.engine.distributed import World


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.join("cpu")
    distributed.BUCKET = 800  # bytes: the toy's gradients take several
    for scenario in json.loads((folder / "scenarios.json").read_text()):
        run = trainer(
            scenario.get("run_dir"),
            scenario.get("resume", False),
            scenario.get("options"),
            **scenario.get("settings", {}),
        )
        if "stop" in scenario:
            run.callbacks.append(stop_after(scenario["stop"]))
            try:
                run.fit()
            except Stop:
                continue
        run.fit()
        tensors = weights(run)
        if world.first:
            save_file(tensors, folder / f"{scenario['name']}.safetensors")
            (folder / f"{scenario['name']}.json").write_text(json.dumps(run.history))
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
