"""The score-difference loss against derivatives of the divergences it stands for, in one dimension, by quadrature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gaussians import Law, central, draws, normal_pair
from stillroom.diffusion.denoiser import Prediction
from stillroom.diffusion.process import EDM, VP, Process, RectifiedFlow, TrigFlow
from stillroom.losses import adversarial
from stillroom.losses.score import (
    SQUARED,
    denoising_loss,
    dot,
    fake_score_loss,
    mean_abs_normaliser,
    power,
    pseudo_huber,
    score_difference_loss,
    snr_weight,
)

TEACHER = Law((-1.0, 1.5), (0.5, 0.7), (0.4, 0.6))
A, B = 0.7, 1.2  # the student N(A, B^2): x0 = A + B z
RATES = [(1.0, 0.5), (1.0, 1.5), (0.7, 0.3), (0.3, 0.7)]  # variance exploding and a flow


def grid(a: float, s: float) -> tuple[Tensor, float]:
    x = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    return x, float(x[1] - x[0])


def fisher(p: Law, law: Law, distance: Any, a: float, s: float) -> Tensor:
    """``E_{x_t ~ law} distance(s_p - s_q)`` on a fine grid."""
    x, step = grid(a, s)
    y = p.score(x, a, s) - TEACHER.score(x, a, s)
    return (law.log_density(x, a, s).exp() * distance(y)).sum() * step


def loss_gradient(a: float, s: float, n: int = 301, detach_inside: bool = False, **parts: Any) -> Tensor:
    """Gradient in (A, B) of the library's loss with exact predictions: expectation over (z, eps) as a batch."""
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (A, B))
    z, eps, weights = normal_pair(n)
    x0 = (mean + std * z)[:, None]
    x_t = a * x0 + s * eps[:, None]
    student = Law((A,), (B,))  # its parameters are frozen: theta acts through x0 and x_t alone
    inside = x_t.detach() if detach_inside else x_t
    fake, real = student.x0(x_t, a, s), TEACHER.x0(inside, a, s)
    if detach_inside:  # u is cut, the score of the student beside it is not
        d = (student.x0(inside, a, s) - real).detach()
        return _grad(-(weights * parts["weight"] * dot(parts["distance"].psi(d), fake - x0)).sum(), mean, std)
    loss = score_difference_loss(
        x0, fake, real, **parts | {"weight": weights * parts.get("weight", 1.0) * len(weights)}
    )
    return _grad(loss, mean, std)


def _grad(loss: Tensor, *parameters: Tensor) -> Tensor:
    return torch.stack(torch.autograd.grad(loss, parameters))


def kl(mean: float, std: float, a: float, s: float) -> Tensor:
    x, step = grid(a, s)
    p = Law((mean,), (std,)).log_density(x, a, s)
    return (p.exp() * (p - TEACHER.log_density(x, a, s))).sum() * step


@pytest.mark.parametrize(("a", "s"), RATES)
def test_the_plain_direction_is_the_gradient_of_the_kl_of_student_to_teacher(a: float, s: float) -> None:
    """d KL(p_t||q_t) / d theta = E <s_p - s_q, d x_t>, and s_p - s_q = (a / s^2) d."""
    exact = central(lambda m, b: kl(m, b, a, s), (A, B))
    ours = loss_gradient(a, s, di=1.0, weight=a * a / s**2)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)


