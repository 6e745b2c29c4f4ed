"""Directional derivatives against closed forms, by both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.bench.mixture import GaussianMixture, MixtureDenoiser
from stillroom.diffusion.denoiser import Reparametrised
from stillroom.diffusion.derivatives import jvp, replayed
from stillroom.diffusion.process import RectifiedFlow, TrigFlow
from stillroom.engine.precision import return_float32
from tiny_denoisers import dit_teacher, point_teacher

MEAN, STD = torch.tensor([[0.4, -0.7]]), 0.6
GAUSSIAN = MixtureDenoiser(GaussianMixture(MEAN, STD), RectifiedFlow())


def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
    """``E[x0 | x_t]`` of one Gaussian on a rectified flow, ``m + k (x - (1 - t) m)``, ``k = (1 - t) s^2 / v``."""
    a = 1 - t
    k = a * STD**2 / (a**2 * STD**2 + t**2)
    return MEAN + k[:, None] * (x - a[:, None] * MEAN)


def closed_form(x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
    """Its derivative along ``(dx, dt)``, by hand."""
    a, v = 1 - t, (1 - t) ** 2 * STD**2 + t**2
    k = a * STD**2 / v
    dk = (-(STD**2) * v - a * STD**2 * (2 * t - 2 * a * STD**2)) / v**2
    along_t = dk[:, None] * (x - a[:, None] * MEAN) + k[:, None] * MEAN
    return k[:, None] * dx + along_t * dt[:, None]


def point() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(5, 2, generator=generator) for _ in range(2))
    return x, torch.tensor([0.1, 0.3, 0.5, 0.8, 0.95]), dx, torch.tensor([1.0, -0.5, 0.3, 2.0, 0.7])


@pytest.mark.parametrize(("how", "error"), [("exact", 1e-5), ("difference", 1e-3)])
def test_a_gaussian_s_posterior_mean_changes_as_its_closed_form_says(how: Any, error: float) -> None:
    x, t, dx, dt = point()
    value, derivative = jvp(lambda x, t: GAUSSIAN(x, t).x0, (x, t), (dx, dt), how)
    torch.testing.assert_close(value, posterior_mean(x, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(derivative, closed_form(x, t, dx, dt), rtol=error, atol=error)
    inputs = [x.double().requires_grad_(), t.double().requires_grad_()]
    answer = posterior_mean(*inputs)
    by_column = [torch.autograd.grad(answer[:, i].sum(), inputs, retain_graph=True) for i in range(2)]
    backward = torch.stack([(gx * dx).sum(1) + gt * dt for gx, gt in by_column], 1)
    torch.testing.assert_close(derivative.double(), backward, rtol=error, atol=error)


@pytest.mark.parametrize(("make", "step"), [(point_teacher, 3e-3), (dit_teacher, 1e-4)])
def test_networks_with_attention_agree_with_reverse_mode_in_both_ways(make: Any, step: float) -> None:
    """A transformer's attention has no forward-mode rule but in one kernel; the derivative is that of TrigFlow's view,
    through the change of time."""
    teacher = make().eval()
    asked, generator = Reparametrised(teacher, TrigFlow()), torch.Generator().manual_seed(1)
    x, dx = (torch.randn(3, *teacher.shape, generator=generator) for _ in range(2))
    t, dt, cond = torch.tensor([0.2, 0.8, 1.3]), torch.tensor([1.0, -0.4, 0.6]), {"label": torch.tensor([0, 1, 2])}

    def ask(x: Tensor, t: Tensor) -> Tensor:
        return asked(x, t, cond).v

    _, exact = jvp(ask, (x, t), (dx, dt))
    assert not exact.requires_grad
    # reverse over reverse: d/du of <u, J^T...>, the same derivative from another mode
    inputs = (x.requires_grad_(), t.requires_grad_())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, backward = torch.autograd.functional.jvp(ask, inputs, (dx, dt))
    torch.testing.assert_close(exact, backward, rtol=1e-3, atol=1e-4)
    _, near = jvp(ask, (x.detach(), t.detach()), (dx, dt), "difference", step)
    assert float((near - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("how", ["exact", "difference"])
def test_dropout_is_the_same_in_all_calls_of_a_replayed_function(how: Any) -> None:
    torch.manual_seed(0)
    x, dx = torch.randn(2, 64), torch.randn(2, 64)

    def ask(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.5)

    again = replayed(ask, x)
    value, slope = jvp(again, (x,), (dx,), how)
    kept = again(x) != 0
    assert 0 < int(kept.sum()) < 128
    torch.testing.assert_close(value, 2 * x * kept)
    torch.testing.assert_close(slope, 2 * dx * kept, rtol=1e-3, atol=1e-3)
    assert not torch.equal(ask(x) != 0, kept)  # the next ones are drawn anew


def test_the_random_state_of_a_function_that_draws_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_rng_state", lambda state: pytest.fail("the random state was set"))
    x = torch.randn(2, 3)
    again = replayed(torch.sin, x)
    value, slope = jvp(again, (x,), (x,))
    torch.testing.assert_close(slope, x * x.cos())
    torch.randn(1)  # others draw between its calls
    torch.testing.assert_close(again(x), value)


@pytest.mark.parametrize("how", ["exact", "difference"])
def test_under_autocast_derivatives_are_those_of_float32(how: Any) -> None:
    teacher = dit_teacher().eval()
    method = nn.ModuleDict({"student": teacher})
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(3, *teacher.shape, generator=generator) for _ in range(2))
    t, dt, cond = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([1.0, -0.4, 0.6]), {"label": torch.tensor([0, 1, 2])}
    full = jvp(lambda x, t: teacher(x, t, cond).v, (x, t), (dx, dt), how)
    return_float32(method)
    with torch.autocast("cpu", torch.bfloat16):
        found = jvp(lambda x, t: teacher(x, t, cond).v, (x, t), (dx, dt), how)
        rounded = teacher(x, t, cond).v
    assert torch.equal(found[0], full[0])
    assert torch.equal(found[1], full[1])
    assert not torch.equal(rounded, full[0])  # it is on


def test_sixty_euler_steps_as_a_flow_and_as_trigflow_end_alike() -> None:
    """From one noise, each by its own formula: ``x + (s - t) v``, and ``cos(t - s) x - sin(t - s) F``."""
    teacher = point_teacher().eval()
    view, flow, trig = Reparametrised(teacher, TrigFlow()), teacher.process, TrigFlow()
    noise, cond = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), {"label": torch.arange(64) % 4}
    taus = torch.linspace(1, 0, 61)
    x, u = noise, noise
    with torch.no_grad():
        for tau, lower in zip(taus[:-1], taus[1:], strict=True):
            x = x + (lower - tau) * teacher(x, tau, cond).v
            t, s = (trig.time_of(flow.alpha(one), flow.sigma(one)) for one in (tau, lower))
            u = torch.cos(t - s) * u - torch.sin(t - s) * view(u, t, cond).v
    assert float((x - u).square().mean()) < 7e-7
    assert float((x - noise).square().mean()) > 1e-2


def test_trigflow_s_view_of_a_flow_is_the_paper_s_formula_and_exact_at_both_ends() -> None:
    teacher = point_teacher().eval()
    view, cond = Reparametrised(teacher, TrigFlow()), {"label": torch.tensor([0, 1, 2, 3])}
    t = torch.tensor([0.0, 0.4, 1.1, torch.pi / 2])
    u = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    tau = t.sin() / (t.sin() + t.cos())
    lam, tau_ = (tau**2 + (1 - tau) ** 2).sqrt()[:, None], tau[:, None]
    with torch.no_grad():
        v = teacher(lam * u, tau, cond).v
        expected = ((1 - 2 * tau_) * lam * u + (1 - 2 * tau_ + 2 * tau_**2) * v) / lam
        torch.testing.assert_close(view(u, t, cond).v, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view(u, t, cond).x0[0], u[0], rtol=0, atol=0)


def test_a_group_norm_takes_pixels_with_their_channels_last() -> None:
    """Attention over pixels leaves them so, in U-Nets."""
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)).double()
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def turned(x: Tensor) -> Tensor:
        return network(x.to(memory_format=torch.channels_last))

    value, slope = jvp(turned, (x,), (d,))
    _, near = jvp(turned, (x,), (d,), "difference", 1e-5)
    torch.testing.assert_close(value, network(x))
    torch.testing.assert_close(slope, near, rtol=1e-6, atol=1e-8)
