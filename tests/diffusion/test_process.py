"""Processes: conversions, ends, and the ways from one process to another."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gaussians import KINDS, PROCESSES, exact
from stillroom.diffusion.denoiser import Prediction, Reparametrised
from stillroom.diffusion.process import (
    BETA_SCHEDULES,
    EDM,
    VP,
    Process,
    RectifiedFlow,
    TrigFlow,
    expand,
    last_time,
    match_snr,
    process_from_dict,
)
from stillroom.networks.token_head import respaced

ALL = [*PROCESSES.values(), RectifiedFlow(shift=3.0), VP("squaredcos_cap_v2"), VP("linear", 1000, 1e-4, 0.02)]
IDS = ["flow", "trig", "edm", "vp", "flow-shift3", "vp-cosine", "vp-linear"]
processes = st.sampled_from(ALL)
fractions = st.floats(0.01, 0.99)
values = st.floats(-3, 3)
PAIRS = list(itertools.permutations(PROCESSES, 2))


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@given(processes, fractions, values, values, st.sampled_from(["x0", "eps", "v"]))
def test_every_view_of_a_prediction_recovers_data_noise_velocity_and_score(
    process: Process, fraction: float, x0: float, eps: float, kind: str
) -> None:
    t = double(fraction * process.t_max)
    a, s = process.alpha(t), process.sigma(t)
    p, q = process.velocity_weights(t)
    true = {"x0": double(x0), "eps": double(eps), "v": p * x0 + q * eps}
    x_t = process.add_noise(true["x0"], true["eps"], t)
    answer = Prediction(process, kind, true[kind], x_t, t)
    # x0 from eps loses sigma/alpha digits and eps from x0 loses alpha/sigma: the tolerance follows the conditioning
    slack = 1e-13 * (1 + float(s / a) + float(a / s))
    torch.testing.assert_close(answer.x0, true["x0"], rtol=1e-9, atol=10 * slack)
    torch.testing.assert_close(answer.eps, true["eps"], rtol=1e-9, atol=10 * slack)
    torch.testing.assert_close(answer.v, true["v"], rtol=1e-9, atol=10 * slack)
    torch.testing.assert_close(answer.score, (a * x0 - x_t) / s**2, rtol=1e-7, atol=10 * slack / float(s) ** 2)


@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow(), EDM()], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_the_data_end_views_are_exact_or_raise(process: Process, dtype: torch.dtype) -> None:
    x, t = torch.tensor([[0.7, -0.2]], dtype=dtype), torch.zeros(1, dtype=dtype)
    assert torch.equal(Prediction(process, "x0", x, x, t).x0, x)
    assert torch.equal(Prediction(process, "v", 3 * x, x, t).x0, x)
    assert torch.equal(Prediction(process, "eps", 3 * x, x, t).x0, x)
    with pytest.raises(ValueError, match="eps of an x0-prediction"):
        _ = Prediction(process, "x0", x, x, t).eps
    for kind in ("eps", "v"):
        with pytest.raises(ValueError, match="score"):
            _ = Prediction(process, kind, x, x, t).score


@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow()], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_the_noise_end_views_are_exact_or_raise(process: Process, dtype: torch.dtype) -> None:
    x, v = torch.tensor([[0.7, -0.2]], dtype=dtype), torch.tensor([[0.1, 0.4]], dtype=dtype)
    t = torch.full((1,), process.t_max, dtype=dtype)
    torch.testing.assert_close(Prediction(process, "x0", v, x, t).eps, x)
    torch.testing.assert_close(Prediction(process, "v", v, x, t).eps, x)
    expected = x - v if process.name == "rectified-flow" else -v
    torch.testing.assert_close(Prediction(process, "v", v, x, t).x0, expected)
    with pytest.raises(ValueError, match="x0 of an eps-prediction"):
        _ = Prediction(process, "eps", x, x, t).x0


def test_one_row_at_the_end_is_enough_to_raise() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="rate"):
        _ = Prediction(RectifiedFlow(), "x0", x, x, torch.tensor([0.5, 0.0])).eps


def test_a_prediction_of_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="noise"):
        Prediction(RectifiedFlow(), "noise", torch.ones(1), torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_vp_alphas_are_those_of_diffusers(schedule: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule=schedule).alphas_cumprod.double()
    process, t = VP(schedule), torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2, theirs, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - theirs, rtol=2e-4, atol=2e-7)  # theirs is float32


def test_integer_times_give_the_rates_of_the_same_real_times() -> None:
    whole = torch.tensor([1, 500, 999])
    torch.testing.assert_close(VP().alpha(whole), VP().alpha(whole.float()))
    torch.testing.assert_close(VP().sigma(whole), VP().sigma(whole.float()))


@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow(), EDM()], ids=lambda p: p.name)
def test_velocity_is_the_time_derivative_of_the_path(process: Process) -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64).mul(process.t_max).requires_grad_()
    p, q = process.velocity_weights(t)
    alpha = process.alpha(t) + 0 * t
    torch.testing.assert_close(p, torch.autograd.grad(alpha.sum(), t)[0])
    torch.testing.assert_close(q, torch.autograd.grad((process.sigma(t) + 0 * t).sum(), t)[0])


def test_vp_velocity_is_the_derivative_along_the_angle() -> None:
    """diffusers' v target is alpha eps - sigma x0."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction")
    x0, eps, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    p, q = VP().velocity_weights(t.float())
    theirs = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(expand(p, x0) * x0 + expand(q, x0) * eps, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        VP().add_noise(x0, eps, t.float()), scheduler.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5
    )


