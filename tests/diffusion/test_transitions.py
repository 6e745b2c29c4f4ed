"""The kernel from a noise level to a higher one, and its unbiased targets, against Gaussians in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gaussians import PROCESSES, Law, central, normal_pair
from stillroom.diffusion.process import Process, RectifiedFlow, match_snr
from stillroom.diffusion.transitions import Transition

MEAN, STD = 0.7, 0.4
LEVELS = [(0.5, 0.75), (0.5, 1.0), (0.25, 0.3), (0.0, 0.6)]


def at(process: Process, u: float) -> Tensor:
    """The time of the signal-to-noise ratio that a rectified flow has at u."""
    flow, one = RectifiedFlow(), torch.tensor(u, dtype=torch.float64)
    return match_snr(one, of=flow, to=process)[0]


def slopes(x_t: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Intercept and slope of the least-squares line of targets on x_t: for jointly Gaussian pairs, E[target | x_t]."""
    design = torch.stack([torch.ones_like(x_t), x_t], 1) * weights.sqrt()[:, None]
    return torch.linalg.lstsq(design, (target * weights.sqrt())[:, None]).solution[:, 0]


@pytest.mark.parametrize("name", ["flow", "trig", "vp", "edm"])
@pytest.mark.parametrize(("low", "high"), LEVELS)
def test_what_is_noised_twice_is_as_what_is_noised_once(name: str, low: float, high: float) -> None:
    process = PROCESSES[name]
    s, t = at(process, low), at(process, high)
    way = Transition(process, s, t)
    variance = way.a**2 * ((process.alpha(s) * STD) ** 2 + process.sigma(s) ** 2) + way.b**2
    torch.testing.assert_close(variance, (process.alpha(t) * STD) ** 2 + process.sigma(t) ** 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(way.a * process.alpha(s), process.alpha(t))


@pytest.mark.parametrize("name", ["flow", "trig", "vp", "edm"])
@pytest.mark.parametrize(("low", "high"), LEVELS)
def test_the_target_s_mean_is_the_exact_velocity_of_a_gaussian(name: str, low: float, high: float) -> None:
    """x_0 ~ N(m, c^2), so x_s is Gaussian and E[velocity | x_t] is linear in x_t; quadrature over x_s and eps."""
    process = PROCESSES[name]
    s, t = at(process, low), at(process, high)
    if name == "edm" and high == 1.0:
        t = torch.tensor(process.t_max, dtype=torch.float64)
    way, (z, eps, weights) = Transition(process, s, t), normal_pair(81)
    a, g = process.alpha(s), process.sigma(s)
    x_s = a * MEAN + ((a * STD) ** 2 + g**2).sqrt() * z
    found = slopes(way.noised(x_s, eps), way.velocity(x_s, eps), weights)
    alpha, sigma = process.alpha(t), process.sigma(t)
    p, q = process.velocity_weights(t)
    total = (alpha * STD) ** 2 + sigma**2
    gain = (p * alpha * STD**2 + q * sigma) / total
    exact = torch.stack([p * MEAN - gain * alpha * MEAN, gain])
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_the_target_in_the_paper_s_words() -> None:
    """Of a rectified flow: [(t + (1 - t) s^2 / (1 - s)^2) / b] eps - x_s / (1 - s)."""
    generator = torch.Generator().manual_seed(0)
    x_s, eps = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    s, t = torch.tensor(0.4), torch.tensor([0.45, 0.5, 0.6, 0.8, 0.9, 1.0])
    b = (t**2 - ((1 - t) / (1 - s)) ** 2 * s**2).sqrt()
    expected = ((t + (1 - t) * s**2 / (1 - s) ** 2) / b)[:, None] * eps - x_s / (1 - s)
    torch.testing.assert_close(Transition(RectifiedFlow(), s, t).velocity(x_s, eps), expected)


@pytest.mark.parametrize("start", [None, torch.tensor(0.0)])
def test_from_clean_data_it_is_flow_matching(start: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(5, 2, generator=generator), torch.randn(5, 2, generator=generator)
    way = Transition(RectifiedFlow(), start, torch.linspace(0.2, 1.0, 5))
    torch.testing.assert_close(way.velocity(x, eps), eps - x)
    torch.testing.assert_close(way.biased_velocity(x, eps), eps - x)
    torch.testing.assert_close(way.noised(x, eps), RectifiedFlow().add_noise(x, eps, way.t))


def test_x_s_taken_for_clean_data_is_another_target() -> None:
    """As the paper's toy shows: half the velocity of the signal is missing at s = 0.5."""
    way, (z, eps, weights) = Transition(RectifiedFlow(), torch.tensor(0.5), torch.tensor(0.75)), normal_pair(81)
    x_s = 0.5 * MEAN + ((0.5 * STD) ** 2 + 0.25) ** 0.5 * z
    right, wrong = (slopes(way.noised(x_s, eps), y(x_s, eps), weights) for y in (way.velocity, way.biased_velocity))
    assert float((right - wrong).abs().max()) > 0.3


def test_the_weight_is_the_paper_s_clamp() -> None:
    """clamp(1 / b^2, 0, 10) |b v - b target|^2 = min(1, 10 b^2) |v - target|^2."""
    way = Transition(RectifiedFlow(), torch.tensor(0.5), torch.tensor([0.51, 0.6, 1.0]))
    torch.testing.assert_close(way.weight(10.0), (1 / way.b**2).clamp(0, 10) * way.b**2)
    assert way.weight(0.0).tolist() == [1.0, 1.0, 1.0]


def test_the_gradient_of_the_divergence_with_respect_to_x_s() -> None:
    """KL(noised q_s || noised p_s) at t for one-dimensional Gaussians, by finite differences in the mean of q_s."""
    process, s, t = RectifiedFlow(), torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    way = Transition(process, s, t)
    a, b, spread = float(way.a), float(way.b), 0.5
    real = Law([0.2], [spread])

    def kl(mean: float) -> float:
        var = a**2 * spread**2 + b**2
        return 0.5 * (a * (mean - 0.2)) ** 2 / var

    mean = 0.9
    z, eps, weights = normal_pair(81)
    x_s = mean + spread * z
    x_t = way.noised(x_s, eps)
    fake = Law([mean], [spread])
    alpha, sigma = process.alpha(t), process.sigma(t)
    scores = [law.score(x_t, way.a, way.b) for law in (fake, real)]
    x0 = [(x_t + sigma**2 * score) / alpha for score in scores]
    gradient = (weights * way.score_weight() * (x0[0] - x0[1])).sum()
    torch.testing.assert_close(gradient[None], central(kl, (mean,)), rtol=1e-5, atol=1e-7)


def test_in_velocities_it_is_the_paper_s_weight() -> None:
    """w (v_real - v_fake), w = alpha_t a / (alpha_t sigma_t + sigma_t^2), and x0 = x_t - sigma_t v."""
    way = Transition(RectifiedFlow(), torch.tensor(0.3), torch.tensor([0.4, 0.6, 0.9]))
    alpha, sigma = 1 - way.t, way.t
    torch.testing.assert_close(way.score_weight() * sigma, alpha * way.a / (alpha * sigma + sigma**2))
