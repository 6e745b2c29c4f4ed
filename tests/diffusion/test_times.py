"""Time laws: their quantiles, supports, stratification, and independence of how a batch is split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaussians import PROCESSES, draws
from stillroom.diffusion.process import EDM, VP, RectifiedFlow
from stillroom.diffusion.times import Segments, TimeLaw
from stillroom.draws import Draws

LAWS = ["uniform", "logit-normal", "log-normal", "karras", "segments"]
LAW = st.builds(
    TimeLaw, law=st.sampled_from(LAWS), low=st.floats(0, 0.4), high=st.floats(0.5, 1), mean=st.floats(-2, 2),
    std=st.floats(0.1, 2), segments=st.integers(1, 6), shift=st.sampled_from([0.0, 0.5, 3.0]), stratified=st.booleans(),
    at_max=st.sampled_from([0.0, 0.3]),
)  # fmt: skip


@given(LAW, st.sampled_from(list(PROCESSES.values())))
def test_times_lie_on_the_process_and_quantiles_rise(law: TimeLaw, process: object) -> None:
    t = law.sample(draws(64), process)  # type: ignore[arg-type]
    assert t.shape == (64,)
    assert t.dtype == torch.float32
    assert bool(torch.isfinite(t).all())
    assert float(t.min()) >= 0
    assert float(t.max()) <= process.t_max * (1 + 1e-6)  # type: ignore[attr-defined]
    rising = law.quantile(torch.linspace(0, 0.999, 50), process)  # type: ignore[arg-type]
    assert bool((rising[1:] >= rising[:-1] - 1e-6).all())


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_uniform_is_linear_between_fractions_of_the_end(process: object) -> None:
    law = TimeLaw("uniform", 0.02, 0.98)
    t = law.quantile(torch.tensor([0.0, 0.5, 1.0]), process)  # type: ignore[arg-type]
    torch.testing.assert_close(t, torch.tensor([0.02, 0.5, 0.98]) * process.t_max)  # type: ignore[attr-defined]


def test_logit_normal_has_the_logits_of_a_normal() -> None:
    t = TimeLaw("logit-normal", mean=0.4, std=0.7).sample(draws(40_000), RectifiedFlow())
    logits = torch.logit(t.double())
    assert float(logits.mean()) == pytest.approx(0.4, abs=0.02)
    assert float(logits.std()) == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_log_normal_is_a_law_of_the_noise_to_signal_ratio_on_any_process(process: object) -> None:
    t = TimeLaw("log-normal", mean=-1.2, std=1.2).quantile(torch.tensor([0.5, 0.8413447]), process)  # type: ignore[arg-type]
    ratio = (process.sigma(t) / process.alpha(t)).log()  # type: ignore[attr-defined]
    torch.testing.assert_close(ratio, torch.tensor([-1.2, 0.0]), atol=2e-3, rtol=0)


def test_karras_is_the_edm_grid() -> None:
    """Against the closed form of eq. 5 written with index i of N, i = 0 the noisiest."""
    low, high, rho, n = 0.002, 80.0, 7.0, 5
    grid = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    t = TimeLaw("karras").quantile(torch.linspace(0, 1, n), EDM())
    torch.testing.assert_close(t, torch.tensor(grid[::-1]), rtol=1e-4, atol=1e-6)
    top = TimeLaw("karras", 0.0, 0.8).quantile(torch.tensor([1.0]), EDM())
    assert 20 < float(top) < 28  # SiD's cut, about 24
    flow = TimeLaw("karras").quantile(torch.linspace(0, 1, n), RectifiedFlow())
    torch.testing.assert_close(flow / (1 - flow), torch.tensor(grid[::-1]), rtol=1e-2, atol=1e-6)


def test_segments_give_the_upper_ends() -> None:
    t = TimeLaw("segments", segments=4).sample(draws(2000), VP())
    values, counts = torch.unique((t / VP().t_max * 4).round(decimals=4), return_counts=True)
    assert values.tolist() == [1, 2, 3, 4]
    assert int(counts.min()) > 420


def test_stratified_times_fill_every_slice_once_in_random_order() -> None:
    t = TimeLaw("uniform", stratified=True).sample(draws(50), RectifiedFlow())
    assert sorted((t * 50).floor().int().tolist()) == list(range(50))
    assert t.tolist() != sorted(t.tolist())


def test_at_max_is_the_share_of_the_largest_time() -> None:
    t = TimeLaw("uniform", 0, 0.9, at_max=0.25).sample(draws(20_000), EDM())
    share = (t == torch.tensor(0.9 * 80)).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.015)


def test_shift_warps_towards_noise_and_defaults_to_the_flow_s_own() -> None:
    u = torch.tensor([0.25, 0.5, 0.75])
    warped = 3 * u / (1 + 2 * u)
    torch.testing.assert_close(TimeLaw("uniform", shift=3.0).quantile(u, RectifiedFlow()), warped)
    torch.testing.assert_close(TimeLaw("uniform").quantile(u, RectifiedFlow(shift=3.0)), warped)
    # sd3's shift is a shift of log(sigma / alpha) by log 3
    logit = torch.logit(TimeLaw("logit-normal", shift=3.0).quantile(torch.tensor([0.5]), RectifiedFlow()))
    assert float(logit) == pytest.approx(math.log(3), abs=1e-4)


@given(LAW)
def test_times_do_not_depend_on_how_the_batch_is_split(law: TimeLaw) -> None:
    whole = law.sample(draws(12, seed=5), RectifiedFlow())
    parts = []
    for rows in (slice(0, 4), slice(4, 12)):
        parts.append(law.sample(Draws(torch.Generator().manual_seed(5), rows, 12), RectifiedFlow()))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "wrong", [{"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.2}, {"std": 0.0}, {"segments": 0}, {"at_max": 1.5}]
)
def test_impossible_laws_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="time law"):
        TimeLaw(**wrong)  # type: ignore[arg-type]


def test_segments_are_open_below_and_never_empty() -> None:
    """8 steps in 4 segments: 1, 2 begin at 0; 3, 4 at 2; ... Also 2, the end of one and not the begin of the next."""
    segments, n = Segments(8, 4), torch.arange(1, 9)
    assert segments.start(n).tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    ends = torch.stack([segments.end(n, torch.full((8,), u)) for u in (0.0, 0.49, 0.5, 0.999999)])
    assert bool((ends >= segments.start(n)).all())
    assert bool((ends < n).all())
    assert ends[:, 1].tolist() == [0, 0, 1, 1]
    assert Segments(8, 1).start(n).tolist() == [0] * 8
    with pytest.raises(ValueError, match="3 equal segments"):
        Segments(8, 3)


@given(LAW, st.sampled_from(list(PROCESSES.values())))
def test_a_law_s_share_is_the_inverse_of_its_quantile(law: TimeLaw, process: Any) -> None:
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    if law.law == "segments":  # a step: the share of the times up to one
        u = (u * law.segments).floor() / law.segments
    t = law.quantile(u, process)
    inside = (t > law.low * process.t_max * 1.001 + 1e-9) & (t < law.high * process.t_max * 0.999)  # not clamped
    if law.law == "segments":
        expected = u + 1 / law.segments
        inside = inside | True
    else:
        expected = u
    torch.testing.assert_close(law.share(t, process)[inside], expected[inside], rtol=2e-3, atol=2e-3)


@given(LAW, st.sampled_from(list(PROCESSES.values())), st.floats(0.45, 1))
def test_times_below_a_level_are_those_of_the_law_that_lie_there(law: TimeLaw, process: Any, level: float) -> None:
    end = law.low + level * (law.high - law.low)
    if law.law == "segments":
        end = max(end, law.low + (law.high - law.low) / law.segments)  # there is none below the first
    until = float(law._warp(torch.tensor(end, dtype=torch.float64), process)) * process.t_max
    t = law.sample(draws(256), process, until=until)
    assert float(t.max()) <= max(until, float(law.quantile(torch.zeros(1), process))) * (1 + 1e-4)


def test_below_a_level_a_uniform_law_is_uniform_before_its_shift() -> None:
    """Shift 3, the level 0.5 after it is 0.25 before it."""
    t = TimeLaw("uniform").sample(draws(40_000), RectifiedFlow(3.0), until=0.5).double()
    unshifted = t / (3 - 2 * t)
    assert float(unshifted.max()) <= 0.25 + 1e-6
    assert float(unshifted.mean()) == pytest.approx(0.125, abs=4 * 0.25 / (12 * 40_000) ** 0.5)
    assert float(unshifted.std()) == pytest.approx(0.25 / 12**0.5, rel=0.02)
    each = TimeLaw("uniform").sample(draws(4), RectifiedFlow(), until=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert bool((each <= torch.tensor([0.1, 0.2, 0.3, 0.4])).all())