@given(processes, fractions, st.floats(0.1, 10))
def test_time_of_inverts_the_rates_at_any_common_scale(process: Process, fraction: float, scale: float) -> None:
    t = double(fraction * process.t_max)
    back = process.time_of(scale * process.alpha(t), scale * process.sigma(t))
    torch.testing.assert_close(back, t, rtol=1e-9, atol=1e-9 * process.t_max)


@pytest.mark.parametrize("process", ALL, ids=IDS)
def test_noise_grows_with_time(process: Process) -> None:
    t = torch.linspace(0, process.t_max, 501, dtype=torch.float64)
    ratio = process.sigma(t)[:-1] / process.alpha(t)[:-1]
    assert bool((ratio[1:] > ratio[:-1]).all())


@given(st.sampled_from(PAIRS), st.floats(0.05, 0.9))
def test_matched_times_have_equal_signal_to_noise_and_the_scale_makes_a_sample(
    pair: tuple[str, str], fraction: float
) -> None:
    of, to = (PROCESSES[name] for name in pair)
    t = double(fraction * of.t_max)
    ratio = of.sigma(t) / of.alpha(t)
    s, scale = match_snr(t, of, to)
    if to.name == "vp" and not 0 < float(s) < to.t_max:
        return  # a discrete schedule has no time for it
    torch.testing.assert_close(to.sigma(s) / to.alpha(s), ratio, rtol=1e-9, atol=0)
    x0, eps = double(0.3), double(-1.2)
    torch.testing.assert_close(scale * of.add_noise(x0, eps, t), to.add_noise(x0, eps, s), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("of", "to"), PAIRS)
