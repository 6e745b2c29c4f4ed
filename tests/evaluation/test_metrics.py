"""Metrics against closed forms and worked examples; costs against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.evaluation import cost, metrics
from stillroom.surgery.modules import parameter_count


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Frechet ------------------------------------------------------------------------------------------------------
def test_frechet_of_gaussians_with_common_axes_is_the_closed_form() -> None:
    rotation = torch.linalg.qr(normal(3, 3)).Q
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.0]).double()
    mean_a, mean_b = torch.zeros(3).double(), torch.tensor([1.0, 2.0, 2.0]).double()
    found = metrics.frechet_of_moments(
        mean_a, rotation @ a.diag() @ rotation.T, mean_b, rotation @ b.diag() @ rotation.T
    )
    assert found == pytest.approx(9.0 + float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-10)


def test_frechet_of_non_commuting_covariances_is_the_trace_of_the_root() -> None:
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    product_roots = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = float(a.trace() + b.trace() - 2 * product_roots)
    zero = torch.zeros(2).double()
    assert metrics.frechet_of_moments(zero, a, zero, b) == pytest.approx(expected, abs=1e-10)


def test_frechet_is_zero_on_equal_sets_also_with_fewer_points_than_dimensions() -> None:
    for count in (5, 500):
        x = normal(count, 16)
        assert metrics.frechet_distance(x, x.flip(0)) < 1e-6


def test_frechet_is_symmetric_and_unmoved_by_rotation_and_shift() -> None:
    a, b = normal(200, 5), 2 * normal(300, 5, seed=1) + 1
    rotation = torch.linalg.qr(normal(5, 5, seed=2)).Q
    base = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(b, a) == pytest.approx(base, rel=1e-9)
    assert metrics.frechet_distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(base, rel=1e-9)


def test_frechet_bias_between_samples_of_one_gaussian_is_the_first_order_one() -> None:
    d, n = 32, 4000
    found = [metrics.frechet_distance(normal(n, d, seed=2 * i), normal(n, d, seed=2 * i + 1)) for i in range(8)]
    # |S_a - S_b|^2 / 4 has the mean (d^2 + d) / 2N, |mu_a - mu_b|^2 the mean 2d / N
    assert sum(found) / 8 == pytest.approx((d**2 + 5 * d) / (2 * n), rel=0.06)


def test_covariance_is_the_unbiased_one() -> None:
    mean, covariance = metrics.mean_and_covariance(torch.tensor([[0.0], [2.0]]))
    assert (float(mean), float(covariance)) == (1.0, 2.0)


# --- kernel distance ----------------------------------------------------------------------------------------------
def test_kid_of_two_points_each_is_the_sum_written_out() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    # kernel (xy + 1)^3: k(1,2) = 27, k(0,1) = 1, cross: 1, 8, 1, 27
    assert metrics.kid(x, y, subsets=1)[0] == pytest.approx(27 + 1 - 2 * (1 + 8 + 1 + 27) / 4)


def test_kid_of_one_distribution_is_zero_within_its_error() -> None:
    means = torch.tensor([metrics.kid(normal(300, 8, seed=i), normal(300, 8, seed=100 + i), 1)[0] for i in range(30)])
    assert abs(float(means.mean())) < 3 * float(means.std()) / math.sqrt(30)
    assert float(means.min()) < 0 < float(means.max())


def test_kid_finds_a_shift_that_the_error_does_not_explain() -> None:
    mean, sd = metrics.kid(normal(1000, 8), normal(1000, 8, seed=1) + 0.3, subsets=20, size=200)
    assert mean > 3 * sd / math.sqrt(20) > 0


# --- precision, recall, density, coverage -------------------------------------------------------------------------
def test_prdc_worked_example() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0]])  # nearest neighbours at 1, 1, 2
    fake = torch.tensor([[0.5], [10.0]])  # at 9.5 both
    found = metrics.precision_recall_density_coverage(real, fake, k=1)
    # 0.5 lies in the balls around 0 and 1 (|0.5| <= 1, |0.5| <= 1), not in that around 3 (2.5 > 2); 10 lies in none.
    assert found["precision"] == 0.5
    assert found["density"] == 2 / (1 * 2)
    assert found["coverage"] == 2 / 3  # balls around 0 and 1 hold 0.5; the nearest fake to 3 is 2.5 away
    assert found["recall"] == 1.0  # balls of radius 9.5 around 0.5 hold all reals


def test_prdc_of_equal_sets_is_one_and_of_far_sets_zero() -> None:
    x = normal(60, 3)
    same = metrics.precision_recall_density_coverage(x, x)
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0
    assert set(metrics.precision_recall_density_coverage(x, x + 100).values()) == {0.0}


def test_prdc_tells_mode_drop_from_noise() -> None:
    real = torch.cat([normal(300, 2), normal(300, 2, seed=1) + 20])
    dropped = metrics.precision_recall_density_coverage(real, normal(600, 2, seed=2))
    assert dropped["precision"] > 0.9
    assert dropped["recall"] < 0.6
    assert dropped["coverage"] < 0.6


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(70, 4), normal(50, 4, seed=1)
    whole = metrics.precision_recall_density_coverage(real, fake)
    monkeypatch.setattr(metrics._distances, "__defaults__", (7,))
    assert metrics.precision_recall_density_coverage(real, fake) == whole


def test_nearest_train_distance_is_exactly_zero_for_copies_and_the_median_otherwise() -> None:
    train = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert metrics.nearest_train_distance(train[:20], train) == 0.0
    assert metrics.nearest_train_distance(torch.tensor([[1.0], [4.0], [9.0]]), torch.tensor([[0.0], [2.0]])) == 2.0


# --- by a classifier ----------------------------------------------------------------------------------------------
def test_class_scores() -> None:
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    labels = torch.tensor([0, 1, 1, 2])
    assert metrics.class_agreement(logits, labels) == 0.75
    assert metrics.class_histogram_tv(logits, labels) == 0.25
    assert metrics.class_histogram_tv(torch.eye(3)[torch.tensor([0, 0, 0, 0])], labels) == 0.75


# --- points -------------------------------------------------------------------------------------------------------
def test_energy_distance_of_two_points_is_twice_their_distance() -> None:
    assert metrics.energy_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])) == pytest.approx(10.0)


def test_energy_distance_of_gaussians_is_the_closed_form() -> None:
    # For X ~ N(0, 1), Y ~ N(m, 1): X - Y ~ N(m, 2), whose mean absolute value is the folded normal's.
    m, n = 1.5, 8000
    folded = 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = 2 * folded - 2 * 2 / math.sqrt(math.pi)
    assert metrics.energy_distance(normal(n, 1), normal(n, 1, seed=1) + m) == pytest.approx(expected, rel=0.05)


def test_energy_distance_is_zero_on_equal_sets_and_unmoved_by_rotation() -> None:
    a, b = normal(100, 2), normal(80, 2, seed=1) + 1
    assert metrics.energy_distance(a, a.flip(0)) == pytest.approx(0.0, abs=1e-12)
    rotation = torch.linalg.qr(normal(2, 2, seed=2)).Q
    assert metrics.energy_distance(a @ rotation, b @ rotation) == pytest.approx(metrics.energy_distance(a, b), rel=1e-9)


def test_conditional_energy_distance_sees_swapped_classes() -> None:
    points = torch.tensor([[0.0], [1.0]])
    labels = torch.tensor([0, 1])
    assert metrics.energy_distance(points, points.flip(0)) == 0.0
    assert metrics.conditional_energy_distance(points, labels, points, 1 - labels) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="class 1"):
        metrics.conditional_energy_distance(points, torch.zeros(2).long(), points, labels)


@pytest.mark.parametrize("d", [2, 5])
def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_d(d: int) -> None:
    x, shift = normal(50, d), torch.zeros(d).double()
    shift[0] = 3.0
    assert metrics.sliced_wasserstein(x, x + shift, projections=4000) == pytest.approx(3 / math.sqrt(d), rel=0.03)
    assert metrics.sliced_wasserstein(x, x.flip(0)) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="equally many"):
        metrics.sliced_wasserstein(x, x[:-1])


def test_grey_levels_round_trip_and_refuse_nan() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(metrics.to_uint8(levels.float() / 127.5 - 1), levels)
    assert metrics.to_uint8(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]
    with pytest.raises(UserError, match="NaN"):
        metrics.to_uint8(torch.full((1, 1, 2, 2), torch.nan))


# --- cost ---------------------------------------------------------------------------------------------------------
def test_parameters_count_shared_weights_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    assert parameter_count(net) == 9


def test_macs_of_linear_convolution_and_attention_are_those_counted_by_hand() -> None:
    linear, convolution = nn.Linear(5, 7), nn.Conv2d(2, 3, 3, padding=1)
    assert cost.macs(lambda: linear(torch.zeros(4, 5))) == 4 * 5 * 7
    assert cost.macs(lambda: convolution(torch.zeros(1, 2, 8, 8))) == 8 * 8 * 2 * 3 * 9
    q = torch.zeros(1, 2, 6, 4)
    attention = cost.macs(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention == 2 * (2 * 6 * 6 * 4)


def test_latency_states_its_runs_and_threads_and_orders_its_quantiles() -> None:
    net = nn.Linear(64, 64)
    single, many = cost.latency(lambda batch: net(torch.zeros(batch, 64)))
    assert (single.batch, many.batch, single.runs, single.threads) == (1, 32, 30, torch.get_num_threads())
    assert 0 < single.median_ms <= single.p95_ms
    with pytest.raises(ValueError, match="30"):
        cost.latency(lambda batch: None, runs=10)


def hold(mebibytes: int) -> None:
    torch.ones(mebibytes * 2**18)


def fail() -> None:
    raise KeyError("no such thing")


@pytest.mark.slow
def test_peak_memory_is_that_of_the_call_not_of_this_process() -> None:
    ballast = torch.ones(200 * 2**18)
    small, large = cost.peak_memory(hold, 1), cost.peak_memory(hold, 101)
    assert large.peak - small.peak == pytest.approx(100, abs=10)
    assert small.added < 30
    del ballast
    with pytest.raises(RuntimeError, match="KeyError"):
        cost.peak_memory(fail)


def test_evaluations_are_counted_per_sample() -> None:
    net = nn.Linear(2, 2)
    with cost.count_evaluations(net) as seen:
        for _ in range(3):
            net(torch.zeros(8, 2))  # guided: four samples, with and without condition
    net(torch.zeros(8, 2))
    assert (seen.calls, seen.per_sample(4)) == (3, 6.0)
