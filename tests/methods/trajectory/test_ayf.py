"""AYF: what it learns where the answer is known, what it trains, how its student is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
from stillroom.errors import UserError
from stillroom.methods.trajectory.ayf import AYF
from tiny_denoisers import point_teacher


def built(name: str = "point", **options: Any) -> AYF:
    return made(AYF, name, **options)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("path", [{}, {"guidance": 2.0}])
def test_it_trains_its_own_networks_alone(name: str, path: dict[str, Any], tmp_path: Path) -> None:
    method = built(name, **path)
    check_that_it_trains_alone(method, "align", tmp_path)


def test_a_copy_of_its_teacher_begins_without_a_change_and_has_one_when_that_has_warmed_up() -> None:
    method = built()
    for progress, least, most in ((0.0, 0.0, 1e-5), (1.0, 1e-2, 1e3)):
        method.progress = progress
        play(method, "align", batch((2,)))
        assert least <= method.notes["residual"] <= most


def test_jumps_have_lengths_whose_logit_is_normal_and_lie_between_0_and_1() -> None:
    method, seen = built(length_mean=0.5, length_std=0.3), []
    native = method.student.native
    method.student.native = lambda x, t, cond: seen.append((t.detach(), cond["r"])) or native(x, t, cond)  # type: ignore[method-assign,func-returns-value]
    play(method, "align", batch((2,), 512))
    t, s = seen[-1]
    assert s.min() >= 0
    assert t.max() <= 1
    logit = torch.logit(t - s)
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(logit.std()) == pytest.approx(0.3, abs=0.05)


def test_a_teacher_is_asked_no_later_than_its_last_time() -> None:
    method = AYF(AYF.Options(length_mean=9.0))
    method.build(noisy_teacher())
    check_that_it_is_asked_no_later_than_its_teacher_knows(method, "align")


def test_several_steps_go_from_time_to_time_and_one_to_the_end() -> None:
    assert built().sampler() == FlowMapSampler((1.0,), to="end")
    assert built(steps=4).sampler() == FlowMapSampler((1.0, 0.75, 0.5, 0.25), to="next")
    with pytest.raises(UserError, match="leave lora away"):
        AYF(AYF.Options(), lora={"student": {"rank": 2}}).build(point_teacher())


def test_a_report_shows_its_other_numbers_of_steps_too() -> None:
    check_that_it_also_draws_in(built(steps=2), 1, 4)
