"""Samplers against the closed-form flow of a Gaussian, diffusers' schedulers, and what each promises step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussians import KINDS, PROCESSES, draws, exact
from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.diffusion.process import VP, Process, RectifiedFlow, TrigFlow
from stillroom.diffusion.sampling import (
    AncestralSampler,
    FewStepSampler,
    FlowMapSampler,
    ODESampler,
    Sampler,
    TCDSampler,
    ancestral_step,
    ddim_step,
    few_step_times,
    jump,
    rollout,
    sampler_from_dict,
    share_at,
)
from stillroom.draws import Draws
from stillroom.errors import UserError

MEAN, STD = torch.tensor([0.4, -0.8], dtype=torch.float64), 0.5
NAMES = list(PROCESSES)
SOLVERS = ["euler", "heun", "dpm++"]


def gaussian(name: str, kind: str = "", process: Process | None = None) -> Denoiser:
    return exact(process or PROCESSES[name], kind or KINDS[name], (MEAN.tolist(),), (STD,))


def flow_map(x: Tensor, process: Process, t: Any, s: Any) -> Tensor:
    """The probability flow of a Gaussian keeps the standardised position: mean and std move, the quantile stays."""
    t, s = (torch.as_tensor(v, dtype=torch.float64) for v in (t, s))
    std = lambda u: torch.hypot(process.alpha(u) * STD, process.sigma(u))  # noqa: E731
    return process.alpha(s) * MEAN + std(s) / std(t) * (x - process.alpha(t) * MEAN)


def errors(name: str, process: Process, solver: str, steps: tuple[int, ...]) -> list[float]:
    denoiser, noise = gaussian(name, process=process), torch.randn(32, 2, dtype=torch.float64)
    start = process.sigma(torch.tensor(process.t_max).double()) * noise
    out = []
    for n in steps:
        x = ODESampler(solver, n).sample(denoiser, noise)  # type: ignore[arg-type]
        true = flow_map(start, process, process.t_max, 0.0)
        if name == "vp":  # its time 0 has noise left: the exact flow to the last time, then the posterior mean
            last = process.grid(n)[-2]
            a, s = process.alpha(last), process.sigma(last)
            true = denoiser.network.posterior(flow_map(start, process, process.t_max, last), a, s)[0]  # type: ignore[operator]
        out.append(float((x - true).detach().square().mean().sqrt()))
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_ode_solvers_converge_to_the_flow_of_a_gaussian_at_their_order(name: str, solver: str, order: int) -> None:
    # orders show once the steps resolve the smallest noise; VP's discrete times must then be fewer than the steps
    process = VP("linear", 20, 0.02, 0.6) if name == "vp" else PROCESSES[name]
    coarse, fine = errors(name, process, solver, (192, 384))
    rate = math.log2(coarse / fine)
    # a first step from pure noise costs DPM++ a factor log(steps), hence its slack
    slack = 0.35 if solver == "dpm++" else 0.15
    assert rate > order - slack, f"{solver} on {name} converges at order {rate:.2f}"
    bound = 5e-3 if order == 1 else 1.1e-3
    assert fine < bound
    assert errors(name, PROCESSES[name], solver, (384,))[0] < bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_first_and_last_steps_are_finite_in_float32(name: str, solver: str, steps: int) -> None:
    x = ODESampler(solver, steps).sample(gaussian(name), torch.randn(8, 2))  # type: ignore[arg-type]
    assert x.dtype == torch.float32
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("name", ["flow", "trig", "edm"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_the_posterior_mean(name: str, solver: str) -> None:
    process, noise = PROCESSES[name], torch.randn(8, 2)
    x = ODESampler(solver, 1).sample(gaussian(name), noise)  # type: ignore[arg-type]
    torch.testing.assert_close(x, gaussian(name)(process.sigma(torch.tensor(process.t_max)) * noise, process.t_max).x0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_sampling_reproduces_mean_and_spread(name: str, eta: float) -> None:
    steps = 400 if name == "edm" else 150
    x = AncestralSampler(steps, eta).sample(
        gaussian(name), torch.randn(8000, 2), generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(x.mean(0).double(), MEAN, atol=0.035, rtol=0)
    torch.testing.assert_close(x.std(0).double(), torch.full((2,), STD).double(), atol=0.03, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_vp_steps_are_those_of_diffusers_ddim(eta: float) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    process, x, eps, noise = VP(), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    for t in (950, 500, 50):
        theirs = scheduler.step(eps, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        now, then = torch.tensor(float(t)), torch.tensor(float(t - 50))
        p = Prediction(process, "eps", eps, x, now)
        ours = ancestral_step(p, process, now, then, eta, noise)
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
        if eta == 0:
            torch.testing.assert_close(ddim_step(p, process, then), theirs, rtol=2e-4, atol=2e-4)


def test_euler_on_a_flow_is_that_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 9)[:-1].tolist())
    denoiser, noise = gaussian("flow"), torch.randn(5, 2)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, float(t) / 1000).v, t, x).prev_sample
    torch.testing.assert_close(ODESampler("euler", 8).sample(denoiser, noise), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "sampler",
    [
        *(ODESampler(s, 7) for s in SOLVERS),
        AncestralSampler(5),
        FewStepSampler((0.9, 0.5, 0.2)),
        ODESampler("heun", 4, 2.5),
        ODESampler("euler", 3, 0.0),
        AncestralSampler(3, guidance=3.0),
        FewStepSampler((0.8, 0.3), guidance=1.5),
    ],
    ids=lambda s: f"{s.name}-{getattr(s, 'solver', '')}-w{s.guidance:g}" if isinstance(s, Sampler) else str(s),
)
def test_nfe_is_the_number_of_evaluations_that_a_sample_costs(name: str, sampler: Sampler) -> None:
    denoiser = exact(PROCESSES[name], KINDS[name], ((0.0, 0.0),), (0.5,), offsets=((1.0, 0.0), (0.0, 0.0)))
    sampler.sample(denoiser, torch.randn(3, 2), {"label": torch.zeros(3, dtype=torch.long)})
    assert denoiser.network.rows == 3 * sampler.nfe  # type: ignore[operator]


def test_samplers_survive_a_file() -> None:
    for sampler in (ODESampler("dpm++", 9, 2.0), AncestralSampler(4, 0.3), FewStepSampler((1.0, 0.25), "ddim")):
        assert sampler_from_dict(sampler.to_dict()) == sampler
    listed = FewStepSampler((1.0, 0.5)).to_dict() | {"times": [1.0, 0.5]}  # as JSON gives it back
    assert sampler_from_dict(listed) == FewStepSampler((1.0, 0.5))


class Recorder(nn.Module):
    """Answers x0 = 0.5 tanh(x) and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.inputs: list[Tensor] = []
        self.graphs: list[bool] = []

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.inputs.append(x)
        self.graphs.append(torch.is_grad_enabled())
        return self.gain * x.tanh()


