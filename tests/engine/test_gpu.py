"""The engine on the CUDA device, where there is one; else the same on the CPU. Run by `make gpu`, `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from workers.toy import Points, Toy

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trained(run: Path | None = None, resume: bool = False, options: Any = None, **engine: Any) -> dict[str, Tensor]:
    method = Toy(Toy.Options(**(options or {})))
    method.build()
    config = EngineConfig(**{"steps": 6, "batch": 8, "device": DEVICE, "checkpoint_every": 3, "log_every": 2, **engine})
    trainer = Trainer(method, Points(), config, run, resume, show=False)
    trainer.fit()
    return {name: p.detach().float().cpu() for name, p in method.named_parameters()}


def near(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_the_weights_are_on_the_device() -> None:
    method = Toy(Toy.Options())
    method.build()
    trainer = Trainer(method, Points(), EngineConfig(steps=1, batch=4, device=DEVICE), show=False)
    trainer.fit()
    assert {p.device.type for p in method.parameters()} == {DEVICE}
    assert next(trainer.export_role().parameters()).device.type == DEVICE
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_the_same_recipe_gives_the_same_weights() -> None:
    near(trained(), trained(), atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Optimizers' steps and moments, dropout's and the turns' draws come back on the device."""
    whole = trained(tmp_path / "whole", options={"dropout": 0.2}, ema=[{"decay": 0.9}])
    part = tmp_path / "part"
    trained(part, options={"dropout": 0.2}, ema=[{"decay": 0.9}])
    for later in (part / "checkpoints").glob("step-0000006"):
        later.rename(later.with_name("later"))
    near(whole, trained(part, resume=True, options={"dropout": 0.2}, ema=[{"decay": 0.9}]), atol=1e-6)


def test_micro_batches_give_the_whole_batch() -> None:
    near(trained(), trained(accumulate=4), atol=1e-3)


def test_half_precision_stays_near_full_precision() -> None:
    found = trained(precision="bf16")
    assert all(torch.isfinite(value).all() for value in found.values())
    near(trained(), found, atol=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_in_host_memory_change_nothing(precision: str) -> None:
    near(trained(precision=precision), trained(precision=precision, offload=True), atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="tests/engine has it for the CPU")
def test_compiled_networks_learn_the_same() -> None:
    near(trained(), trained(compile=True), atol=1e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs memory that is pinned")
def test_held_weights_are_pinned() -> None:
    method = Toy(Toy.Options())
    method.build()
    trainer = Trainer(method, Points(), EngineConfig(steps=1, batch=4, device=DEVICE, offload=True), show=False)
    assert trainer.offload is not None
    assert all(p.is_pinned() for p in trainer.offload.held)
