"""Self-distillation with weighted ground truth: the closed forms against fits made one after the other."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stillroom.data.source import ArrayData
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.losses.soft_labels import least_squares_mix
from stillroom.method import Stage
from stillroom.methods.classifier.gt_self_distill import GTSelfDistill
from stillroom.networks.kernel_self_distillation import (
    KernelSelfDistillation,
    convergent_weights,
    dual_filter,
    effective_ridge,
    limiting_ratio,
    ratio_bound,
    risk_optimal_weight,
)
from stillroom.recipe import Recipe

X = np.linspace(0, 1, 11)[:, None]
Y = np.array(
    [0.38476636, 1.23339677, 1.33232242, 0.69201595, -0.29756146, -0.24189291, -0.79644858, -0.96164802, -0.49672509,
     -0.34690660, 0.55895127]
)  # fmt: skip
TOY = {"gamma": 80.0, "ridge": 0.2}
LINE = np.linspace(0, 1, 101)[:, None]


def rbf(a: np.ndarray, b: np.ndarray, gamma: float = 80.0) -> np.ndarray:
    return np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(-1))


def refitted(y: np.ndarray, ridge: float, weights: list[float]) -> list[np.ndarray]:
    """The coefficients of every round, by solving each round's own ridge problem."""
    kernel, last, found = rbf(X, X), y, []
    for weight in [1.0, *weights]:
        target = weight * y + (1 - weight) * last
        found.append(np.linalg.solve(kernel + ridge * np.eye(len(X)), target))
        last = kernel @ found[-1]
    return found


