"""BOOT: the signal-ODE on a Gaussian, where everything is known; what is read and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_conditions import OnlyConditions
from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import EDM, VP, Process, RectifiedFlow
from stillroom.diffusion.sampling import SignalSampler, ddim_step
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.methods.trajectory.boot import BOOT
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import dit_teacher, point_teacher


def built(teacher: Denoiser, **options: Any) -> BOOT:
    method = BOOT(BOOT.Options(**options))
    method.build(teacher)
    method.prepare(OnlyConditions())
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 64), 64)
    method.step, method.progress = 0, 0.0
    return method


GAUSSIAN = GaussianMixture(torch.tensor([[0.5, -1.0]]), 0.4)


@pytest.mark.parametrize("process", [RectifiedFlow(), VP()], ids=["flow", "vp"])
def test_a_step_of_the_signal_is_the_exact_ddim_step(process: Process) -> None:
    """From the same state: ``x_s = alpha_s y_s + sigma_s eps`` is where DDIM goes from ``x_t``."""
    teacher = MixtureDenoiser(GAUSSIAN, process).eval()
    method = built(teacher)
    eps, y = torch.randn(64, 2), torch.randn(64, 2)
    method.said = lambda *_: y  # type: ignore[method-assign]
    t, s = (torch.full((64,), share * process.t_max) for share in (0.7, 0.6))
    after, _ = method.target(eps, t, s, {})
    (alpha, sigma), (alpha_s, sigma_s) = method.rates(t, eps), method.rates(s, eps)
    x_t = alpha * y + sigma * eps
    torch.testing.assert_close(alpha_s * after + sigma_s * eps, ddim_step(teacher(x_t, t), process, s[:, None]))
    method.options.predicts = "state"
    method.said = lambda *_: x_t  # type: ignore[method-assign]
    torch.testing.assert_close(method.target(eps, t, s, {})[0], alpha_s * after + sigma_s * eps, rtol=1e-4, atol=1e-5)


class Exact(nn.Module):
    """The signals of DDIM on a grid of ``delta``, as a network of a flow's velocities says them: ``y = x - T v``, x
    ``T eps``, so ``v = (T eps - y) / T``. Between the grid's times the nearest one is taken."""

    def __init__(self, teacher: Denoiser, delta: float, high: float, low: float) -> None:
        super().__init__()
        self.teacher, self.high, self.own = [teacher], high, nn.Parameter(torch.zeros(()))
        self.times = torch.linspace(high, low, round((high - low) / delta) + 1)

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        teacher, eps = self.teacher[0], x / self.high
        y = teacher(self.high * eps, torch.tensor(self.high)).x0
        found = [y]
        for t, s in zip(self.times[:-1], self.times[1:], strict=True):
            k = 1 - ((1 - t) * s) / (t * (1 - s))
            y = y + k * (teacher((1 - t) * y + t * eps, t).x0 - y)
            found.append(y)
        which = (time[:, None] / 1000 - self.times).abs().argmin(1)
        y = torch.stack(found, 1)[torch.arange(len(x)), which]
        return (x - y) / self.high + self.own


def test_the_fixed_point_is_ddim_on_a_grid_of_delta_and_its_loss_is_0() -> None:
    teacher = MixtureDenoiser(GAUSSIAN, RectifiedFlow()).eval()
    delta, low, high = 0.14, 0.01, 0.99
    method = built(teacher, delta=delta, low=low, high=high)
    method.student = Denoiser(Exact(teacher, delta, high, low), RectifiedFlow(), "v", shape=(2,))
    grid = torch.linspace(high, low, 8)
    eps = torch.randn(64, 2)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        target, _ = method.target(eps, t.expand(64), s.expand(64), {})
        torch.testing.assert_close(method.said(eps, s.expand(64), {}), target, rtol=1e-3, atol=1e-4)
    assert float(method.boundary(eps, {})) < 1e-10
    x = (1 - high) * teacher(high * eps, torch.tensor(high)).x0 + high * eps  # what the boundary says of the start
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x = ddim_step(teacher(x, t), teacher.process, s)
    end = SignalSampler(low, high).sample(method.student, eps)
    torch.testing.assert_close((1 - low) * end + low * eps, x, rtol=1e-3, atol=1e-4)


