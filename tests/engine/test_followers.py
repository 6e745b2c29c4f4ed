"""Networks that follow another one: by hand, and over an interruption."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.method import Method, Optim, Target, turn, unfrozen
from workers.toy import fitted


class Chased(Method):
    @dataclass
    class Options:
        decay: float = 0.5
        warm_up: bool = False

    def build(self, start: float = 0.0) -> None:
        self.student = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.student.weight, start)
        self.target = unfrozen(copy.deepcopy(self.student))
        self.seen: list[float] = []

    def followers(self) -> dict[str, Target]:
        return {"target": Target("student", self.options.decay, self.options.warm_up)}

    @turn(trains="student", optim=Optim(lr=1.0, name="sgd", betas=(0.0, 0.0)))
    def step_on(self, batch: Any) -> dict[str, Tensor]:
        self.seen.append(self.target.weight.item())
        return {"slope": -self.student.weight.sum()}  # one up at each step


class Nothing:
    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Tensor]:
        return {"x": torch.zeros(size, 1)}


def run(folder: Path, resume: bool = False, stop: int = 0, **options: Any) -> list[float]:
    Chased.slug = "chased"
    method = Chased(Chased.Options(**options))
    method.build()
    config = EngineConfig(steps=6, batch=2, checkpoint_every=2, check_freezing=True)
    trainer = Trainer(method, Nothing(), config, folder, resume)
    fitted(trainer, stop)
    return [*method.seen, method.target.weight.item()]


def test_a_target_moves_after_each_update_of_its_leader_by_what_the_decay_leaves(tmp_path: Path) -> None:
    """The leader is at 1, 2, 3, ...; half of the way each time."""
    assert run(tmp_path) == [0.0, 0.5, 1.25, 2.125, 3.0625, 4.03125, 5.015625]


def test_a_target_with_a_warm_up_begins_as_a_copy(tmp_path: Path) -> None:
    """d goes 0 -> .45 -> .45 + .55 (.9 - .45) / 2 = .57375 -> ... for a decay of .9."""
    seen = run(tmp_path, decay=0.9, warm_up=True)
    d, at = 0.0, 0.0
    for k in range(6):
        d += (1 - d) * (0.9 - d) / 2
        at = d * at + (1 - d) * (k + 1)
        assert seen[k + 1] == pytest.approx(at, rel=1e-5)


def test_an_interrupted_run_has_the_same_target(tmp_path: Path) -> None:
    straight = run(tmp_path / "a", warm_up=True, decay=0.9)
    run(tmp_path / "b", stop=3, warm_up=True, decay=0.9)
    assert run(tmp_path / "b", resume=True, warm_up=True, decay=0.9)[-3:] == straight[-3:]


def test_a_target_of_decay_one_stays() -> None:
    assert Target("student", 1.0).decay_after(0.3) == 1.0
