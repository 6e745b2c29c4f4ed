"""MeanFlow: what it learns where the answer is known, what it trains, how its student is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gaussians import moved, play
from stillroom.data.source import ArrayData
from stillroom.diffusion.sampling import FlowMapSampler
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.methods.trajectory.meanflow import MeanFlow
from tiny_denoisers import dit_teacher, point_teacher

MADE = {"point": point_teacher, "dit": dit_teacher}


def built(name: str = "point", **options: Any) -> MeanFlow:
    torch.manual_seed(0)
    method = MeanFlow(MeanFlow.Options(**options))
    method.build(MADE[name]().eval())
    return method


def batch(shape: tuple[int, ...], n: int = 8) -> dict[str, Any]:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    return {"x": x, "cond": {"label": torch.arange(n) % 4}}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("path", [{"path": "teacher"}, {"path": "data"}])
def test_it_trains_its_own_networks_alone(name: str, path: dict[str, Any], tmp_path: Path) -> None:
    method = built(name, **path)
    method.progress = 0.5
    terms = play(method, "jump", batch(method.teacher.shape))
    assert all(torch.isfinite(term) for term in terms.values())
    assert moved(method) == {"student"}
    data = ArrayData(torch.randn(16, *method.teacher.shape), {"label": torch.arange(16) % 4})
    Trainer(method, data, EngineConfig(steps=2, batch=4, check_freezing=True), tmp_path).fit()


def test_rows_whose_times_are_equal_learn_the_teacher_s_velocity_which_a_new_student_knows() -> None:
    method = built(apart=0.0)
    play(method, "jump", batch((2,)))
    assert method.notes["residual"] < 1e-5
    method = built(apart=1.0)
    play(method, "jump", batch((2,)))
    assert method.notes["residual"] > 1e-2


def test_several_steps_go_from_time_to_time_and_one_to_the_end() -> None:
    assert built().sampler() == FlowMapSampler((1.0,), to="end")
    assert built(steps=2).sampler() == FlowMapSampler((1.0, 0.5), to="next")
    with pytest.raises(UserError, match="leave lora away"):
        MeanFlow(MeanFlow.Options(), lora={"student": {"rank": 2}}).build(point_teacher())