def test_gradients_pass_through_the_later_prediction_alone_and_are_its_residual() -> None:
    """``dL / dy(s) = 2 w (y(s) - target) / numel``, by finite differences of nothing but the student."""
    method = built(point_teacher().eval(), beta=0.0)
    method.student.requires_grad_(True)
    terms = method.bootstrap({"cond": {"label": torch.arange(64) % 4}})
    terms["bootstrap"].backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in method.teacher.parameters())
    bias = method.student.network.out.bias  # type: ignore[union-attr]
    assert bias.grad is not None  # type: ignore[union-attr]
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 64), 64)
    eps, u = method.noise(), method.draw.uniform(64)
    t, s, cond = 0.99 - 0.93 * u, 0.99 - 0.93 * u - 0.05, {"label": torch.arange(64) % 4}
    with torch.no_grad():
        target, k = method.target(eps, t, s, cond)

    def loss() -> float:
        with torch.no_grad():
            error = method.said(eps, s, cond) - target
            return float((error.square().mean(1) * (1 / k.square()).clamp(max=1000).flatten()).double().mean())

    before = bias.detach().clone()  # type: ignore[union-attr]
    for i in range(2):
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                bias.copy_(before)  # type: ignore[operator,union-attr]
                bias[i] += step  # type: ignore[index]
            ends.append(loss())
        with torch.no_grad():
            bias.copy_(before)  # type: ignore[operator,union-attr]
        assert float(bias.grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-3)  # type: ignore[index]


def test_one_step_of_heun_is_nearer_the_path_than_one_of_euler() -> None:
    """From an exact state, against the same step in 200."""
    process = RectifiedFlow()
    teacher = MixtureDenoiser(GAUSSIAN, process).eval()
    method = built(teacher)
    eps, x_t = torch.randn(64, 2), torch.randn(64, 2)
    t, s = torch.full((64,), 0.6), torch.full((64,), 0.4)
    y = (x_t - 0.6 * eps) / 0.4
    method.said = lambda *_: y  # type: ignore[method-assign]
    x, grid = x_t, torch.linspace(0.6, 0.4, 201)
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        x = ddim_step(teacher(x, now), process, then)
    errors = {}
    for solver in ("euler", "heun"):
        method.options.solver = solver  # type: ignore[assignment]
        after, _ = method.target(eps, t, s, {})
        errors[solver] = float((0.6 * after + 0.4 * eps - x).norm())
    assert errors["heun"] < 0.2 * errors["euler"]


def test_the_teacher_is_guided_and_clipped() -> None:
    teacher = point_teacher().eval()
    x, t, cond = 4 * torch.randn(64, 2), torch.full((64,), 0.7), {"label": torch.arange(64) % 4}
    with torch.no_grad():
        k, u = teacher(x, t, cond).v, teacher(x, t, {"label": torch.full((64,), 4)}).v
        x0 = x - 0.7 * (u + 3 * (k - u))
        torch.testing.assert_close(built(teacher, guidance=3.0).taught(x, t, cond), x0, rtol=1e-4, atol=1e-5)
        clipped = built(teacher, guidance=3.0, clip=0.5).taught(x, t, cond)
    assert float(x0.abs().max()) > 0.5
    torch.testing.assert_close(clipped, x0.clamp(-0.5, 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "reached"), [(1.0, (0.05, 0.3, 0.55, 1.0)), (0.5, (0.05, 0.55, 1.0, 1.0))])
def test_progressive_times_come_down_from_t_and_reach_the_last_one_in_time(
    share: float, reached: tuple[float, ...]
) -> None:
    method = built(point_teacher().eval(), progressive=True, progressive_share=share)
    seen: list[Tensor] = []
    exact = method.target
    method.target = lambda eps, t, s, cond: (seen.append(t), exact(eps, t, s, cond))[1]  # type: ignore[func-returns-value,method-assign]
    u = torch.rand(64, generator=torch.Generator().manual_seed(7))
    method.draw.uniform = lambda *_: u  # type: ignore[method-assign]
    for progress, reach in zip((0.0, 0.25, 0.5, 1.0), reached, strict=True):
        method.progress = progress
        method.bootstrap({"cond": {"label": torch.arange(64) % 4}})
        torch.testing.assert_close(seen[-1], 0.99 - 0.93 * reach * u)