def recorder(process: Process) -> Denoiser:
    return Denoiser(Recorder(), process, "x0", shape=(2,))


@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow(), VP()], ids=lambda p: p.name)
@pytest.mark.parametrize("renoise", ["fresh", "fixed", "ddim"])
def test_few_step_sampling_predicts_noises_again_and_predicts(process: Process, renoise: str) -> None:
    denoiser, noise, times = recorder(process), torch.randn(6, 2), (0.9, 0.6, 0.3)
    out = FewStepSampler(times, renoise).sample(denoiser, noise, generator=torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    fresh, asked = torch.Generator().manual_seed(3), denoiser.network.inputs  # type: ignore[union-attr]
    t = [torch.tensor(f * process.t_max) for f in times]
    torch.testing.assert_close(asked[0], process.sigma(t[0]) * noise)  # type: ignore[index]
    for k in (1, 2):
        before = asked[k - 1]  # type: ignore[index]
        x0 = 0.5 * before.tanh()
        implied = (before - process.alpha(t[k - 1]) * x0) / process.sigma(t[k - 1])
        eps = {"fixed": noise, "ddim": implied}.get(renoise)
        eps = torch.randn(6, 2, generator=fresh) if eps is None else eps
        torch.testing.assert_close(asked[k], process.alpha(t[k]) * x0 + process.sigma(t[k]) * eps)  # type: ignore[index]
    torch.testing.assert_close(out, 0.5 * asked[2].tanh())  # type: ignore[index]
    assert not out.requires_grad


@pytest.mark.parametrize("times", [(), (0.5, 0.5), (0.2, 0.8)])
def test_few_step_times_must_decrease(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="decrease"):
        FewStepSampler(times)


def test_a_share_is_the_time_of_its_ratio_and_lies_between_the_ends() -> None:
    assert share_at(RectifiedFlow(), 1.0, 3.0) == pytest.approx(0.75)
    assert share_at(TrigFlow(), math.cos(0.5), math.sin(0.5)) == pytest.approx(0.5 / (math.pi / 2))
    for process, alpha, sigma in (
        (RectifiedFlow(), math.cos(3), math.sin(3)),
        (VP(), 1.0, 1e9),
        (RectifiedFlow(), 1, 0),
    ):
        with pytest.raises(UserError, match="which the second step is to have"):
            share_at(process, alpha, sigma)


def test_few_step_times_are_evenly_spaced() -> None:
    assert few_step_times(4) == (1.0, 0.75, 0.5, 0.25)
    assert [round(999 * t) for t in few_step_times(4)] == [999, 749, 500, 250]  # DMD2's 999, 749, 499, 249 to rounding
    assert [int(1000 * t) for t in few_step_times(4, 0.625)] == [625, 468, 312, 156]  # few-step SiD's
    assert few_step_times(4, shift=3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5))  # 3 u / (1 + 2 u)
    assert few_step_times(2, 0.8, 3.0) == pytest.approx((0.8, 0.6))
    for wrong in ((0, 1.0), (2, 0.0), (2, 1.5)):
        with pytest.raises(ValueError, match="few-step times"):
            few_step_times(*wrong)