def test_swiftbrush_s_weight_is_an_integral_kl() -> None:
    """omega = alpha sigma in x0 units is the weight w = sigma^3 / alpha of an integral over time of KL(p_t||q_t)."""
    process, times = VP("linear", 1000, 1e-4, 0.02), torch.tensor([100.0, 300.0, 600.0], dtype=torch.float64)
    rates = [(float(process.alpha(t)), float(process.sigma(t))) for t in times]
    exact = central(lambda m, b: sum(kl(m, b, a, s) * s**3 / a for a, s in rates), (A, B))
    ours = torch.stack([loss_gradient(a, s, di=1.0, weight=a * s) for a, s in rates]).sum(0)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("a", "s"), RATES)
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber", "power"])
def test_score_implicit_matching_is_the_gradient_through_the_student_s_score_alone(
    a: float, s: float, distance: str
) -> None:
    """The right side varies the student inside the score and keeps the law that is sampled."""
    k, c = a / s**2, 1.0  # c in score units; the loss takes it in x0 units
    value, in_x0, weight = {
        "l2": (lambda y: y**2, SQUARED, 2 * k**2),
        "pseudo_huber": (lambda y: (y**2 + c * c).sqrt() - c, pseudo_huber(c / k), k),
        "power": (lambda y: y**4, power(4.0), k**4),
    }[distance]
    law = Law((A,), (B,))
    exact = central(lambda m, b: fisher(Law((m,), (b,)), law, value, a, s), (A, B))
    ours = loss_gradient(a, s, sim=1.0, distance=in_x0, weight=weight)
    assert float((ours - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_cutting_the_graph_inside_the_distance_gives_another_gradient(distance: str) -> None:
    """Guards the test above: it must be able to fail, which needs a teacher that is not Gaussian."""
    a, s, c = 1.0, 0.5, 1.0
    k = a / s**2
    in_x0, weight = (SQUARED, 2 * k**2) if distance == "l2" else (pseudo_huber(c / k), k)
    right = loss_gradient(a, s, sim=1.0, distance=in_x0, weight=weight)
    wrong = loss_gradient(a, s, detach_inside=True, distance=in_x0, weight=weight)
    assert float((wrong - right).norm() / right.norm()) > 0.05


@pytest.mark.parametrize(("a", "s"), RATES)
def test_sid_at_one_half_is_the_gradient_of_the_whole_fisher_divergence(a: float, s: float) -> None:
    def divergence(m: float, b: float) -> Tensor:
        p = Law((m,), (b,))
        return fisher(p, p, lambda y: y**2, a, s)

    exact, weight = central(divergence, (A, B)), 2 * (a / s**2) ** 2
    half = loss_gradient(a, s, sim=1.0, fgm=0.5, weight=weight)
    assert float((half - exact).norm() / exact.norm()) < 1e-4
    alone = loss_gradient(a, s, sim=1.0, weight=weight)
    assert float((alone - exact).norm() / exact.norm()) > 0.05


@pytest.mark.parametrize("distance", ["pseudo_huber", "power"])
def test_one_half_of_a_distance_s_own_value_makes_its_gradient_exact(distance: str) -> None:
    """The student moves inside the score and in the law that is sampled."""
    a, s, c = 1.0, 0.5, 1.0
    k = a / s**2
    value, in_x0, weight = {
        "pseudo_huber": (lambda y: (y**2 + c * c).sqrt() - c, pseudo_huber(c / k), k),
        "power": (lambda y: y.abs() ** 3, power(3.0), k**3),
    }[distance]

    def divergence(m: float, b: float) -> Tensor:
        p = Law((m,), (b,))
        return fisher(p, p, value, a, s)

    exact = central(divergence, (A, B))
    ours = loss_gradient(a, s, sim=1.0, fgm=0.5, distance=in_x0, weight=weight)
    assert float((ours - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_weights_reproduce_sid_s_product_form(alpha: float) -> None:
    """(Y_r - Y_f) . [(Y_r - x0) - alpha (Y_r - Y_f)], summed over elements, averaged over the batch."""
    x0, fake, real = (torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    weight = mean_abs_normaliser(x0, real)
    product = ((real - fake) * ((real - x0) - alpha * (real - fake))).flatten(1).sum(1)
    by_hand = (product / (x0 - real).abs().flatten(1).mean(1)).mean()
    ours = score_difference_loss(x0, fake, real, sim=1.0, fgm=1 - alpha, weight=weight)
    torch.testing.assert_close(ours, by_hand)


def test_dmd_s_normaliser_and_gradient_in_numbers() -> None:
    """Two samples of four numbers: g = (D_f - D_r) / mean|x0 - D_r|, dL/dx0 = g / numel / batch."""
    x0 = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0]], requires_grad=True)
    real = torch.tensor([[0.0, 0.0, 1.0, 3.0], [0.5, 0.5, 0.5, 0.5]])  # mean |x0 - real|: 1.5 and 0.5
    fake = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.5, 1.5, 0.5, 0.5]])
    normaliser = mean_abs_normaliser(x0, real)
    torch.testing.assert_close(normaliser, torch.tensor([1 / 1.5, 2.0]))
    assert not normaliser.requires_grad
    score_difference_loss(x0, fake, real, di=1.0, weight=normaliser / 4).backward()
    g = torch.tensor([[2.0, 0.0, 0.0, -2.0], [0.0, 2.0, 0.0, 0.0]])
    torch.testing.assert_close(x0.grad, g / 8)


def test_the_normaliser_has_a_floor() -> None:
    x = torch.ones(1, 4)
    torch.testing.assert_close(mean_abs_normaliser(x, x), torch.tensor([1e5]))


def test_psi_of_a_vector_works_on_the_norm_of_a_whole_sample() -> None:
    d = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(pseudo_huber(12.0).psi(d), torch.tensor([[3 / 13, 4 / 13], [0.0, 0.0]]))
    torch.testing.assert_close(power(3.0).psi(d), torch.tensor([[45.0, 60.0], [0.0, 0.0]]))
    # both are gradients of their distance
    by_hand = {pseudo_huber(0.7): lambda y: (y @ y + 0.49).sqrt() - 0.7, power(1.5): lambda y: (y @ y) ** 0.75}
    for distance, value in (by_hand | {SQUARED: lambda y: y @ y / 2}).items():
        y = torch.tensor([0.3, -1.1], requires_grad=True)
        torch.testing.assert_close(distance.value(y[None])[0], value(y))
        torch.testing.assert_close(distance.psi(y.detach()[None])[0], torch.autograd.grad(value(y), y)[0])
    assert bool(torch.isfinite(power(1.5).psi(torch.zeros(1, 3))).all())


