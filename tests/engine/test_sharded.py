"""Networks of diffusers and transformers under FSDP2 on two gloo processes, whole runs: what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stillroom import cli
from tiny import make_data, make_teacher
from workers.sharded import trained

WORKER = Path(__file__).parents[1] / "workers" / "sharded.py"


def two(place: Path, *command: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_masked_encoder(tmp_path: Path) -> None:
    two(tmp_path, WORKER, tmp_path)
    alike(trained(), load_file(tmp_path / "dmae.safetensors"))


def test_a_whole_run_of_a_diffusion_transformer_with_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' DiT asks its first block's embedding from outside the block; the teacher is drawn from afterwards."""
    make_teacher(tmp_path / "teacher")
    make_data(tmp_path / "data")
    command = [
        "-m", "stillroom", "run", "dmd2", "--teacher", "teacher", "--data", "data", "engine.steps=3", "engine.batch=6",
        "engine.warmup=0", "engine.checkpoint_every=2", "evaluate.n=0", "engine.export=student",
        "engine.optim.all={name: sgd, lr: 0.01, betas: [0.9, 0.0]}", "options.critic_turns=2",
    ]  # fmt: skip
    two(tmp_path, *command, "engine.parallel=fsdp", "--name", "two")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main([*command[2:], "--name", "one"]) == 0
    finally:
        torch.set_num_threads(threads)
    weights = "student/transformer/diffusion_pytorch_model.safetensors"
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    alike(*(load_file(run / weights) for run in runs))
    assert (runs[1] / "report.html").is_file()
    assert (runs[0] / "samples" / "teacher.png").read_bytes() == (runs[1] / "samples" / "teacher.png").read_bytes()
    costs = [json.loads((run / "result.json").read_text())["cost"]["step"] for run in runs]
    assert costs == [3, 3]
