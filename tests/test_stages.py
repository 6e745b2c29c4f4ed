"""Stages: each has its own turns, data and schedule, and tells the method when it begins."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.engine.config import EngineConfig
from stillroom.engine.player import learning_rate_factor
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import Stage, turn
from workers.toy import SETTINGS, Points, Stop, Toy, stop_after, weights


class Shifted(Points):
    """Other data: the same points, moved."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Tensor]:
        return {"image": super().batch(seed, step, size, rows)["image"] + 5.0}


class Parted(Points):
    parts = {"later": Shifted()}


class TwoStages(Toy):
    """The second stage pulls the student back to a copy that it took of it at the start, and to a drawn target."""

    plan = (Stage("first", ("generator", "follow"), share=1), Stage("second", ("hold",), share=2, data="later"))

    def build(self) -> None:
        super().build()
        self.reference = copy.deepcopy(self.student)
        self.entered: list[tuple[str, bool]] = []
        self.seen: list[tuple[int, float]] = []

    def stages(self) -> tuple[Stage, ...]:
        return self.plan

    def enter(self, stage: Stage, data: Any, resumed: bool) -> None:
        self.entered.append((stage.name, resumed))
        if stage.name == "second":
            if not resumed:
                self.reference.load_state_dict(self.student.state_dict())
            with torch.no_grad():
                self.target = self.reference(self.draw.normal(self.draw.local, 3, 6))

    @turn(trains="student")
    def hold(self, batch: Any) -> dict[str, Tensor]:
        self.seen.append((self.step, batch["image"].mean().item()))
        x = self.student(batch["image"])
        return {"hold": (x - self.reference(batch["image"])).square().mean() + (x - self.target).square().mean()}


def made(folder: Path | None = None, resume: bool = False, data: Any = None, **settings: Any) -> Trainer:
    method = TwoStages()
    method.build()
    config = EngineConfig(**{**SETTINGS, "ema": [], "export": "student", **settings})
    return Trainer(method, data or Parted(), config, folder, resume, show=False)


def test_a_stage_reads_its_own_part_of_the_data_and_is_announced_once() -> None:
    run = made()
    run.fit()
    assert run.method.entered == [("first", False), ("second", False)]
    assert [step for step, _ in run.method.seen] == list(range(4, 12))
    assert all(mean > 4 for _, mean in run.method.seen)


def test_a_stage_whose_part_is_missing_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"stage 'second' .* reads the data's part 'later'"):
        made(data=Points())


@pytest.mark.parametrize("step", [3, 4, 6, 9])
def test_a_run_resumed_inside_a_stage_is_the_straight_run(tmp_path: Path, step: int) -> None:
    straight = made()
    straight.fit()
    cut = made(tmp_path)
    cut.callbacks.append(stop_after(step))
    with pytest.raises(Stop):
        cut.fit()
    again = made(tmp_path, resume=True)
    again.fit()
    mine, theirs = weights(again), weights(straight)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # checkpoints are made every fourth step, and the second stage begins at step 4: only from step 8 on is it resumed
    assert ("second", True) in again.method.entered or step < 8


def test_a_stage_with_a_schedule_of_its_own_warms_up_anew() -> None:
    class Own(TwoStages):
        plan = (Stage("first", ("generator",)), Stage("second", ("hold",), data="later", lr=0.5, own_schedule=True))

    method = Own()
    method.build()
    config = EngineConfig(**{**SETTINGS, "ema": [], "export": "student"})
    run = Trainer(method, Parted(), config, show=False)
    factors = [run._learning_rate_factor(step) for step in range(12)]
    assert factors[:6] == [learning_rate_factor(step, 12, 3, "cosine") for step in range(6)]
    assert factors[6:] == [0.5 * learning_rate_factor(step, 6, 3, "cosine") for step in range(6)]
