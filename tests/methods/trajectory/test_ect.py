"""ECT: what it learns where the answer is known, what it trains, how its student is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gaussians import draws, play
from small_methods import MADE, batch, check_that_it_also_draws_in, check_that_it_trains_alone, made
from stillroom.methods.trajectory.ect import ECT


def built(name: str = "point", **options: Any) -> ECT:
    return made(ECT, name, **options)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("path", [{"path": "teacher"}, {"path": "data"}])
def test_it_trains_its_own_networks_alone(name: str, path: dict[str, Any], tmp_path: Path) -> None:
    method = built(name, **path)
    check_that_it_trains_alone(method, "agree", tmp_path)


def test_the_two_times_come_nearer_in_stages() -> None:
    method = built(stages=4)
    for progress, near in ((0.0, 1 / 2), (0.3, 1 / 4), (0.99, 1 / 16), (1.0, 1 / 16)):
        method.progress = progress
        play(method, "agree", batch((2,)))
        assert float(method.notes["nearness"]) == pytest.approx(near)


def test_as_far_apart_as_noise_and_data_it_is_denoising() -> None:
    """q^-a = 1: every target is the data themselves."""
    method = built(path="data", q=1.0000001, stages=1)
    given = batch((2,))
    loss = play(method, "agree", given)["agree"]
    method.draw = draws(8)
    t = method.options.times.sample(method.draw, method.teacher.process)
    x_t = method.teacher.process.add_noise(given["x"], method.draw.normal_like(given["x"]), t)
    with torch.no_grad():
        away = (method.student(x_t, t, given["cond"]).x0 - given["x"]).norm(dim=1)
    torch.testing.assert_close(loss.detach(), (away * (1 - t) / t).mean(), rtol=1e-3, atol=1e-4)


def test_the_second_step_is_at_the_ratio_that_is_said() -> None:
    first, second = built(steps=2, middle=0.821).sampler().times
    assert first == 1.0
    assert second / (1 - second) == pytest.approx(0.821)


def test_a_report_shows_its_other_numbers_of_steps_too() -> None:
    check_that_it_also_draws_in(built(), 2)
    check_that_it_also_draws_in(built(steps=2), 1)