# --- published and iterated fits --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weight", "losses", "limit"),
    [
        (0.0, [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
        (0.35, [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
        (0.25, [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011], 0.15250),
    ],
)
def test_the_papers_toy_losses(weight: float, losses: list[float], limit: float) -> None:
    model, truth = KernelSelfDistillation(**TOY, gt_weight=weight).fit(X, Y), np.sin(2 * np.pi * LINE[:, 0])
    for rounds, loss in zip([1, 2, 3, 4, 5, 6, math.inf], [*losses, limit], strict=True):
        assert np.mean((model.predict(LINE, rounds) - truth) ** 2) == pytest.approx(loss, abs=6e-6)


@pytest.mark.parametrize("weights", [[0.3, 0.0, 1.0, 0.7], [0.5], [], [2.5, -0.8, 0.4]])
def test_any_sequence_of_weights_is_refitting(weights: list[float]) -> None:
    both = np.stack([Y, np.cos(5 * X[:, 0])], 1)
    model = KernelSelfDistillation(**TOY, rounds=len(weights) + 1, gt_weight=weights).fit(X, both)
    for rounds, coefficients in enumerate(refitted(both, 0.2, weights), 1):
        np.testing.assert_allclose(model.predict(LINE, rounds), rbf(LINE, X) @ coefficients, atol=1e-10)
        kept = model.eigenvectors_ @ (model.shrinkage(rounds)[:, None] * (model.eigenvectors_.T @ both))
        np.testing.assert_allclose(kept, rbf(X, X) @ coefficients, atol=1e-10)
    np.testing.assert_array_equal(model.predict(LINE), model.predict(LINE, len(weights) + 1))


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.6, 1.0])
def test_a_constant_weight_is_refitting_and_its_limit_an_amplified_ridge(weight: float) -> None:
    model = KernelSelfDistillation(**TOY, rounds=9, gt_weight=weight).fit(X, Y)
    for rounds, coefficients in enumerate(refitted(Y, 0.2, 8 * [weight]), 1):
        np.testing.assert_allclose(model.predict(LINE, rounds), rbf(LINE, X) @ coefficients, atol=1e-10)
    limit = model.predict(LINE, math.inf)
    np.testing.assert_allclose(rbf(LINE, X) @ refitted(Y, 0.2, 3000 * [weight])[-1], limit, atol=1e-8)
    amplified = KernelSelfDistillation(gamma=80.0, ridge=min(effective_ridge(0.2, weight), 1e12), rounds=1).fit(X, Y)
    np.testing.assert_allclose(amplified.predict(LINE), limit, atol=1e-8)
    assert effective_ridge(0.2, weight) >= 0.2


def test_the_interval_of_convergent_weights_is_sharp() -> None:
    d = np.linalg.eigvalsh(rbf(X, X)).clip(0)
    low, high = convergent_weights(d, 0.2)
    assert low < 0
    assert high > 2
    for inside, outside in ((low + 1e-3, low - 1e-2), (high - 1e-3, high + 1e-2)):
        limit = rbf(X, X) @ np.linalg.solve(inside * rbf(X, X) + 0.2 * np.eye(11), inside * Y)
        error = [np.abs(rbf(X, X) @ f - limit).max() for f in refitted(Y, 0.2, 8000 * [inside])[::2000]]
        assert error[-1] < 0.1 * error[0]
        dual_filter(d, 0.2, inside, math.inf)
        with pytest.raises(UserError, match="diverges"):
            dual_filter(d, 0.2, outside, 3)
        grown = refitted(Y, 0.2, 8000 * [outside])
        assert np.abs(grown[-1]).max() > 1e3 * np.abs(grown[0]).max()


def test_zero_eigenvalues_are_safe() -> None:
    for weight in (0.0, 0.4, [0.4, 0.0]):
        assert np.isfinite(dual_filter([0.0, 1.0], 0.1, weight, 3)).all()
    twice = np.concatenate([X, X])  # a singular kernel matrix
    model = KernelSelfDistillation(**TOY, rounds=4, gt_weight=0.3).fit(twice, np.concatenate([Y, Y]))
    once = KernelSelfDistillation(gamma=80.0, ridge=0.1, rounds=4, gt_weight=0.3).fit(X, Y)
    np.testing.assert_allclose(model.predict(LINE), once.predict(LINE), atol=1e-8)


# --- shrinkage --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ridge", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("weight", [0.0, 0.05, 0.2, 0.7, 1.0])
def test_ratios_of_shrinkages_stay_in_their_bounds_and_reach_their_limit(weight: float, ridge: float) -> None:
    large, small = 3.0, 0.4
    a = np.array([large, small]) / (np.array([large, small]) + ridge)
    b, ratios = np.ones(2), []
    for rounds in range(1500):
        b = a * (weight + (1 - weight) * b) if rounds else a
        ratios.append(b[0] / b[1] if b[1] > 1e-280 else math.inf)  # no weight: b underflows
    limit, bound = limiting_ratio(large, small, ridge, weight), ratio_bound(large, small, ridge, weight)
    assert min(ratios) == ratios[0] == pytest.approx(a[0] / a[1])
    if weight == 0:
        assert limit == bound == math.inf
        assert ratios[-1] > 1e60
    else:
        assert ratios[-1] == pytest.approx(limit, rel=1e-6)
        assert max(ratios) <= bound + 1e-9
        assert max(ratios) > 0.4 * bound


def test_ratios_may_rise_above_their_limit() -> None:
    d = [3.0, 0.4]
    fourth = d * dual_filter(d, 0.5, 0.2, 4)
    assert fourth[0] / fourth[1] > 1.05 * limiting_ratio(*d, 0.5, 0.2)


# --- the best weight --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ridge", [0.01, 0.2, 3.0])
def test_weights_for_held_out_data_are_the_best_of_a_grid(ridge: float) -> None:
    rng = np.random.default_rng(0)
    points = rng.random((40, 1))
    truth = np.sin(2 * np.pi * points[:, 0]) + 0.1 * rng.standard_normal(40)
    free = KernelSelfDistillation(gamma=80.0, ridge=ridge, rounds=4, gt_weight="validation", clip=None)
    chosen = free.fit(X, Y, validation=(points, truth)).gt_weights_
    clipped = KernelSelfDistillation(gamma=80.0, ridge=ridge, rounds=4, gt_weight="validation")
    clipped.fit(X, Y, validation=(points, truth))
    assert isinstance(chosen, list)
    for done, weight in enumerate(chosen):
        grid = weight + np.arange(-50, 51) * 1e-3
        loss = [((rbf(points, X) @ refitted(Y, ridge, [*chosen[:done], w])[-1] - truth) ** 2).sum() for w in grid]
        assert np.argmin(loss) == 50
    plain = ((clipped.predict(points, 1) - truth) ** 2).sum()
    for rounds in (2, 3, 4):
        assert ((clipped.predict(points, rounds) - truth) ** 2).sum() <= plain + 1e-9
    assert all(0 <= w <= 1 for w in clipped.gt_weights_)


def test_a_mixture_of_equal_models_takes_the_ground_truth() -> None:
    same = np.ones(5)
    assert least_squares_mix(same, same, np.zeros(5)) == 1.0
    assert least_squares_mix(np.zeros(5), same, np.full(5, 3.0), clip=None) == pytest.approx(3.0)
    assert least_squares_mix(np.zeros(5), same, np.full(5, 3.0)) == 1.0


def test_the_weight_of_least_risk_is_the_best_of_many_draws() -> None:
    """The risk by hand, as the mean squared error over drawn noise."""
    rng = np.random.default_rng(1)
    signal, noise = np.sin(2 * np.pi * X[:, 0]), 0.3
    values, vectors = np.linalg.eigh(rbf(X, X))
    a = values / (values + 0.05)
    weight = risk_optimal_weight(a, a * a, (vectors.T @ signal) ** 2, noise, clip=None)
    draws = vectors.T @ (signal[:, None] + math.sqrt(noise) * rng.standard_normal((11, 40_000)))

    def risk(w: float) -> float:
        b = w * a + (1 - w) * a * a
        return float(((b[:, None] * draws - (vectors.T @ signal)[:, None]) ** 2).sum(0).mean())

    grid = weight + np.linspace(-2, 2, 41)
    assert abs(int(np.argmin([risk(w) for w in grid])) - 20) <= 1
    assert risk_optimal_weight(a, a * a, (vectors.T @ signal) ** 2, noise) == min(max(weight, 0.0), 1.0)


def test_weights_of_least_risk_help_against_noise() -> None:
    """Too little ridge for the noise: the rule must see that distilling is better than stopping."""
    rng = np.random.default_rng(2)
    points, gains = np.linspace(0, 1, 60)[:, None], []
    signal = np.sin(2 * np.pi * points[:, 0])
    for _ in range(10):
        y = signal + 0.5 * rng.standard_normal(60)
        model = KernelSelfDistillation(gamma=80.0, ridge=0.02, rounds=4, gt_weight="risk", noise_variance=0.25)
        model.fit(points, y)
        gains.append(np.mean((model.predict(points, 1) - signal) ** 2) / np.mean((model.predict(points) - signal) ** 2))
    assert np.mean(gains) > 1.05
    assert min(gains) > 0.95


# --- the estimator ----------------------------------------------------------------------------------------------------
def test_kernels_agree() -> None:
    first = KernelSelfDistillation(**TOY, rounds=3, gt_weight=0.3).fit(X, Y)
    given = KernelSelfDistillation("precomputed", ridge=0.2, rounds=3, gt_weight=0.3).fit(rbf(X, X), Y)
    own = KernelSelfDistillation(rbf, ridge=0.2, rounds=3, gt_weight=0.3).fit(X, Y)
    np.testing.assert_allclose(given.predict(rbf(LINE, X)), first.predict(LINE), atol=1e-10)
    np.testing.assert_allclose(own.predict(LINE), first.predict(LINE), atol=1e-10)
    line = KernelSelfDistillation("linear", ridge=2.0, rounds=1, center=True).fit(X, 3 * X[:, 0] + 5)
    slope = 3 * (X[:, 0] @ (X[:, 0] - X.mean())) / (X[:, 0] @ X[:, 0] + 2.0)  # ridge on the slope, means taken off
    np.testing.assert_allclose(line.predict(LINE), slope * LINE[:, 0] + 3 * X.mean() + 5, atol=1e-9)


def test_it_is_an_estimator_of_scikit_learn() -> None:
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV

    model = KernelSelfDistillation(gamma=80.0, gt_weight=0.25)
    assert clone(model).get_params() == model.get_params()
    search = GridSearchCV(model, {"ridge": [0.05, 500.0], "rounds": [1, 3]}, cv=3).fit(
        np.tile(X, (4, 1)), np.tile(Y, 4)
    )
    assert search.best_params_["ridge"] == 0.05
    fitted = KernelSelfDistillation(**TOY).fit(X, Y)
    left = ((fitted.predict(X) - Y) ** 2).sum()
    assert fitted.score(X, Y) == pytest.approx(1 - left / ((Y - Y.mean()) ** 2).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"rounds": 1.5}, "rounds must be a whole number"),
        ({"rounds": 3, "gt_weight": [0.5]}, "3 rounds take 2"),
        ({"rounds": math.inf, "gt_weight": [0.5]}, "infinitely many"),
        ({"gt_weight": "validation"}, "held-out"),
        ({"gt_weight": "risk"}, "variance of the noise"),
        ({"gt_weight": "best"}, "unknown gt_weight"),
        ({"kernel": "cosine"}, "unknown kernel"),
        ({"kernel": lambda a, b: -rbf(a, b)}, "semi-definite"),
        ({"kernel": "precomputed"}, "precomputed"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KernelSelfDistillation(**settings).fit(X, Y)


def test_bad_data_and_questions_are_refused() -> None:
    model = KernelSelfDistillation(rounds=2, gt_weight=[0.5])
    with pytest.raises(UserError, match="not fitted"):
        model.predict(X)
    for points, targets in ((X, Y[:-1]), (X[:, 0], Y), (X[:0], Y[:0])):
        with pytest.raises(UserError, match="do not fit"):
            model.fit(points, targets)
    with pytest.raises(UserError, match="not finite"):
        model.fit(X, np.where(Y > 1, np.nan, Y))
    with pytest.raises(UserError, match="round 3 has no weight"):
        model.fit(X, Y).predict(X, 3)
    with pytest.raises(ValueError, match="Invalid parameter 'lambda_'"):
        model.set_params(lambda_=1.0)


# --- deep networks ----------------------------------------------------------------------------------------------------
def labelled(n: int = 30, seed: int = 0, held_out: int = 20) -> ArrayData:
    """Points in the plane in three classes by angle, and held-out ones."""
    points = torch.randn(n + held_out, 2, generator=torch.Generator().manual_seed(seed))
    labels = ((torch.atan2(points[:, 1], points[:, 0]) / math.pi + 1) * 1.4999).long()
    rest = ArrayData(points[n:], {"label": labels[n:]})
    return ArrayData(points[:n], {"label": labels[:n]}, parts={"heldout": rest})


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def built(**options: Any) -> GTSelfDistill:
    method = GTSelfDistill(GTSelfDistill.Options(**options))
    method.build(network())
    method.prepare(labelled())
    return method


def trainer(folder: Path | None = None, resume: bool = False, callbacks: Any = (), **options: Any) -> Trainer:
    method = GTSelfDistill(GTSelfDistill.Options(**options))
    method.build(network())
    settings = {"steps": 12, "batch": 10, "checkpoint_every": 1, "log_every": 1, "check_freezing": True}
    return Trainer(method, labelled(), EngineConfig(**settings), folder, resume, callbacks=callbacks, show=False)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def draws(seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), slice(0, 10), 10)


