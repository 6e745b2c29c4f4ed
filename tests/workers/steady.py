"""Run by test_resume.py: train the toy method in a folder until done, or until killed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy import trainer, weights


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    run = trainer(folder, resume=True, options={"dropout": 0.2}, steps=400, batch=4, checkpoint_every=7, log_every=9)
    print("started", flush=True)
    run.fit()
    save_file(weights(run), folder / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