def test_parts_with_weight_zero_need_no_graph_and_tensor_weights_are_per_sample() -> None:
    x0, fake, real = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.randn(2, 3)
    assert float(score_difference_loss(x0, fake, real)) == 0
    per_sample = score_difference_loss(x0, fake, real, di=torch.tensor([1.0, 0.0]), fgm=torch.tensor([0.0, 2.0]))
    expected = ((fake[0] - real[0]) @ x0[0] + 2 * (fake[1] - real[1]).square().sum()) / 2
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow(), VP()], ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["v", "eps", "x0", "snr"])
def test_the_fake_score_loss_is_least_at_the_posterior_mean(process: Process, kind: str) -> None:
    """Over a scale of the prediction, the best is that of the exact denoiser: the loss regresses the right target."""
    n, std = 40_000, 0.8
    x0, eps, t = std * torch.randn(n, 1).double(), torch.randn(n, 1).double(), 0.55 * process.t_max
    time = torch.full((n,), t, dtype=torch.float64)
    a, s = process.alpha(time[:1]), process.sigma(time[:1])
    x_t = process.add_noise(x0, eps, time)
    best = a * std**2 / (a**2 * std**2 + s**2)
    gain = best.clone().requires_grad_()
    loss = fake_score_loss(Prediction(process, "x0", gain * x_t, x_t, time), x0, eps, kind)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(loss, gain, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, gain)
    assert abs(float((slope / curvature).detach())) < 0.02 * float(best)  # Newton's step from the exact gain


def test_denoising_losses_in_numbers() -> None:
    prediction, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(denoising_loss(prediction, target), torch.tensor((5.0 + 2.0) / 2))
    torch.testing.assert_close(denoising_loss(prediction, target, torch.tensor([2.0, 1.0])), torch.tensor(6.0))
    p = Prediction(RectifiedFlow(), "v", prediction, target, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(fake_score_loss(p, target, prediction + target, "v"), torch.tensor(0.0))


def test_the_snr_weight_is_edm_s_and_depends_on_the_ratio_alone() -> None:
    sigma = torch.tensor([0.05, 0.5, 5.0])
    expected = (sigma**2 + 0.25) / (0.25 * sigma**2)
    torch.testing.assert_close(snr_weight(EDM(), sigma), expected)
    flow = RectifiedFlow()
    torch.testing.assert_close(snr_weight(flow, flow.time_of(torch.ones(3), sigma)), expected, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(snr_weight(flow, torch.tensor([0.0, 1.0]))).all())


def test_gan_losses_are_binary_cross_entropy_with_real_one() -> None:
    from torch.nn.functional import binary_cross_entropy_with_logits as bce

    real, fake = torch.randn(4, 6), torch.randn(4, 6)
    expected = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    torch.testing.assert_close(adversarial.discriminator_loss(real, fake), expected)
    per_sample = bce(fake, torch.ones_like(fake), reduction="none").mean(1)
    torch.testing.assert_close(adversarial.generator_loss(fake), per_sample)
    torch.testing.assert_close(adversarial.generator_loss(fake[:, 0]), bce(fake[:, 0], torch.ones(4), reduction="none"))


def test_pseudo_huber_bears_larger_learning_rates_than_the_plain_square() -> None:
    """Student a + b z in 8-D from (6, 0.3), target N(0, 1), exact scores, plain SGD: all rates in one batch."""
    rates = torch.tensor([1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])

    def largest_stable(distance: str) -> float:
        a = torch.full((len(rates), 1, 8), 6.0, requires_grad=True)
        b = torch.full((len(rates), 1, 8), 0.3, requires_grad=True)
        draw = draws(64)
        tail: list[tuple[Tensor, Tensor]] = []
        for step in range(1500):
            z, eps = draw.normal(64, 8), draw.normal(64, 8)
            sigma = 0.02 * 500 ** draw.uniform(64)[:, None]
            x0 = a + b * z
            x_t = x0 + sigma * eps
            real = x_t / (1 + sigma**2)
            mean, variance = a.detach(), b.detach() ** 2
            fake = (variance * x_t + sigma**2 * mean) / (variance + sigma**2)
            flat = [v.reshape(-1, 8) for v in (x0, fake, real)]
            if distance == "l2":  # the raw theorem, in units of scores
                weight, in_x0 = (2 / sigma**4).squeeze(1).repeat(len(rates)), SQUARED
            else:
                weight, in_x0 = torch.ones(64 * len(rates)), pseudo_huber(0.03)
            loss = len(rates) * score_difference_loss(*flat, sim=1.0, distance=in_x0, weight=weight)
            moved = torch.autograd.grad(loss, (a, b))
            with torch.no_grad():
                for p, g in zip((a, b), moved, strict=True):
                    p -= rates[:, None, None] * g
            if step >= 1200:
                tail.append((a.detach().clone(), b.detach().clone()))
        mean, std = (torch.stack(v).mean(0).squeeze(1) for v in zip(*tail, strict=True))
        right = (mean.abs().amax(1) < 0.15) & (std.abs() - 1).abs().lt(0.1).all(1)
        return float(rates[right].max()) if bool(right.any()) else 0.0

    l2, huber = largest_stable("l2"), largest_stable("pseudo_huber")
    assert l2 > 0
    assert huber >= 3 * l2