def test_the_loss_has_the_gradient_of_one_mixed_target() -> None:
    method, batch = built(rounds=2, gt_weight=0.3, penalty=0.01), labelled().batch(0, 0, 10)
    method.draw, method.stage = draws(), Stage("round 2", kind="round", round=2)
    method.enter(method.stage, None, resumed=False)
    with torch.no_grad():
        for p in (*method.teacher.parameters(), *method.student.parameters()):
            p.add_(0.3)
    method.student.eval()
    sum(method.match(batch).values()).backward()
    found = [p.grad.clone() for p in method.student.parameters()]
    method.student.zero_grad()
    one_hot = torch.eye(3)[batch["cond"]["label"]]
    target = 0.3 * one_hot + 0.7 * method.teacher(batch["x"]).softmax(-1).detach()
    p = method.student(batch["x"]).softmax(-1)
    norms = sum(w.square().sum().sqrt() for w in method.student.parameters())
    (((p - target) ** 2).sum() / 30 + 0.01 * norms).backward()
    for mine, w in zip(found, method.student.parameters(), strict=True):
        torch.testing.assert_close(mine, w.grad)
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_first_round_knows_labels_only() -> None:
    method, batch = built(rounds=2, gt_weight=0.3, penalty=0.0), labelled().batch(0, 0, 10)
    method.draw, method.stage = draws(), Stage("round 1", kind="round", round=1)
    method.enter(method.stage, None, resumed=False)
    terms = method.match(batch)
    assert set(terms) == {"truth"}
    p = method.student(batch["x"]).softmax(-1)
    expected = ((p - torch.eye(3)[batch["cond"]["label"]]) ** 2).mean()
    torch.testing.assert_close(terms["truth"], expected)


