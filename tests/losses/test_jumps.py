"""Losses of jumps, on a Gaussian whose paths are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gaussian_flow import mean_velocity, velocity
from stillroom.losses.jumps import barron, integral, jump_residual


def test_the_mean_velocity_of_the_exact_path_has_a_residual_that_falls_with_delta() -> None:
    x, t = torch.randn(200, 3, dtype=torch.float64), torch.linspace(0.1, 1.0, 200, dtype=torch.float64)
    r = t * torch.linspace(0.0, 0.8, 200, dtype=torch.float64).flip(0)
    sizes = []
    for delta in (0.01, 0.005):
        off = jump_residual(mean_velocity, mean_velocity(x, t, r), x, t, r, velocity(x, t), delta, 2)
        sizes.append(float(off.abs().mean()))
    assert sizes[0] < 0.02
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.05)
    wrong = jump_residual(mean_velocity, 1 + mean_velocity(x, t, r), x, t, r, velocity(x, t), 0.01, 2)
    torch.testing.assert_close(wrong.mean(), ((t - r) / 0.01).mean(), rtol=0.02, atol=0)


def test_a_jump_of_no_length_asks_for_the_velocity_itself() -> None:
    x, t = torch.randn(5, 2), torch.full((5,), 0.4)
    off = jump_residual(lambda *_: torch.full((5, 2), 9.0), x, x, t, t, torch.ones(5, 2), 0.01, 2)
    torch.testing.assert_close(off, x - 1)


def test_worked_by_hand() -> None:
    """t = 1, r = 0, F' = 2 everywhere, delta = 0.1: I = 0.9 * 2, and D = (F - 1.8) / 0.1 - v."""
    x, one = torch.zeros(1, 1), torch.ones(1)
    asked: list[tuple[float, float, float]] = []

    def two(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        asked.append((float(x), float(t), float(r)))
        return torch.full_like(x, 2.0)

    off = jump_residual(two, torch.full((1, 1), 3.0), x, one, 0 * one, torch.full((1, 1), 4.0), 0.1, 3)
    assert float(off) == pytest.approx((3 - 1.8) / 0.1 - 4, rel=1e-5)
    expected = [(-0.4, 0.9, 0.6), (-1.0, 0.6, 0.3), (-1.6, 0.3, 0.0)]
    for found, wanted in zip(asked, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)


def test_the_integral_of_exact_jumps_is_the_whole_way() -> None:
    x, t, r = torch.randn(20, 2, dtype=torch.float64), torch.full((20,), 0.9), torch.full((20,), 0.2)
    for steps in (1, 4):
        way = integral(mean_velocity, x, t.double(), r.double(), steps)
        torch.testing.assert_close(way, 0.7 * mean_velocity(x, t.double(), r.double()), rtol=1e-6, atol=1e-6)


def test_barron_s_gradient_is_the_error_over_about_its_root_mean_square() -> None:
    said = torch.tensor([[0.3, -0.4], [1e-5, 0.0]], dtype=torch.float64, requires_grad=True)
    target, c = torch.zeros(2, 2, dtype=torch.float64), 1e-3
    value = barron(said, target, c)
    assert value[0].item() == pytest.approx(0.125**0.5, rel=1e-4)
    value.sum().backward()
    m = said.detach().square().mean(1, keepdim=True)
    torch.testing.assert_close(said.grad, said.detach() / c / (m / c**2 + 1).sqrt())
