"""Divergences: their weight table, the exact gradient of the expansion, and where each leads a Gaussian student."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gaussians import Law, central, normal_pair
from stillroom.errors import UserError
from stillroom.losses.divergence import DIVERGENCES, density_ratio, get_divergence
from stillroom.losses.score import score_difference_loss, square

TEACHER = Law((-1.0, 1.2), (0.6, 0.5), (0.45, 0.55))
A, B = 0.3, 1.3
# f of D_f(q||p) = E_p f(r), from the definitions
F: dict[str, Any] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: 0.4 * r * r.log() - 0.6 * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "chi2": lambda r: (r - 1) ** 2,
    "hellinger": lambda r: 2 * (1 - r.sqrt()),
}
NAMES = list(F)


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_follow_from_f(name: str) -> None:
    """C = r^2 f'' by autograd, and its own derivatives too."""
    r = torch.linspace(0.1, 5, 40, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r, create_graph=True)
    c = r**2 * curvature
    (c1,) = torch.autograd.grad(c.sum(), r, create_graph=True)
    (c2,) = torch.autograd.grad(c1.sum(), r, allow_unused=True)
    divergence = DIVERGENCES[name]
    torch.testing.assert_close(divergence.c(r.detach()), c.detach())
    torch.testing.assert_close(divergence.c1(r.detach()), c1.detach(), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(divergence.c2(r.detach()), c2.detach(), atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(divergence.fisher(r.detach()), ((c - r * c1) / 2).detach(), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(divergence.direct(r.detach()), (r**2 * c2 / 2).detach(), atol=1e-8, rtol=1e-7)


def test_every_divergence_is_tested() -> None:
    assert set(DIVERGENCES) == set(F)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.8), (-1.5, 0.5)])
def test_f_distill_s_weight_gives_the_divergence_s_own_gradient(name: str, mean: float, std: float) -> None:
    """``d/dm E_p f(q / p) = -E_p h(r) (s_q - s_p) dx_t/dm`` with h = C, here at one noise level: by central differences
    of the divergence on a grid (arXiv 2502.15681, theorem 1)."""
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)

    def divergence(m: float) -> Tensor:
        p = Law((m,), (std,))
        density, other = p.log_density(x, A, B), TEACHER.log_density(x, A, B)
        return torch.trapezoid(density.exp() * F[name]((other - density).exp()), x)

    p = Law((mean,), (std,))
    gap = TEACHER.score(x, A, B) - p.score(x, A, B)
    r = log_ratio(p, x, A, B).exp()
    said = -torch.trapezoid(p.log_density(x, A, B).exp() * get_divergence(name).c(r) * gap * A, x)
    torch.testing.assert_close(said, (divergence(mean + 1e-4) - divergence(mean - 1e-4)) / 2e-4, rtol=1e-4, atol=1e-8)


def log_ratio(student: Law, x: Tensor, a: float, s: float) -> Tensor:
    return TEACHER.log_density(x, a, s) - student.log_density(x, a, s)


def inner(name: str, mean: float, std: float, a: float, s: float) -> Tensor:
    """``J_t = E_{p_t} C(r) |s_p - s_q|^2`` on a grid."""
    x = torch.linspace(-15, 15, 6_001, dtype=torch.float64)
    p = Law((mean,), (std,))
    gap = p.score(x, a, s) - TEACHER.score(x, a, s)
    value = DIVERGENCES[name].c(log_ratio(p, x, a, s).exp()) * gap**2
    return (p.log_density(x, a, s).exp() * value).sum() * (x[1] - x[0])


def parts_gradient(name: str, a: float, s: float, keep_ratio_graph: bool = True) -> Tensor:
    """Gradient in (A, B) of the library's three parts, with exact scores and ratio."""
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (A, B))
    z, eps, weights = normal_pair(301)
    x0 = (mean + std * z)[:, None]
    x_t = a * x0 + s * eps[:, None]
    student, k, divergence = Law((A,), (B,)), a / s**2, DIVERGENCES[name]
    fake, real = student.x0(x_t, a, s), TEACHER.x0(x_t, a, s)
    r = log_ratio(student, x_t, a, s).exp().squeeze(1)
    fixed = r.detach()
    loss = score_difference_loss(
        x0,
        fake,
        real,
        sim=divergence.c(r if keep_ratio_graph else fixed),
        fgm=divergence.fisher(fixed),
        di=a * k * divergence.direct(fixed) * square(fake - real).detach(),
        weight=weights * len(weights) * 2 * k**2,
    )
    return torch.stack(torch.autograd.grad(loss, (mean, std)))


@pytest.mark.parametrize(("a", "s"), [(1.0, 0.8), (0.6, 0.4)], ids=["edm", "flow"])
@pytest.mark.parametrize("name", NAMES)
def test_the_three_parts_are_the_gradient_of_the_expanded_divergence(name: str, a: float, s: float) -> None:
    exact = central(lambda m, b: inner(name, m, b, a, s), (A, B))
    ours = parts_gradient(name, a, s)
    assert float((ours - exact).norm() / exact.norm()) < 1e-3