@pytest.mark.parametrize("start", ["random", "given", "last"])
def test_a_round_makes_the_student_the_teacher_and_starts_as_told(start: str) -> None:
    method = built(rounds=3, gt_weight=0.6, start=start)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    trained = copy.deepcopy(method.student)
    method.draw = draws()
    method.enter(Stage("round 2", kind="round", round=2), None, resumed=False)
    assert same(method.teacher, trained)
    assert not method.teacher.training
    assert float(method.weight) == pytest.approx(0.6)
    assert same(method.student, trained) == (start == "last")
    assert same(method.student, network()) == (start == "given")
    fresh = copy.deepcopy(method.student)
    method.enter(
        Stage("round 3", kind="round", round=3), None, resumed=True
    )  # a resumed run has all this from its checkpoint
    assert same(method.student, fresh)
    assert same(method.teacher, trained)


def test_a_round_goes_on_from_the_last_rounds_student_not_from_the_probe() -> None:
    method = built(rounds=2, gt_weight="estimate", start="last")
    method.draw = draws()
    after: dict[str, nn.Module] = {}
    for name, kind in (("of round 1", "probe"), ("of the probe", "round")):
        with torch.no_grad():
            for p in method.student.parameters():
                p.add_(1.0)
        after[name] = copy.deepcopy(method.student)
        method.enter(Stage(f"{kind} 2", kind=kind, round=2), None, resumed=False)
    assert same(method.teacher, after["of round 1"])
    assert same(method.student, after["of round 1"])
    assert not same(method.student, after["of the probe"])


