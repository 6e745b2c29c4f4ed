"""Consistency in continuous time against the closed form of a Gaussian, and against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.diffusion.denoiser import Cond, Denoiser, Prediction
from stillroom.diffusion.process import EDM, VP, Process, RectifiedFlow, TrigFlow
from stillroom.losses.flow_map import (
    adaptive,
    bound,
    earlier,
    evened,
    huber,
    map_change,
    noise_ratio,
    normalised,
    pulled,
    reached,
    scm_tangent,
    towards,
)

MEAN, STD = 0.4, 0.6
DOUBLE = {"dtype": torch.float64}


def ends_at(u: Tensor, t: Tensor) -> Tensor:
    """Where the probability-flow ODE of N(m, s^2) leads from ``u`` at ``t``: quantiles stay what they are."""
    return MEAN + STD * (u - t.cos() * MEAN) / (t.cos() ** 2 * STD**2 + t.sin() ** 2).sqrt()


def from_end(x0: Tensor, t: Tensor) -> Tensor:
    return t.cos() * MEAN + (x0 - MEAN) / STD * (t.cos() ** 2 * STD**2 + t.sin() ** 2).sqrt()


def velocity(u: Tensor, t: Tensor) -> Tensor:
    """du/dt of that path: the mean of ``cos(t) eps - sin(t) x0`` given u."""
    v = t.cos() ** 2 * STD**2 + t.sin() ** 2
    away = u - t.cos() * MEAN
    x0, eps = MEAN + t.cos() * STD**2 / v * away, t.sin() / v * away
    return t.cos() * eps - t.sin() * x0


def consistent(u: Tensor, t: Tensor) -> Tensor:
    """F of the exact consistency function."""
    return (t.cos() * u - ends_at(u, t)) / t.sin()


def other(u: Tensor, t: Tensor) -> Tensor:
    """F of some network."""
    return torch.sin(2 * u) * t + 0.3 * u**2 - t**2


def at() -> tuple[Tensor, Tensor]:
    return torch.linspace(-2, 2, 9, **DOUBLE), torch.linspace(0.05, 1.5, 9, **DOUBLE)


def tangent(network: object, warm: float = 1.0) -> Tensor:
    u, t = at()
    along, factor = velocity(u, t), t.cos() * t.sin()
    assert callable(network)
    own, slope = torch.func.jvp(network, (u, t), (factor * along, factor))
    return scm_tangent(own[:, None], along[:, None], slope[:, None], u[:, None], t, warm)[:, 0]


def test_the_exact_consistency_function_of_a_gaussian_has_no_tangent() -> None:
    u, t = at()
    torch.testing.assert_close(from_end(ends_at(u, t), t), u)
    assert tangent(consistent).abs().max() < 1e-12
    assert tangent(other).abs().min() > 1e-3


def test_the_tangent_is_the_change_of_f_along_the_path_by_finite_differences() -> None:
    """``cos(t) d/dt f(u(t), t)`` on the path itself: the factor of cos t sin t counts once."""
    u, t = at()
    x0, h = ends_at(u, t), 1e-5

    def f(time: Tensor) -> Tensor:
        state = from_end(x0, time)
        return time.cos() * state - time.sin() * other(state, time)

    slope = (f(t + h) - f(t - h)) / (2 * h)
    torch.testing.assert_close(tangent(other), t.cos() * slope, rtol=1e-7, atol=1e-8)


def test_without_warm_up_the_first_tangent_is_the_difference_of_velocities_alone() -> None:
    u, t = at()
    expected = -(t.cos() ** 2) * (other(u, t) - velocity(u, t))
    torch.testing.assert_close(tangent(other, 0.0), expected)
    torch.testing.assert_close(tangent(other, 0.5), (tangent(other, 0.0) + tangent(other)) / 2)


def test_below_a_ratio_of_noise_the_tangent_is_the_difference_of_velocities_alone() -> None:
    """By hand: tan .2 = .203 and tan .3 = .309; only the second row moves against its change."""
    t, ones = torch.tensor([0.2, 0.3]), torch.ones(2, 1)
    found = scm_tangent(ones, 3 * ones, 5 * ones, 7 * ones, t, bound(t, 0.25, 0.5))
    velocities = 2 * t.cos() ** 2
    change = 0.5 * (7 * t.cos() * t.sin() + 5)
    torch.testing.assert_close(found[:, 0], torch.stack([velocities[0], velocities[1] - change[1]]))
    assert bound(t, 0.0, 0.5) == 0.5


def test_a_normalised_tangent_has_the_length_that_is_said() -> None:
    g = torch.tensor([[3.0, 4.0], [0.03, 0.04]])
    torch.testing.assert_close(normalised(g, 0.1, "l2"), g / torch.tensor([[5.1], [0.15]]))
    root = (12.5) ** 0.5
    torch.testing.assert_close(normalised(g, 0.0, "rms"), g / torch.tensor([[root], [root / 100]]))
    assert torch.equal(normalised(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_the_loss_moves_the_answer_along_the_step_with_its_weight() -> None:
    answer = torch.randn(4, 3, **DOUBLE, requires_grad=True)
    step, logvar = torch.randn(4, 3, **DOUBLE), torch.randn(4, **DOUBLE, requires_grad=True)
    weight = torch.rand(4, **DOUBLE)
    loss = towards(answer, step, weight, logvar)
    loss.backward()
    size = step.square().mean(1)
    torch.testing.assert_close(loss, (weight * torch.exp(-logvar) * size + logvar).mean())
    torch.testing.assert_close(answer.grad, -2 * (weight * torch.exp(-logvar.detach()))[:, None] * step / 12)
    torch.testing.assert_close(logvar.grad, (1 - weight * torch.exp(-logvar.detach()) * size) / 4)
    torch.testing.assert_close(towards(answer, step), step.square().mean())


@pytest.mark.parametrize("process", [TrigFlow(), RectifiedFlow(), VP()])
@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_an_evened_loss_moves_velocities_alike_whatever_the_network_says(process: Process, kind: str) -> None:
    """By autograd: ``|dv/dout|^2`` times the factor is 1, so that a step down the gradient moves v as it moves that of
    a network whose output v is."""
    x, t = torch.randn(5, 2, **DOUBLE), torch.linspace(0.1, 0.9, 5, **DOUBLE) * process.t_max
    out = torch.randn(5, 2, **DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(Prediction(process, kind, out, x, t).v.sum(), out)
    torch.testing.assert_close(slope[:, 0].square() * evened(process, kind, t), torch.ones_like(t))
    if not isinstance(process, VP):  # which has noise at 0 too
        assert evened(process, "x0", torch.zeros(2, **DOUBLE)).abs().max() == 0


# --- jumps between any two times --------------------------------------------------------------------------------------
def flow_state(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Where the flow's path of N(m, s^2) leads from x at t to r."""

    def spread(time: Tensor) -> Tensor:
        return ((1 - time) ** 2 * STD**2 + time**2).sqrt()

    return (1 - r) * MEAN + spread(r) / spread(t) * (x - (1 - t) * MEAN)


