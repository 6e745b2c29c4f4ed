"""Layer maps: which teacher layer each student layer learns from. Pure functions of depths or costs.

Layers count from 0. A map of a teacher of M and a student of N layers is a tuple of N teacher layers, or, where a
student layer may learn from several, a matrix ``m [M, N]`` of weights for ``sum_ij m_ij loss(teacher i, student j)``
(arXiv 2109.11105).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import UserError, nearest


def _depths(teacher: int, student: int) -> None:
    if not 1 <= student <= teacher:
        raise UserError(
            f"a student of {student} layers has no layer map to a teacher of {teacher}",
            cure="the student needs at least one layer and at most as many as the teacher",
        )


def uniform(teacher: int, student: int) -> tuple[int, ...]:
    """Evenly spread, last to last: student layer j learns from teacher layer ``round((j + 1) M / N) - 1``, halves
    upwards (arXiv 1909.10351). 12 and 5 layers: ``(1, 4, 6, 9, 11)``."""
    _depths(teacher, student)
    return tuple((2 * (j + 1) * teacher + student) // (2 * student) - 1 for j in range(student))


def skip(teacher: int, student: int) -> tuple[int, ...]:
    """Every (M / N)-th layer, last to last: ``(j + 1) M / N - 1`` (arXiv 1908.09355). 12 and 4: ``(2, 5, 8, 11)``.

    Raises UserError where N does not divide M.
    """
    _depths(teacher, student)
    if teacher % student:
        raise UserError(
            f"skip needs a teacher depth that is a multiple of the student's, not {teacher} and {student}",
            cure="use the uniform map, which rounds",
        )
    return uniform(teacher, student)


def last(teacher: int, student: int) -> tuple[int, ...]:
    """The last N layers: ``M - N + j`` (arXiv 1908.09355). 12 and 4: ``(8, 9, 10, 11)``."""
    _depths(teacher, student)
    return tuple(range(teacher - student, teacher))


def at_fraction(fraction: float, *depths: int) -> tuple[int, ...]:
    """The layer that ends the given fraction of each network's depth, rounded, at least the first: 0.75 of 24 and 12
    layers is ``(17, 8)``, DMAE's pair (arXiv 2208.12256)."""
    if not 0 < fraction <= 1:
        raise UserError(f"a fraction of the depth lies in (0, 1], not {fraction}", cure="0.75, for example")
    return tuple(max(int(fraction * depth + 0.5), 1) - 1 for depth in depths)


LAYER_MAPS: dict[str, Callable[[int, int], tuple[int, ...]]] = {"uniform": uniform, "skip": skip, "last": last}
"""The maps that follow from the depths alone; :func:`emd` follows from costs."""


def layer_map(kind: str, teacher: int, student: int) -> tuple[int, ...]:
    """The teacher layer of each student layer, by the map's name."""
    if kind not in LAYER_MAPS:
        raise UserError(
            f"unknown layer map {kind!r}{nearest(kind, LAYER_MAPS)}",
            cure=f"one of: {', '.join(LAYER_MAPS)}; emd is a function of the costs",
        )
    return LAYER_MAPS[kind](teacher, student)


def as_weights(layers: tuple[int, ...], teacher: int) -> Tensor:
    """A map as weights ``[M, N]``, float32: one 1 in each column. They sum to N; those of :func:`emd` sum to 1."""
    weights = torch.zeros(teacher, len(layers))
    weights[list(layers), range(len(layers))] = 1.0
    return weights


def emd(cost: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """The optimal transport plan ``[M, N]`` for costs ``[M, N]`` between teacher layers (rows) and student layers
    (columns): the map of BERT-EMD (arXiv 2010.06133), solved exactly.

    rows, columns: the weights of the layers, each of sum 1; default uniform, 1/M and 1/N.
    Returns the plan in the dtype and on the device of ``cost``, without gradients: its rows sum to ``rows``, its
    columns to ``columns``, and no other such plan has a smaller ``sum(plan * cost)``. With gradients the plan would
    collapse onto the cheapest pair.
    """
    from scipy.optimize import linprog

    if cost.ndim != 2 or not bool(torch.isfinite(cost).all()):
        raise UserError(
            f"costs between layers are a finite matrix [M, N], not {tuple(cost.shape)}",
            cure="stack one loss for each pair of a teacher and a student layer",
        )
    m, n = cost.shape
    prices = cost.detach().double().cpu()
    prices = prices / prices.abs().max().clamp(min=1e-300)  # only ratios matter; the solver's tolerances are absolute
    sums = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    wanted = torch.cat([_marginal(rows, m, "rows"), _marginal(columns, n, "columns")])
    exact = {"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10}
    found = linprog(prices.flatten(), A_eq=sums, b_eq=wanted, method="highs-ds", options=exact)
    return torch.from_numpy(found.x).reshape(m, n).to(cost)


def _marginal(given: Tensor | None, count: int, name: str) -> Tensor:
    if given is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    weights = given.detach().double().cpu().clone()
    if weights.shape != (count,) or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-4:
        raise UserError(
            f"{name} are {count} weights of sum 1, none negative; got shape {tuple(weights.shape)}, sum "
            f"{float(weights.sum()):.4g}",
            cure="normalise them: w / w.sum()",
        )
    return weights / weights.sum()


def mapped_loss(weights: Tensor, losses: Tensor) -> Tensor:
    """``sum_ij m_ij loss_ij`` of weights and losses ``[M, N]``; no gradient reaches the weights (arXiv 2109.11105)."""
    return (weights.detach().to(losses) * losses).sum()