def test_rounds_and_probes_are_stages() -> None:
    assert [stage.name for stage in built(rounds=3).stages()] == ["round 1", "round 2", "round 3"]
    names = [stage.name for stage in built(rounds=3, gt_weight="estimate").stages()]
    assert names == ["round 1", "probe 2", "round 2", "probe 3", "round 3"]


def test_the_estimated_weight_is_the_best_mixture_of_two_students() -> None:
    weights: dict[str, float] = {}
    first: list[torch.Tensor] = []

    def watch(run: Trainer, done: int) -> None:
        method: Any = run.method
        if done == 4:  # the end of round 1
            first.append(method.heldout_probabilities().detach())
        if done == 8:  # the end of the probe
            held_out, grid = labelled().parts["heldout"], torch.linspace(0, 1, 1001)
            probe, truth = method.heldout_probabilities().detach(), torch.eye(3)[held_out.labels]
            losses = [float(((w * first[0] + (1 - w) * probe - truth) ** 2).sum()) for w in grid]
            weights["grid"] = float(grid[int(np.argmin(losses))])
            weights["probe"] = float(method.weight)
        weights["last"] = float(method.weight)

    trainer(rounds=2, gt_weight="estimate", callbacks=[watch]).fit()
    assert weights["probe"] == 0.0
    assert weights["last"] == pytest.approx(weights["grid"], abs=6e-4)
    assert len(first) == 1


def test_each_round_has_a_new_optimizer() -> None:
    steps = []

    def watch(run: Trainer, done: int) -> None:
        state = run.players["match"].optimizer.state
        steps.append(int(next(iter(state.values()))["step"]))

    trainer(rounds=3, callbacks=[watch]).fit()
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize("at", [4, 6, 9])
def test_a_resumed_run_ends_with_the_same_weights(at: int, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(run: Trainer, done: int) -> None:
        if done == at:
            raise Stop

    straight = trainer(tmp_path / "straight", rounds=2, gt_weight="estimate")
    straight.fit()
    with pytest.raises(Stop):
        trainer(tmp_path / "run", rounds=2, gt_weight="estimate", callbacks=[stop]).fit()
    resumed = trainer(tmp_path / "run", resume=True, rounds=2, gt_weight="estimate")
    resumed.fit()
    assert same(resumed.method, straight.method)


def test_an_estimate_needs_held_out_data() -> None:
    method = GTSelfDistill(GTSelfDistill.Options(gt_weight="estimate"))
    method.build(network())
    with pytest.raises(UserError, match="held-out data"):
        method.prepare(ArrayData(torch.zeros(4, 2), {"label": torch.zeros(4, dtype=torch.long)}))
    with pytest.raises(UserError, match=r"options\.gt_weight"):
        Recipe.load("gt-self-distill", ["options.gt_weight=1.5"])
