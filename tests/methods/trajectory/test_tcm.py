"""TCM: what it learns where the answer is known, what it trains, how its student is run."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

from gaussians import draws, play
from small_methods import MADE, batch, check_that_it_also_draws_in, check_that_it_trains_alone, made
from stillroom.diffusion.times import TimeLaw
from stillroom.errors import UserError
from stillroom.losses.flow_map import noise_ratio
from stillroom.method import Stage
from stillroom.methods.trajectory.tcm import TCM


def built(name: str = "point", **options: Any) -> TCM:
    return made(TCM, name, **options)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("path", [{"path": "teacher"}, {"path": "data"}])
def test_it_trains_its_own_networks_alone(name: str, path: dict[str, Any], tmp_path: Path) -> None:
    method = built(name, **path)
    check_that_it_trains_alone(method, "agree", tmp_path)


def test_in_the_second_stage_small_times_are_left_to_the_first_model() -> None:
    method = built(cut=1.0)
    method.stage, method.progress = Stage("truncated"), 1.0
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.1)
    method.enter(Stage("truncated"), None, resumed=True)
    assert not torch.equal(next(method.first.parameters()), next(method.student.parameters()))
    method.enter(Stage("truncated"), None, resumed=False)
    assert torch.equal(next(method.first.parameters()), next(method.student.parameters()))
    method.draw = draws(4000)
    t, r = method.drawn_times(torch.zeros(4000, 2), late=True)
    ratio_t, ratio_r = (noise_ratio(method.teacher.process, time) for time in (t, r))
    assert ratio_t.min() >= 1 - 1e-3
    assert float((ratio_r <= 1).float().mean()) > method.options.held * 0.9
    early = method.drawn_times(torch.zeros(4000, 2), late=False)[0]
    assert early.min() < 0.1


def test_late_times_are_the_part_of_their_law_above_the_cut() -> None:
    method = built(cut=1.0, held=0.0)
    method.stage, method.progress, method.draw = Stage("truncated"), 1.0, draws(4000)
    t, _ = method.drawn_times(torch.zeros(4000, 2), late=True)
    logs = noise_ratio(method.teacher.process, t).log()
    law = NormalDist(method.options.late_times.mean, method.options.late_times.std)
    below = law.cdf(0.0)
    for share in (0.1, 0.5, 0.9):
        assert float(logs.quantile(share)) == pytest.approx(law.inv_cdf(below + share * (1 - below)), abs=0.1)
    assert float((logs < 1e-3).float().mean()) < 0.01
    with pytest.raises(UserError, match="late_times is uniform"):
        built(late_times=TimeLaw("uniform"))


def test_rows_that_the_first_model_holds_are_pulled_to_it() -> None:
    method = built(held=1.0, boundary=2.0, late_times=TimeLaw("log-normal", 0.001, 0.999, mean=-9.0, std=0.1))
    method.stage, method.progress = Stage("truncated"), 1.0
    given = batch((2,))
    plain = play(method, "agree", given)["agree"].item()
    assert float(method.notes["boundary"]) == pytest.approx(float(method.notes["gap"]))
    with torch.no_grad():
        for parameter in method.first.parameters():
            parameter.add_(0.2)
    assert play(method, "agree", given)["agree"].item() != pytest.approx(plain)


def test_the_second_step_is_at_the_ratio_that_is_said() -> None:
    assert [stage.name for stage in built().stages()] == ["consistency", "truncated"]
    first, second = built(steps=2, middle=1.5).sampler().times
    assert first == 1.0
    assert second / (1 - second) == pytest.approx(1.5)


def test_a_report_shows_its_other_numbers_of_steps_too() -> None:
    check_that_it_also_draws_in(built(), 2)
