"""Progressive distillation: what two steps come to, and rounds that hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.diffusion.process import EDM, VP, Process, RectifiedFlow, expand
from stillroom.diffusion.sampling import FewStepSampler, ddim_step
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.methods.trajectory.progressive import Progressive
from tiny_denoisers import point_teacher
from workers.toy import fitted

POINTS = ArrayData(torch.randn(32, 2, generator=torch.Generator().manual_seed(0)), {"label": torch.arange(32) % 4})


def built(teacher: Denoiser, **options: Any) -> Progressive:
    method = Progressive(Progressive.Options(**options))
    method.build(teacher)
    method.stage = method.stages()[0]
    return method


@pytest.mark.parametrize(
    "process", [RectifiedFlow(), RectifiedFlow(3.0), VP(), EDM()], ids=["flow", "shift", "vp", "edm"]
)
def test_one_step_with_the_target_ends_where_two_steps_do(process: Process) -> None:
    teacher = MixtureDenoiser(GaussianMixture(torch.tensor([[0.5, -1.0]]), 0.4), process).eval()
    method = built(teacher, begin=8, end=1)
    grid = method.times(8).float()
    torch.testing.assert_close(method.times(4), method.times(8)[::2])
    z = torch.randn(3, 2)
    times = [grid[torch.tensor([0, 2, 4]) + ahead] for ahead in range(3)]
    told = Prediction(process, "x0", method.target(z, times, {}), z, times[0])
    x = z
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = ddim_step(teacher(x, t), process, expand(s, x))
    torch.testing.assert_close(ddim_step(told, process, expand(times[2], z)), x, rtol=1e-4, atol=1e-4)


def test_the_last_interval_s_target_is_the_sample_itself_and_a_point_is_its_own() -> None:
    """Data in one point: every prediction is the point, and so is every target."""
    point = torch.tensor([[0.3, 0.7]])
    method = built(MixtureDenoiser(GaussianMixture(point, 1e-3), RectifiedFlow()).eval(), begin=4, end=1)
    grid, z = method.times(4).float(), torch.randn(2, 2)
    target = method.target(z, [grid[torch.tensor([0, 2]) + ahead] for ahead in range(3)], {})
    torch.testing.assert_close(target, point.expand(2, 2), rtol=1e-3, atol=1e-3)


def trained(folder: Path, stop: int = 0, resume: bool = False) -> Progressive:
    torch.manual_seed(0)
    method = Progressive(Progressive.Options(begin=4, end=1, guidance=2.0))
    method.build(point_teacher().eval())
    config = EngineConfig(steps=6, batch=8, checkpoint_every=2, check_freezing=True, optim={"all": {"lr": 1e-2}})
    trainer = Trainer(method, POINTS, config, folder, resume)
    fitted(trainer, stop)
    return method


def test_rounds_hand_on_and_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    straight = trained(tmp_path / "a")
    assert [(s.name, s.round) for s in straight.stages()] == [("2 steps", 1), ("1 steps", 2)]
    told = {name: p.detach() for name, p in straight.last.named_parameters()}
    plain = dict(point_teacher().named_parameters())
    assert any(not torch.equal(p, plain[name]) for name, p in told.items())  # the first round's student
    assert any(not torch.equal(p, told[name]) for name, p in straight.student.named_parameters())
    trained(tmp_path / "b", stop=5)
    again = trained(tmp_path / "b", resume=True)
    for (name, p), q in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_student_takes_its_steps_on_the_teacher_s_grid() -> None:
    flow = built(
        Denoiser(point_teacher().network, RectifiedFlow(3.0), "v", null={"label": 4}, shape=(2,)), begin=8, end=2
    )
    sampler = flow.sampler()
    assert isinstance(sampler, FewStepSampler)
    assert sampler.times == pytest.approx((1.0, 0.75))
    assert sampler.renoise == "ddim"
    assert flow.rounds() == [4, 2]
    with pytest.raises(UserError, match="do not become 1 by halving"):
        built(point_teacher(), begin=6, end=1)
