"""Self-distillation with weighted ground truth for kernel ridge regression, where every round is exact (arXiv
2102.13088).

Round t minimises  alpha_t/2 |f(X) - Y|^2 + (1 - alpha_t)/2 |f(X) - Y^(t-1)|^2 + ridge/2 |f|^2,  Y^(0) = Y.
With K = V diag(d) V^T the solution is f^(t)(x) = k(x, X) V (g^(t) * V^T Y); on the training points it shrinks the
i-th component of Y by b^(t) = d g^(t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.metrics.pairwise import pairwise_kernels

from stillroom.errors import UserError
from stillroom.losses.soft_labels import least_squares_mix

Floats = NDArray[np.float64]
Kernel = Literal["rbf", "linear", "precomputed"] | Callable[[Floats, Floats], Floats]


def dual_filter(eigenvalues: ArrayLike, ridge: float, gt_weight: float | Sequence[float], rounds: float) -> Floats:
    """``g`` of a round, ``[n]``: what multiplies the components ``V^T Y`` of the targets.

    eigenvalues: of the kernel matrix, ``[n]``, none negative. gt_weight: the same for every round, or one for each of
    the rounds 2 to ``rounds`` (round 1 has none). rounds: from 1 on; ``math.inf`` is the limit, for a constant weight.
    Nothing is divided by an eigenvalue, so zeros are safe. Raises UserError for a constant weight whose rounds diverge.
    """
    d = np.asarray(eigenvalues, dtype=np.float64)
    a = d / (d + ridge)
    if isinstance(gt_weight, Sequence):
        # 1. Any sequence: eta(2, t) a^(t-1) + sum_i alpha_i eta(i+1, t) a^(t-i), where eta(i, t) is the product of
        #    1 - alpha_j over j = i .. t.
        alphas = np.asarray(gt_weight, dtype=np.float64)
        eta = np.append(np.cumprod((1 - alphas)[::-1])[::-1], 1.0)
        powers = a ** np.arange(len(alphas), -1, -1)[:, None]
        return (eta[0] * powers[0] + (alphas * eta[1:]) @ powers[1:]) / (d + ridge)
    low, high = convergent_weights(d, ridge)
    if not low < gt_weight < high:
        raise UserError(
            f"a constant ground-truth weight of {gt_weight:g} diverges here",
            cure=f"choose one between 0 and {high:.3g}",
        )
    # 2. The limit of a constant weight: the first round's problem with the ridge divided by the weight.
    limit = gt_weight / (gt_weight * d + ridge)
    if math.isinf(rounds):
        return limit
    # 3. A constant weight: the way to the limit is geometric, with r = (1 - alpha) a.
    return limit + ((1 - gt_weight) * a) ** (int(rounds) - 1) * (1 / (d + ridge) - limit)


def convergent_weights(eigenvalues: ArrayLike, ridge: float) -> tuple[float, float]:
    """The open interval of constant weights whose rounds converge: ``|(1 - alpha) a| < 1`` for the largest eigenvalue.
    It holds [0, 1] for every ridge above 0."""
    slack = ridge / max(float(np.max(eigenvalues)), np.finfo(np.float64).tiny)
    return -slack, 2 + slack


def effective_ridge(ridge: float, gt_weight: float) -> float:
    """The ridge whose plain fit is the limit of infinitely many rounds: amplified, never below ``ridge``. Without
    ground truth it is infinite, and the limit is the zero function."""
    return ridge / gt_weight if gt_weight else math.inf


def limiting_ratio(larger: float, smaller: float, ridge: float, gt_weight: float) -> float:
    """What the ratio of the shrinkages of two eigenvalues tends to over the rounds. Without ground truth it has no
    limit: the smaller component vanishes beside the larger one."""
    if gt_weight == 0:
        return math.inf
    return larger / smaller * (gt_weight * smaller + ridge) / (gt_weight * larger + ridge)


def ratio_bound(larger: float, smaller: float, ridge: float, gt_weight: float) -> float:
    """What that ratio never exceeds, for a constant weight in (0, 1]. On its way to the limit it may rise above it,
    because small components settle sooner; it is least, ``a_k / a_l``, in round 1.

    Derived here: ``b_k <= a_k`` and ``b_l >= b_l^(inf)`` in ``b^(t) = a (alpha + (1 - alpha) b^(t-1))``.
    """
    if gt_weight == 0:
        return math.inf
    a, b = larger / (larger + ridge), smaller / (smaller + ridge)
    settled = gt_weight * smaller / (gt_weight * smaller + ridge)
    return a / b * (gt_weight + (1 - gt_weight) * a) / (gt_weight + (1 - gt_weight) * settled)


def risk_optimal_weight(
    first: Floats, taught: Floats, signal: Floats, noise: float, clip: tuple[float, float] | None = (0.0, 1.0)
) -> float:
    """The ground-truth weight of least risk on the training points, when the targets are a signal plus noise of known
    variance.

    first, taught: shrinkages ``[n]`` of the first round and of the fit to the last round's outputs. signal: squared
    components of the signal, summed over the outputs, ``[n]``. noise: variance, likewise summed.
    The risk of shrinkages ``b`` is ``sum (1 - b)^2 signal + noise sum b^2`` with ``b = w first + (1 - w) taught``.
    """
    change = first - taught
    curvature = float(((signal + noise) * change**2).sum())
    if curvature < 1e-12:
        return 1.0
    weight = -float((((taught - 1) * signal + noise * taught) * change).sum()) / curvature
    return weight if clip is None else min(max(weight, clip[0]), clip[1])


class KernelSelfDistillation(RegressorMixin, BaseEstimator):
    """Kernel ridge regression refitted to a mix of the targets and its own last outputs, with scikit-learn's interface.

    One eigendecomposition serves all rounds: any round, the limit too, predicts at the cost of one matrix product.

    kernel: ``rbf``, ``linear``, ``precomputed``, or a function of ``[n, p]`` and ``[m, p]`` to ``[n, m]``. gamma: of
    ``rbf``, ``exp(-gamma |x - y|^2)``; None is 1 / features. ridge: factor of ``|f|^2`` beside a SUM of squares, both
    halved; where a loss is a mean over n points, n times its ridge. rounds: fits in all, so 1 is plain kernel ridge
    regression; ``math.inf`` is the limit. gt_weight: of the targets (the last outputs get the rest): a number, one for
    each of the rounds 2 to ``rounds``, ``"validation"`` (the best on held-out data, round by round), or ``"risk"``
    (the best for targets with noise of variance ``noise_variance``). clip: interval of chosen weights; None: free.
    center: whether the mean of the targets is taken off first, for kernels without a constant.

    After ``fit``: ``eigenvalues_ [n]``, ``eigenvectors_ [n, n]``, ``components_ [n, outputs]`` (the targets in that
    basis), ``gt_weights_`` (a number, or one per round from the second).
    """

    def __init__(
        self,
        kernel: Kernel = "rbf",
        gamma: float | None = None,
        ridge: float = 1.0,
        rounds: float = 2,
        gt_weight: float | Sequence[float] | Literal["validation", "risk"] = 0.5,
        noise_variance: float | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
        center: bool = False,
    ) -> None:
        self.kernel, self.gamma, self.ridge, self.rounds = kernel, gamma, ridge, rounds
        self.gt_weight, self.noise_variance, self.clip, self.center = gt_weight, noise_variance, clip, center

    # --- scikit-learn's interface ---------------------------------------------------------------------------------
    def __sklearn_tags__(self) -> Any:
        tags: Any = super().__sklearn_tags__()  # pyrefly: ignore  # its stubs lack it
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def fit(
        self, X: ArrayLike, y: ArrayLike, validation: tuple[ArrayLike, ArrayLike] | None = None
    ) -> KernelSelfDistillation:
        """Fit to points ``[n, p]`` (if precomputed: the kernel matrix ``[n, n]``) and targets ``[n]`` or
        ``[n, outputs]``.

        validation: held-out points and targets, for ``gt_weight="validation"``; never the training points, on which
        the best weight tends to 1. Raises UserError for settings or data that do not fit.
        """
        points, targets = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
        self._check(points, targets, validation)
        self._flat = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        self.X_fit_, self.n_features_in_ = points, points.shape[1]
        self.offset_ = targets.mean(0) if self.center else np.zeros(targets.shape[1])
        # 4. One eigendecomposition serves every round; rounding may leave eigenvalues just below 0.
        values, self.eigenvectors_ = np.linalg.eigh(self._kernel(points))
        if values[0] < -1e-8 * max(values[-1], 1.0):
            raise UserError("the kernel is not positive semi-definite", cure="choose a kernel that is")
        self.eigenvalues_ = np.clip(values, 0.0, None)
        self.components_ = self.eigenvectors_.T @ (targets - self.offset_)
        self.gt_weights_ = self._weights(validation)
        return self

    def predict(self, X: ArrayLike, rounds: float | None = None) -> Floats:
        """Predictions ``[m]`` or ``[m, outputs]`` for points ``[m, p]`` (``[m, n]`` if precomputed), after ``rounds``
        rounds (default: the estimator's own)."""
        filtered = self.dual_filter(rounds)[:, None] * self.components_
        points = np.asarray(X, dtype=np.float64)
        predictions = self._kernel(points) @ (self.eigenvectors_ @ filtered) + self.offset_
        return predictions[:, 0] if self._flat else predictions

    # --- what the rounds do ---------------------------------------------------------------------------------------
    def dual_filter(self, rounds: float | None = None) -> Floats:
        """``g`` after ``rounds`` rounds, ``[n]``. Raises UserError before ``fit`` and for rounds without a weight."""
        if not hasattr(self, "gt_weights_"):
            raise UserError("this estimator is not fitted", cure="call fit first")
        rounds, weights = self.rounds if rounds is None else _checked_rounds(rounds), self.gt_weights_
        if isinstance(weights, list):
            if rounds > len(weights) + 1:
                raise UserError(
                    f"round {rounds} has no weight", cure=f"there are {len(weights) + 1} rounds, or give one number"
                )
            weights = weights[: int(rounds) - 1]
        return dual_filter(self.eigenvalues_, self.ridge, weights, rounds)

    def shrinkage(self, rounds: float | None = None) -> Floats:
        """``b = d g``, ``[n]``, in the order of ``eigenvalues_``: what is left of each component of the targets."""
        return self.eigenvalues_ * self.dual_filter(rounds)

    def _weights(self, validation: tuple[ArrayLike, ArrayLike] | None) -> float | list[float]:
        given, weights = self.gt_weight, list[float]()
        if not isinstance(given, str):
            return [float(w) for w in given] if isinstance(given, Sequence) else float(given)
        if validation is not None:
            held_out = np.asarray(validation[1], dtype=np.float64).reshape(-1, self.components_.shape[1]) - self.offset_
            basis = self._kernel(np.asarray(validation[0], dtype=np.float64)) @ self.eigenvectors_
            best = partial(self._best_on, basis, held_out)
        else:
            best = self._least_risk
        d = self.eigenvalues_
        first = 1 / (d + self.ridge)
        for done in range(1, int(self.rounds)):
            last = d * dual_filter(d, self.ridge, weights, done)
            weights.append(best(last * first, first))  # the fits to the last outputs alone, and to the targets alone
        return weights

    def _best_on(self, basis: Floats, held_out: Floats, taught: Floats, truth: Floats) -> float:
        # 5. A round is linear in its weight, alpha f_truth + (1 - alpha) f_taught: least squares on held-out data.
        by_teacher, by_truth = (basis @ (g[:, None] * self.components_) for g in (taught, truth))
        return least_squares_mix(by_teacher, by_truth, held_out, self.clip)

    def _least_risk(self, taught: Floats, truth: Floats) -> float:
        # 6. Or the least risk, with the signal's squared components estimated from the noisy ones.
        noise, d = float(self.noise_variance or 0.0), self.eigenvalues_
        signal = np.clip(self.components_**2 - noise, 0.0, None).sum(1)
        return risk_optimal_weight(d * truth, d * taught, signal, noise * self.components_.shape[1], self.clip)

    def _kernel(self, points: Floats) -> Floats:
        """``k(points, X)``."""
        if self.kernel == "precomputed":
            if points.ndim != 2 or points.shape[1] != len(self.X_fit_):
                raise UserError(
                    f"a precomputed kernel has {len(self.X_fit_)} columns, got shape {points.shape}",
                    cure="give k(points, training points)",
                )
            return points
        if callable(self.kernel):
            return np.asarray(self.kernel(points, self.X_fit_), dtype=np.float64)
        return pairwise_kernels(points, self.X_fit_, metric=self.kernel, filter_params=True, gamma=self.gamma)

    def _check(self, points: Floats, targets: Floats, validation: Any) -> None:
        if points.ndim != 2 or targets.ndim not in (1, 2) or len(points) != len(targets) or not len(points):
            raise UserError(
                f"points {points.shape} and targets {targets.shape} do not fit", cure="give one target a row"
            )
        if not (np.isfinite(points).all() and np.isfinite(targets).all()):
            raise UserError("points or targets are not finite", cure="remove rows with NaN or infinities")
        if not callable(self.kernel) and self.kernel not in ("rbf", "linear", "precomputed"):
            raise UserError(f"unknown kernel {self.kernel!r}", cure="choose rbf, linear, precomputed or a function")
        if not self.ridge > 0:
            raise UserError(f"ridge must be positive, got {self.ridge}", cure="for example 1.0")
        rounds = _checked_rounds(self.rounds)
        weights = self.gt_weight
        if isinstance(weights, str) and weights not in ("validation", "risk"):
            raise UserError(f"unknown gt_weight {weights!r}", cure="choose a number, validation or risk")
        if isinstance(weights, Sequence):
            if math.isinf(rounds):
                raise UserError("only a constant gt_weight has infinitely many rounds", cure="give one number")
            if not isinstance(weights, str) and len(weights) != rounds - 1:
                raise UserError(
                    f"{rounds} rounds take {rounds - 1:g} ground-truth weights, got {len(weights)}",
                    cure="the first round has none",
                )
        if (weights == "validation") != (validation is not None):
            raise UserError(
                "held-out data and gt_weight 'validation' belong together",
                cure="KernelSelfDistillation(gt_weight='validation').fit(X, y, validation=(X_val, y_val))",
            )
        if weights == "risk" and not (self.noise_variance or 0) > 0:
            raise UserError("gt_weight 'risk' needs the variance of the noise", cure="set noise_variance")


def _checked_rounds(rounds: float) -> float:
    if not rounds >= 1 or (math.isfinite(rounds) and rounds != int(rounds)):
        raise UserError(f"rounds must be a whole number from 1 on or infinite, got {rounds}", cure="for example 5")
    return rounds
