"""MeanFlow: what it learns where the answer is known, what it trains, how its student is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gaussians import play
from small_methods import (
    MADE,
    batch,
    check_that_it_also_draws_in,
    check_that_it_is_asked_no_later_than_its_teacher_knows,
    check_that_it_trains_alone,
    made,
    noisy_teacher,
)
from stillroom.diffusion.sampling import FlowMapSampler
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.methods.trajectory.meanflow import MeanFlow
from tiny_denoisers import point_teacher


def built(name: str = "point", **options: Any) -> MeanFlow:
    return made(MeanFlow, name, **options)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("path", [{"path": "teacher"}, {"path": "data"}])
def test_it_trains_its_own_networks_alone(name: str, path: dict[str, Any], tmp_path: Path) -> None:
    method = built(name, **path)
    check_that_it_trains_alone(method, "jump", tmp_path)


def test_rows_whose_times_are_equal_learn_the_teacher_s_velocity_which_a_new_student_knows() -> None:
    method = built(apart=0.0)
    play(method, "jump", batch((2,)))
    assert method.notes["residual"] < 1e-5
    method = built(apart=1.0)
    play(method, "jump", batch((2,)))
    assert method.notes["residual"] > 1e-2


def test_a_teacher_is_asked_no_later_than_its_last_time() -> None:
    method = MeanFlow(MeanFlow.Options(times=TimeLaw("uniform", 0.9999, 1.0)))
    method.build(noisy_teacher())
    check_that_it_is_asked_no_later_than_its_teacher_knows(method, "jump")


def test_several_steps_go_from_time_to_time_and_one_to_the_end() -> None:
    assert built().sampler() == FlowMapSampler((1.0,), to="end")
    assert built(steps=2).sampler() == FlowMapSampler((1.0, 0.5), to="next")
    with pytest.raises(UserError, match="leave lora away"):
        MeanFlow(MeanFlow.Options(), lora={"student": {"rank": 2}}).build(point_teacher())


def test_a_report_shows_its_other_numbers_of_steps_too() -> None:
    check_that_it_also_draws_in(built(), 2, 4)
    check_that_it_also_draws_in(built(steps=3), 1, 2, 4)