def test_a_detached_ratio_makes_forward_kl_s_gradient_wrong_and_leaves_reverse_kl_alone() -> None:
    right, cut = parts_gradient("forward_kl", 1.0, 0.8), parts_gradient("forward_kl", 1.0, 0.8, keep_ratio_graph=False)
    assert abs(float(cut[1] - right[1])) > 0.2 * abs(float(right[1]))
    torch.testing.assert_close(
        parts_gradient("reverse_kl", 1.0, 0.8), parts_gradient("reverse_kl", 1.0, 0.8, keep_ratio_graph=False)
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_expansion_over_noise_levels_sums_to_the_divergence(name: str) -> None:
    """D_f(q_0||p_0) = integral of sigma J_sigma d sigma: the theorem itself, with both laws equal at infinite noise."""
    sigma = torch.logspace(-2.5, 2.5, 121, dtype=torch.float64)
    expanded = torch.trapezoid(torch.stack([s**2 * inner(name, A, B, 1.0, float(s)) for s in sigma]), sigma.log())
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    p = Law((A,), (B,)).log_density(x).exp()
    direct = (p * F[name](log_ratio(Law((A,), (B,)), x, 1.0, 0.0).exp())).sum() * (x[1] - x[0])
    torch.testing.assert_close(expanded, direct, rtol=0.02, atol=1e-4)


def lead(name: str, fgm: bool = True) -> tuple[float, float]:
    """400 Adam steps of N(a, b^2) from (1, 0.6) towards two far modes with exact scores, all noise levels each step."""
    target = Law((-2.0, 2.0), (0.5, 0.5), (0.5, 0.5))
    sigma = torch.logspace(math.log10(0.05), math.log10(20), 40, dtype=torch.float64)
    z, eps, weights = normal_pair(27, 4.5)
    z, eps = z[:, None], eps[:, None]  # [pairs, levels] as one batch
    s = sigma.expand(len(z), -1)
    parameters = mean, log_std = [
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, math.log(0.6))
    ]
    optimizer, divergence = torch.optim.Adam(parameters, lr=0.03), DIVERGENCES[name]
    average = torch.zeros(2, dtype=torch.float64)
    batch = (weights[:, None] / sigma**2).reshape(-1) * weights.numel()  # 1/2 g^2 k^2 at log-uniform sigma
    for step in range(400):
        x0 = (mean + log_std.exp() * z).expand_as(s)
        x_t = x0 + s * eps
        student = Law((mean.detach(),), (log_std.detach().exp(),))
        fake, real = student.x0(x_t, 1.0, s), target.x0(x_t, 1.0, s)
        r = (target.log_density(x_t, 1.0, s) - student.log_density(x_t, 1.0, s)).exp().reshape(-1)
        fixed, gap = r.detach(), (fake - real).detach().reshape(-1) ** 2
        loss = score_difference_loss(
            *(v.reshape(-1, 1) for v in (x0, fake, real)),
            sim=divergence.c(r),
            fgm=divergence.fisher(fixed) if fgm else 0.0,
            di=divergence.direct(fixed) * gap / s.reshape(-1) ** 2,
            weight=batch,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 380:
            average += torch.stack([mean.detach(), log_std.detach().exp()]) / 20
    return float(average[0]), float(average[1])


def test_forward_kl_covers_both_modes() -> None:
    mean, std = lead("forward_kl")
    assert abs(mean) < 0.1
    assert 1.9 <= std <= 2.1  # the target's own: 2.06


def test_reverse_kl_seeks_one_mode() -> None:
    mean, std = lead("reverse_kl")
    assert std < 0.7
    assert abs(mean) > 1.5


def test_density_ratio_is_the_exponential_of_the_mean_logit_within_bounds() -> None:
    logits = torch.tensor([[0.5, 1.5], [-50.0, -50.0], [50.0, 50.0], [0.0, 0.0]])
    torch.testing.assert_close(density_ratio(logits), torch.tensor([math.e, 1e-3, 1e3, 1.0]))
    torch.testing.assert_close(density_ratio(torch.tensor([0.7])), torch.tensor([math.exp(0.7)]))


def test_the_best_discriminator_s_logit_is_the_log_ratio() -> None:
    """Binary cross-entropy over a logistic family: for N(1,1) against N(0,1), the logit of the optimum is x - 1/2."""
    from stillroom.losses.adversarial import discriminator_loss

    nodes = torch.linspace(-8, 9, 4001, dtype=torch.float64)
    real, fake = ((-((nodes - m) ** 2) / 2).exp() for m in (1.0, 0.0))
    generator = torch.Generator().manual_seed(0)
    x = nodes[torch.multinomial(fake, 40_000, True, generator=generator)]
    y = nodes[torch.multinomial(real, 40_000, True, generator=generator)]
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=40)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = discriminator_loss(theta[0] * y + theta[1], theta[0] * x + theta[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert theta.tolist() == pytest.approx([1.0, -0.5], abs=0.05)


def test_an_unknown_divergence_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'forward_kl'"):
        get_divergence("forward-kl")
