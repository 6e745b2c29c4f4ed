"""SIM: the loss of each distance by hand."""

from __future__ import annotations

import pytest
import torch
from points import FLOW, B, batch, build, play_step

from gaussians import draws, play
from stillroom.losses.score import score_difference_loss


def test_sim_s_exponent_is_that_of_the_power_family() -> None:
    mild, steep = (play_step(build("sim", distance="power", beta=beta))["generator/sim"] for beta in (1.5, 2.0))
    l2 = play_step(build("sim", distance="l2"))["generator/sim"]
    torch.testing.assert_close(steep, 2 * l2)  # the gradient of |d|^2 is 2 d
    assert float(mild) != pytest.approx(float(steep))


@pytest.mark.parametrize("distance", ["pseudo_huber", "l2", "power", "sid"])
def test_the_loss_is_minus_the_derivative_of_the_distance_times_the_fake_score_s_error(distance: str) -> None:
    """``-w <psi(D_f - D_r), D_f - x0>``, the graph through x_t kept in every factor."""
    method = build("sim", distance=distance, c=0.3)
    o, data, twin = method.options, batch(), draws(B)
    loss = play(method, "generator", data)["sim"]
    ours = [p.grad.clone() for p in method.student.parameters()]
    z, t0 = twin.normal(B, 2), torch.tensor(o.t_init)
    x0 = method.student(t0 * z, t0, data["cond"]).x0
    t, eps = o.generator_times.sample(twin, FLOW), twin.normal(B, 2)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * eps
    real, fake = method.teacher(x_t, t, data["cond"]).x0, method.fake(x_t, t, data["cond"]).x0
    d, length = fake - real, (fake - real).square().sum(1, keepdim=True).sqrt()
    psi = {
        "pseudo_huber": d / (length**2 + 0.3**2).sqrt(),
        "l2": d,
        "power": o.beta * length ** (o.beta - 2) * d,
        "sid": d,
    }[distance]
    w = 1 / (x0 - real).abs().mean(1).detach() if distance == "sid" else torch.ones(B)
    by_hand = -(w * (psi * (fake - x0)).sum(1)).mean()
    torch.testing.assert_close(loss, by_hand)
    for a, b in zip(ours, torch.autograd.grad(by_hand, list(method.student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("distance", "right"), [("pseudo_huber", 35.4), ("power", 23.8), ("l2", 5.01)])
def test_the_distance_of_scores_weighs_as_it_does_in_scores(distance: str, right: float) -> None:
    """alpha = 1, sigma = 0.1, so k = 100: y = k d = 0.1 and k e = 50.1; c = 0.1 in units of scores, beta = 1.5. The
    squared distance is halved."""
    in_x0, weight = build("sim", distance=distance, c=0.1, score_space=True).distance(torch.tensor([100.0]))
    x0, fake, real = torch.zeros(1, 1), torch.full((1, 1), 0.501), torch.full((1, 1), 0.5)
    loss = score_difference_loss(x0, fake, real, sim=1.0, distance=in_x0, weight=weight)
    assert float(-loss) == pytest.approx(right, rel=3e-3)


@pytest.mark.parametrize("distance", ["pseudo_huber", "power", "l2"])
def test_the_loss_in_scores_is_that_of_the_scores_themselves(distance: str) -> None:
    """``-<D'(y), s_f(x_t) - grad log q(x_t | x0)>`` with y = s_f - s_r and D' by autograd."""
    method = build("sim", distance=distance, c=0.3, score_space=True)
    o, data, twin = method.options, batch(), draws(B)
    loss = play(method, "generator", data)["sim"]
    z, t0 = twin.normal(B, 2), torch.tensor(o.t_init)
    x0 = method.student(t0 * z, t0, data["cond"]).x0.detach()
    t, eps = o.generator_times.sample(twin, FLOW), twin.normal(B, 2)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * eps
    fake, real = method.fake(x_t, t, data["cond"]).score, method.teacher(x_t, t, data["cond"]).score
    y = (fake - real).detach().requires_grad_()
    length = y.square().sum(1)
    values = {"pseudo_huber": (length + 0.09).sqrt(), "power": length**0.75, "l2": length / 2}
    (slope,) = torch.autograd.grad(values[distance].sum(), y)
    by_hand = -(slope * (fake + eps / t[:, None])).sum(1).mean()
    torch.testing.assert_close(loss.detach(), by_hand.detach(), rtol=1e-3, atol=1e-3)


def test_pseudo_huber_s_constant_grows_with_the_dimension() -> None:
    """0.01 sqrt(2) here, in x0 units."""
    usual, given = (play_step(build("sim", c=c))["generator/sim"] for c in (0.0, 0.01 * 2**0.5))
    torch.testing.assert_close(usual, given)
