"""SCM: what it learns where the answer is known, what it trains, how its student is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gaussians import moved, play
from small_methods import (
    MADE,
    batch,
    check_that_it_also_draws_in,
    check_that_it_is_asked_no_later_than_its_teacher_knows,
    made,
    noisy_teacher,
)
from stillroom.data.source import ArrayData
from stillroom.diffusion.times import TimeLaw
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.methods.trajectory.scm import SCM


def built(name: str = "point", **options: Any) -> SCM:
    return made(SCM, name, **options)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("path", [{"path": "teacher"}, {"path": "data"}])
def test_it_trains_its_own_networks_alone(name: str, path: dict[str, Any], tmp_path: Path) -> None:
    method = built(name, **path)
    method.progress = 0.5
    terms = play(method, "consistency", batch(method.teacher.shape))
    assert all(torch.isfinite(term) for term in terms.values())
    assert moved(method) == {"student", "variance"}
    data = ArrayData(torch.randn(16, *method.teacher.shape), {"label": torch.arange(16) % 4})
    Trainer(method, data, EngineConfig(steps=2, batch=4, check_freezing=True), tmp_path).fit()


def test_a_copy_of_its_teacher_begins_without_a_tangent_and_has_one_when_that_has_warmed_up() -> None:
    method = built()
    for progress, least, most in ((0.0, 0.0, 1e-5), (1.0, 1e-2, 1e3)):
        method.progress = progress
        play(method, "consistency", batch((2,)))
        assert least <= method.notes["tangent"] <= most


def test_a_teacher_is_asked_no_later_than_its_last_time() -> None:
    method = SCM(SCM.Options(times=TimeLaw("log-normal", 0.0007, 0.9993, mean=9.0, std=0.1)))
    method.build(noisy_teacher())
    check_that_it_is_asked_no_later_than_its_teacher_knows(method, "consistency")


def test_the_second_step_is_at_the_time_that_is_said() -> None:
    method = built(steps=2, middle=1.1)
    first, second = method.sampler().times
    assert first == 1.0
    assert math.atan2(second, 1 - second) == pytest.approx(1.1)
    assert built().sampler().times == (1.0,)


def test_a_report_shows_its_other_numbers_of_steps_too() -> None:
    check_that_it_also_draws_in(built(), 2)
    check_that_it_also_draws_in(built(steps=2), 1)