@pytest.mark.parametrize("errors", ["signal", "state"])
def test_weights_are_bounded_and_of_errors_of_the_signal_or_of_the_state(errors: Any) -> None:
    """With a bound below every 1 / k^2 the loss is that bound times the mean squared error."""
    method = built(point_teacher().eval(), predicts="state", state_errors=errors, most=1.0, beta=0.0)
    cond = {"label": torch.arange(64) % 4}
    with torch.no_grad():
        found = method.bootstrap({"cond": cond})["bootstrap"]
        method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 64), 64)
        eps, u = method.noise(), method.draw.uniform(64)
        t, s = 0.99 - 0.93 * u, 0.99 - 0.93 * u - 0.05
        f = method.teacher((x_t := method.said(eps, t, cond)), t, cond).x0
        x_s = (s / t)[:, None] * x_t + ((1 - s) - (1 - t) * s / t)[:, None] * f
        error = method.said(eps, s, cond) - x_s
        error = error / (1 - s)[:, None] if errors == "signal" else error
    torch.testing.assert_close(found, error.square().mean(), rtol=1e-4, atol=1e-5)


def test_what_is_measured_is_the_distance_of_one_step_from_many_and_its_share_of_the_teachers() -> None:
    """At T the student is the teacher's own step: asked there, its share is 1."""
    teacher = point_teacher().eval()
    method = built(teacher, held_out=300, held_out_steps=4, measure_every=2)
    method.measure()
    assert not method.notes
    method.step = 1
    method.student.train()
    method.measure()
    assert method.student.network.training
    assert method.others is not None
    noise, cond = method.others.noise, method.others.cond
    with torch.no_grad():
        own = SignalSampler(0.01, 0.99).sample(method.student, noise, cond)
        first = teacher(0.99 * noise, 0.99, cond).x0
    gaps = [float((one - method.others.end).square().mean()) for one in (own, first)]
    assert float(method.notes["end_gap"]) == pytest.approx(gaps[0], rel=1e-4)
    assert float(method.notes["end_share"]) == pytest.approx(gaps[0] / gaps[1], rel=1e-4)
    method.notes = {}
    method.measure()
    assert not method.notes  # once in a step, whatever its micro-batches


def run(folder: Path, resume: bool = False, stop: int = 0, **engine: Any) -> BOOT:
    from workers.toy import fitted

    method = BOOT(BOOT.Options(held_out=4, held_out_steps=2, measure_every=1))
    method.build(point_teacher().eval())
    optim = {"all": {"name": "sgd", "lr": 1e-3}}
    config = EngineConfig(**{"steps": 5, "batch": 8, "checkpoint_every": 2, "optim": optim, **engine})
    trainer = Trainer(method, OnlyConditions(), config, folder, resume)
    fitted(trainer, stop)
    return method


def test_micro_batches_and_an_interruption_change_nothing(tmp_path: Path) -> None:
    straight = run(tmp_path / "a")
    run(tmp_path / "b", stop=3)
    resumed, parted = run(tmp_path / "b", resume=True), run(tmp_path / "c", accumulate=2)
    for name, p in straight.student.named_parameters():
        assert torch.equal(resumed.student.get_parameter(name), p)
        torch.testing.assert_close(parted.student.get_parameter(name), p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [point_teacher, dit_teacher])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"predicts": "state"},
        {"predicts": "state", "state_errors": "state"},
        {"progressive": True, "progressive_share": 0.5},
        {"pairs": 8},
        {"solver": "heun"},
        {"guidance": 2.0},
        {"flipped": True},
    ],
)
def test_every_arm_trains_on_conditions_alone(make: Any, change: dict[str, Any], tmp_path: Path) -> None:
    method = BOOT(BOOT.Options(**change, pair_steps=2, held_out=4, held_out_steps=2, measure_every=1))
    method.build(make().eval())
    before = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    Trainer(method, OnlyConditions(), EngineConfig(steps=2, batch=8, check_freezing=True), tmp_path).fit()
    assert any(not torch.equal(p, before[name]) for name, p in method.student.named_parameters())
    model = ImageGenerator(method.student, method.sampler())
    model.save(tmp_path / "student")
    again = ImageGenerator.load(tmp_path / "student")
    assert torch.equal(again.sample([0, 1], seed=1), model.sample([0, 1], seed=1))
    assert again.sampler.nfe == 1


def test_the_student_begins_as_the_teacher_s_first_step() -> None:
    teacher = point_teacher().eval()
    method = built(teacher)
    eps, top, cond = torch.randn(64, 2), torch.full((64,), 0.99), {"label": torch.arange(64) % 4}
    with torch.no_grad():
        torch.testing.assert_close(method.said(eps, top, cond), teacher(0.99 * eps, top, cond).x0)
        assert float(method.boundary(eps, cond)) < 1e-12