def flow_velocity(x: Tensor, t: Tensor) -> Tensor:
    v = (1 - t) ** 2 * STD**2 + t**2
    away = x - (1 - t) * MEAN
    return t / v * away - (MEAN + (1 - t) * STD**2 / v * away)


def times() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.linspace(-2, 2, 7, **DOUBLE)[:, None],
        torch.linspace(0.3, 1, 7, **DOUBLE),
        torch.linspace(0, 0.25, 7, **DOUBLE),
    )


@pytest.mark.parametrize("how", ["exact", "difference"])
def test_mean_velocities_of_a_gaussian_flow_do_not_change_and_others_do(how: Any) -> None:
    x, t, r = times()

    def mean(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (x - flow_state(x, t[:, None], r[:, None])) / (t - r)[:, None]

    v = flow_velocity(x, t[:, None])
    found = map_change(mean, v, x, t, r, how=how)
    assert found.tangent.abs().max() < (1e-12 if how == "exact" else 1e-5)
    torch.testing.assert_close(found.own, mean(x, t, r))
    instant = map_change(lambda x, t, r: flow_velocity(x, t[:, None]), v, x, t, r)
    assert instant.tangent.abs().max() > 0.05
    cold = map_change(lambda x, t, r: flow_velocity(x, t[:, None]), v, x, t, r, warm=0.0)
    assert cold.tangent.abs().max() < 1e-12


def test_the_change_of_a_jump_is_that_along_the_path_by_finite_differences() -> None:
    x, t, r = times()
    h = 1e-5

    def net(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return torch.sin(2 * x) * t[:, None] + x * r[:, None] - t[:, None] ** 2

    def jump(time: Tensor) -> Tensor:
        state = flow_state(x, t[:, None], time[:, None])
        return state - (time - r)[:, None] * net(state, time, r)

    slope = (jump(t + h) - jump(t - h)) / (2 * h)
    torch.testing.assert_close(
        map_change(net, flow_velocity(x, t[:, None]), x, t, r).tangent, slope, rtol=1e-7, atol=1e-8
    )


def test_the_adaptive_weight_is_written_by_hand() -> None:
    g = torch.tensor([[1.0, 3.0], [0.0, 0.0]], **DOUBLE)
    torch.testing.assert_close(adaptive(g, 0.5, 0.1), torch.tensor([5.1, 0.1], **DOUBLE) ** -0.5)


# --- by small steps ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("process", [RectifiedFlow(), EDM()])
def test_the_earlier_time_is_the_paper_s_and_never_below_data(process: Process) -> None:
    ratio = torch.tensor([0.05, 1.0, 10.0], **DOUBLE)
    t = process.time_of(torch.ones_like(ratio), ratio)
    gap = 1 / 8
    n = torch.tensor([1 + 8 / (1 + math.exp(s)) for s in (0.05, 1.0, 10.0)], **DOUBLE)
    torch.testing.assert_close(noise_ratio(process, earlier(process, t, gap)), ratio * (1 - gap * n))
    assert earlier(process, t, 1.0).abs().max() == 0


class Ends(Denoiser):
    """The exact consistency function of N(m, s^2) under a flow."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), RectifiedFlow(), "x0", shape=(1,))

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None, guidance: Any = 1.0) -> Prediction:
        assert isinstance(t, Tensor)
        return Prediction(self.process, "x0", flow_state(x_t, t[:, None], torch.zeros_like(t)[:, None]), x_t, t)


def test_an_exact_consistency_function_is_pulled_to_where_it_is() -> None:
    teacher = MixtureDenoiser(GaussianMixture(torch.tensor([[MEAN]]), STD), RectifiedFlow())
    x, t, _ = times()
    t = t.clamp(max=0.95)
    student, away = Ends(), huber(x, 0 * x)
    for gap in (1e-3, 1e-2):
        r = earlier(RectifiedFlow(), t, gap)
        target = pulled(student, reached(RectifiedFlow(), teacher, x, x, x, t, r, {}), r, {})
        assert float((huber(student(x, t).x0, target) / away.clamp_min(0.1)).max()) < 30 * gap**2
    none = torch.zeros_like(t)
    x_r = reached(RectifiedFlow(), None, x, 0 * x, x, t, none, {})
    torch.testing.assert_close(pulled(student, x_r, none, {}), x)  # data themselves at r = 0


class Off(Denoiser):
    """Says x0 a hundredth too large, whatever the noise, of data that are all MEAN."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), RectifiedFlow(), "x0", shape=(1,))

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None, guidance: Any = 1.0) -> Prediction:
        assert isinstance(t, Tensor)
        return Prediction(self.process, "x0", torch.full_like(x_t, MEAN + 0.01), x_t, t)


def test_a_small_error_of_data_stays_small_where_a_step_leads_to_no_noise() -> None:
    """The slope at the step's end is that error over next to nothing: a correction by it would be off by hundreds."""
    x0, eps = torch.full((3, 1), MEAN, **DOUBLE), torch.randn(3, 1, **DOUBLE)
    t, r = torch.full((3,), 0.4, **DOUBLE), torch.tensor([0.0, 0.01, 0.3], **DOUBLE)
    flow = RectifiedFlow()
    found = reached(flow, Off(), x0, eps, flow.add_noise(x0, eps, t), t, r, {})
    assert (found - flow.add_noise(x0, eps, r)).abs().max() < 0.011


def test_the_distance_is_written_by_hand() -> None:
    said, target = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.zeros(1, 2)
    torch.testing.assert_close(huber(said, target), torch.tensor([5.0]))
    torch.testing.assert_close(huber(said, target, 12.0), torch.tensor([1.0]))
    huber(target + 0 * said, target).sum().backward()
    assert torch.isfinite(said.grad).all()  # type: ignore[arg-type]