def test_matched_times_are_differentiable(of: str, to: str) -> None:
    a, b = PROCESSES[of], PROCESSES[to]
    t = double(0.3141 * a.t_max).requires_grad_()
    s, scale = match_snr(t, a, b)
    h = 1e-6 * a.t_max
    (s_up, c_up), (s_down, c_down) = match_snr(t.detach() + h, a, b), match_snr(t.detach() - h, a, b)
    ds, dc = torch.autograd.grad(s, t, retain_graph=True)[0], torch.autograd.grad(scale, t)[0]
    torch.testing.assert_close(ds, (s_up - s_down) / (2 * h), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(dc, (c_up - c_down) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("of", "to"), PAIRS)
@pytest.mark.parametrize("end", [0.0, 1.0], ids=["data", "noise"])
def test_matched_times_at_the_ends_are_usable_or_raise(of: str, to: str, end: float) -> None:
    """EDM has no pure noise and VP neither end: there the nearest time may be taken, but never nan or infinity."""
    t = torch.tensor([end * PROCESSES[of].t_max])
    try:
        s, scale = match_snr(t, PROCESSES[of], PROCESSES[to])
    except ValueError:
        return
    assert bool(torch.isfinite(s).all())
    assert bool(torch.isfinite(scale).all())
    assert 0 <= float(s) <= PROCESSES[to].t_max * (1 + 1e-6)


@pytest.mark.parametrize(("of", "to"), PAIRS)
def test_a_reparametrised_denoiser_gives_the_posterior_mean_of_the_new_process(of: str, to: str) -> None:
    """The network knows process ``of``; asked under ``to`` it must still be exact."""
    denoiser = exact(PROCESSES[of], KINDS[of], means=((0.4, -0.8), (-1.0, 0.5)), stds=(0.6, 0.3), weights=(0.3, 0.7))
    asked, new = Reparametrised(denoiser, PROCESSES[to]), PROCESSES[to]
    t = new.time_of(torch.ones(5), torch.tensor([0.05, 0.3, 1.0, 3.0, 9.0])).float()
    x0, eps = torch.randn(5, 2), torch.randn(5, 2)
    x_t = new.add_noise(x0, eps, t)
    expected = denoiser.network.posterior(x_t.double(), new.alpha(t).double(), new.sigma(t).double())  # type: ignore[operator]
    answer = asked(x_t, t)
    torch.testing.assert_close(answer.x0.double(), expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(answer.eps.double(), expected[1], rtol=2e-3, atol=2e-3)


def test_edm_grid_and_preconditioning_are_those_of_diffusers() -> None:
    from diffusers import EDMEulerScheduler

    process, scheduler = EDM(), EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(process.grid(18).float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)
    x, network = torch.randn(3), torch.randn(3)
    for sigma in (0.01, 0.5, 40.0):
        t = torch.tensor(sigma)
        c_skip, c_out, c_in = process.preconditioning(t)
        torch.testing.assert_close(c_in * x, scheduler.precondition_inputs(x, t))
        torch.testing.assert_close(c_skip * x + c_out * network, scheduler.precondition_outputs(x, network, t))
        torch.testing.assert_close(process.network_time(t), scheduler.precondition_noise(t))


def test_flow_shift_is_that_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).sigmas
    plain = torch.linspace(1000, 1, 1000) / 1000
    torch.testing.assert_close(RectifiedFlow(3.0).warp(plain), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(RectifiedFlow(3.0).grid(4), RectifiedFlow(3.0).warp(torch.linspace(1, 0, 5).double()))


@pytest.mark.parametrize("process", ALL, ids=IDS)
def test_grids_run_from_noise_to_data_and_processes_survive_a_file(process: Process) -> None:
    grid = process.grid(6)
    assert len(grid) == 7
    assert float(grid[0]) == pytest.approx(process.t_max)
    assert float(grid[-1]) == 0
    assert bool((grid[1:] < grid[:-1]).all())
    assert process_from_dict(process.to_dict()) == process


def test_rates_broadcast_over_any_sample_shape() -> None:
    t, x = torch.tensor([0.25, 0.5]), torch.ones(2, 3, 4, 5)
    out = RectifiedFlow().add_noise(x, torch.zeros_like(x), t)
    assert torch.equal(out[:, 0, 0, 0], 1 - t)
    assert torch.equal(RectifiedFlow().add_noise(x, 0 * x, torch.tensor(0.25)), 0.75 * x)


def test_an_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        VP("sigmoid").alpha(torch.tensor(1.0))
    assert TrigFlow().t_max == math.pi / 2


def test_a_plan_leaves_no_fake_tables_behind() -> None:
    """A plan may be the first to ask for a schedule; a training in the same process reads the same tables."""
    process = VP(beta_start=0.00081)  # nobody else's
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert process.alpha(torch.zeros(3)).shape == (3,)
        respaced(process, 7)
    assert type(process.alpha(torch.zeros(3))) is Tensor
    assert all(type(value) is Tensor for value in vars(respaced(process, 7)).values())


def test_a_process_s_last_time_as_another_knows_it() -> None:
    vp = VP()
    end = torch.tensor(vp.t_max, dtype=torch.float64)
    ratio = float(vp.sigma(end) / vp.alpha(end))
    assert last_time(vp, TrigFlow()) == pytest.approx(math.atan(ratio))
    assert last_time(vp, RectifiedFlow()) == pytest.approx(ratio / (1 + ratio))
    assert last_time(RectifiedFlow(), TrigFlow()) == pytest.approx(math.pi / 2)