def test_flipped_it_is_the_network_that_a_one_step_sampler_asks() -> None:
    """The student at the time ``low`` is what a few-step sampler gets at ``high``, which is how it begins: as the
    teacher's own first step."""
    teacher = point_teacher().eval()
    method = built(teacher, flipped=True)
    eps, cond = torch.randn(64, 2), {"label": torch.arange(64) % 4}
    with torch.no_grad():
        end = method.said(eps, torch.full((64,), 0.01), cond)
        torch.testing.assert_close(end, teacher(0.99 * eps, 0.99, cond).x0)
        torch.testing.assert_close(method.sampler().sample(method.student, eps, cond), end)
        start = method.said(eps, torch.full((64,), 0.99), cond)
        torch.testing.assert_close(start, 0.99 * eps - 0.99 * teacher(0.99 * eps, 0.01, cond).v)


def test_beside_a_teacher_of_noise_the_network_says_the_signal_itself() -> None:
    plain = point_teacher()
    teacher = Denoiser(plain.network, VP(), "eps", null=plain.null, shape=(2,)).eval()
    method = built(teacher)
    eps, t, cond = torch.randn(64, 2), torch.full((64,), 0.5), {"label": torch.arange(64) % 4}
    top = teacher.process.sigma(torch.tensor(0.99 * teacher.process.t_max))
    with torch.no_grad():
        torch.testing.assert_close(method.said(eps, t, cond), method.student.native(top * eps, t, cond))


def noise_teacher() -> Denoiser:
    plain = point_teacher()
    return Denoiser(plain.network, VP(), "eps", null=plain.null, shape=(2,)).eval()


@pytest.mark.parametrize("predicts", ["signal", "state"])
def test_beside_a_teacher_of_noise_it_begins_by_what_the_first_step_says_at_all_times(predicts: Any) -> None:
    method = built(noise_teacher(), predicts=predicts, begin_share=0.25)
    assert [(stage.turns, stage.share) for stage in method.stages()] == [(("begin",), 0.25), (("bootstrap",), 0.75)]
    eps, cond = torch.randn(64, 2), {"label": torch.arange(64) % 4}
    process = method.teacher.process
    t = torch.linspace(0.01, 0.99, 64) * process.t_max
    top = torch.full((64,), 0.99 * process.t_max)
    with torch.no_grad():
        first = method.teacher(process.sigma(top)[:, None] * eps, top, cond).x0
        state = process.alpha(t)[:, None] * first + process.sigma(t)[:, None] * eps
        wanted = first if predicts == "signal" else state
        method.said = lambda *_: wanted  # type: ignore[method-assign]
        assert float(method.distance_to_first(eps, t, cond)) < 1e-10
        method.said = lambda *_: wanted + 0.5  # type: ignore[method-assign]
        assert float(method.begin({"cond": cond})["begin"]) > 0
        assert float(method.distance_to_first(eps, t, cond)) == pytest.approx(0.25)


def test_the_first_part_brings_it_near_the_first_step_and_a_flow_s_student_has_none(tmp_path: Path) -> None:
    def gap(steps: int) -> float:
        method = BOOT(BOOT.Options(begin_share=0.99))
        method.build(noise_teacher())
        optim = {"all": {"lr": 1e-2}}
        Trainer(method, OnlyConditions(), EngineConfig(steps=steps, batch=64, optim=optim), tmp_path / str(steps)).fit()
        eps, cond = torch.randn(256, 2), {"label": torch.arange(256) % 4}
        with torch.no_grad():
            return float(method.distance_to_first(eps, method.top(eps), cond))

    assert gap(100) < 0.5 * gap(1)
    assert [stage.name for stage in built(point_teacher().eval()).stages()] == ["train"]
    assert [stage.name for stage in built(noise_teacher(), pairs=4).stages()] == ["train"]
    assert {turn.name for turn in built(noise_teacher()).turns()} == {"begin", "bootstrap"}
    assert {turn.name for turn in built(point_teacher()).turns()} == {"bootstrap"}


def test_what_does_not_fit_is_refused_with_a_cure() -> None:
    with pytest.raises(UserError, match="leave no times"):
        BOOT(BOOT.Options(delta=0.99)).build(point_teacher())
    with pytest.raises(UserError, match="students of the signal"):
        BOOT(BOOT.Options(flipped=True, predicts="state")).build(point_teacher())
    plain = point_teacher()
    with pytest.raises(UserError, match="preconditioning"):
        BOOT(BOOT.Options()).build(Denoiser(plain.network, EDM(), "edm", null=plain.null, shape=(2,)))