def test_a_rollout_is_the_few_step_sampler_on_the_same_noise() -> None:
    denoiser, times = recorder(RectifiedFlow()), (0.9, 0.6, 0.3)
    trained = rollout(denoiser, draws(5, seed=11), {}, times, grad=False, last=2)
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(5, 2, generator=generator)
    assert torch.equal(trained, FewStepSampler(times).sample(denoiser, noise, generator=generator))


@pytest.mark.parametrize("last", [0, 1, 2])
def test_only_the_last_call_of_a_rollout_carries_a_graph(last: int) -> None:
    denoiser = recorder(RectifiedFlow())
    x0 = rollout(denoiser, draws(5), {}, (0.9, 0.6, 0.3), grad=True, last=last)
    assert denoiser.network.graphs == [False] * last + [True]
    inputs = denoiser.network.inputs  # type: ignore[union-attr]
    assert not any(x.requires_grad for x in inputs)  # type: ignore[union-attr]
    x0.sum().backward()
    gain = denoiser.network.gain.grad  # type: ignore[union-attr]
    torch.testing.assert_close(gain, inputs[-1].tanh().sum())  # type: ignore[index,union-attr]


def test_a_rollout_without_gradients_has_no_graph() -> None:
    denoiser = recorder(RectifiedFlow())
    assert not rollout(denoiser, draws(5), {}, (0.9, 0.6), grad=False).requires_grad
    assert not any(denoiser.network.graphs)  # type: ignore[arg-type]


def test_a_rollout_draws_each_step_equally_often() -> None:
    denoiser, counts = recorder(RectifiedFlow()), [0, 0, 0]
    draw = draws(1)
    for _ in range(600):
        denoiser.network.inputs.clear()  # type: ignore[union-attr,operator]
        rollout(denoiser, draw, {}, (0.9, 0.6, 0.3), grad=False)
        counts[len(denoiser.network.inputs) - 1] += 1  # type: ignore[arg-type]
    assert min(counts) > 150


