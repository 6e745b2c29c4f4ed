"""Consistency in continuous time against the closed form of a Gaussian, and against finite differences."""

from __future__ import annotations

import torch
from torch import Tensor

from stillroom.losses.flow_map import normalised, scm_tangent, towards

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