def test_a_rollout_does_not_depend_on_how_the_batch_is_split() -> None:
    denoiser, times = recorder(RectifiedFlow()), (0.9, 0.6, 0.3)
    whole = rollout(denoiser, draws(6, seed=2), {}, times, grad=False)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        draw = Draws(torch.Generator().manual_seed(2), rows, 6)
        parts.append(rollout(denoiser, draw, {}, times, grad=False))
    assert torch.equal(torch.cat(parts), whole)


def test_draws_are_for_the_micro_batch_and_say_so() -> None:
    draw = Draws(torch.Generator().manual_seed(0), slice(2, 5), 8)
    assert draw.local == 3
    assert draw.normal(3, 4).shape == (3, 4)
    with pytest.raises(ValueError, match="micro-batch size 3"):
        draw.normal(8, 4)
    whole = Draws(torch.Generator().manual_seed(0), slice(0, 8), 8).normal(8, 4)
    again = Draws(torch.Generator().manual_seed(0), slice(2, 5), 8).normal(3, 4)
    assert torch.equal(whole[2:5], again)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_tcd_is_what_diffusers_scheduler_does(kind: str, eta: float) -> None:
    import diffusers

    denoiser = exact(VP(), kind, (MEAN.tolist(),), (STD,))
    names = {"eps": "epsilon", "v": "v_prediction"}
    scheduler = diffusers.TCDScheduler(original_inference_steps=1000, prediction_type=names[kind])
    scheduler.set_timesteps(4)
    times = tuple(float(t) / 999 for t in scheduler.timesteps)
    assert times == pytest.approx((1, 749 / 999, 499 / 999, 249 / 999))
    noise = torch.randn(3, 2)
    ours = TCDSampler(times, eta=eta).sample(denoiser, noise, generator=torch.Generator().manual_seed(5))
    x, again = VP().sigma(torch.tensor(999.0)) * noise, torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        value = denoiser(x, t.float(), {}).value
        x = scheduler.step(value, t, x, eta=eta, generator=again, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tcd_without_noise_is_euler_and_with_all_of_it_noises_afresh(name: str) -> None:
    process = PROCESSES[name]
    denoiser, noise = gaussian(name), torch.randn(4, 2)
    start = torch.full((), process.t_max)
    x = process.sigma(start) * noise
    half, end = torch.full((), process.t_max / 2), torch.zeros(())
    euler = jump(denoiser(jump(denoiser(x, start, {}), half), half, {}), end)
    torch.testing.assert_close(TCDSampler((1.0, 0.5), eta=0.0).sample(denoiser, noise), euler, rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    fresh = TCDSampler((1.0, 0.5), eta=1.0).sample(denoiser, noise)
    torch.manual_seed(3)
    clean = jump(denoiser(x, start, {}), end)
    rest = process.alpha(half) / process.alpha(end)
    left = (process.sigma(half) ** 2 - (rest * process.sigma(end)) ** 2).sqrt()
    expected = jump(denoiser(rest * clean + left * torch.randn(4, 2), half, {}), end)
    torch.testing.assert_close(fresh, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="0 to 1"):
        TCDSampler(eta=1.5)


# --- networks that are told a second time -----------------------------------------------------------------------------
def test_the_second_time_is_a_flow_s_whatever_the_process() -> None:
    for name in NAMES:
        denoiser, told = gaussian(name), []
        native = denoiser.native
        denoiser.native = lambda x, t, cond, n=native, told=told: told.append(cond["r"]) or n(x, t, cond)  # type: ignore[method-assign,misc]
        process, noise = denoiser.process, torch.randn(3, 2, dtype=torch.float64)
        FlowMapSampler((1.0, 0.5), to="next").sample(denoiser, noise)
        t = torch.tensor(0.5 * process.t_max, dtype=torch.float64)
        a, s = process.alpha(t), process.sigma(t)
        for found, r in zip(told, (s / (a + s), 0 * s), strict=True):  # the last call leads to clean data
            torch.testing.assert_close(found, r.expand(3), rtol=1e-6, atol=1e-9)
