"""A bound on the mutual information of two representations, from a critic's scores in a batch: MI-alpha of Distiller
(arXiv 2109.11105), the interpolated bound of Poole et al. (arXiv 1905.06922, section 2.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillroom.checks import require
from stillroom.errors import UserError


def i_alpha(scores: Tensor, log_baseline: Tensor, alpha: float, negatives: Tensor | None = None) -> Tensor:
    """The bound ``I_alpha`` in nats, a scalar to maximise.

    scores: ``[B, B]``, ``s_ij = f(x_i, y_j)``; the diagonal holds the true pairs. log_baseline: ``b_j = log q(y_j)``,
    ``[B]``. alpha in [0, 1]: 1 is InfoNCE (low variance, at most log B), 0 is TUBA (unbiased at the best critic, high
    variance); between, at most ``1 + log(B / alpha)``.
    negatives: bool ``[B, B]``, True where pair (i, j) may count as a negative, to take out duplicates; None: all. Each
    column needs one off the diagonal.

        D_j(Z) = logaddexp(log alpha + log Z_j, log(1 - alpha) + b_j)
        I_alpha = 1 + mean_j [s_jj - D_j(mean_i exp s_ij)] - mean_j exp[log mean_(i != j) exp s_ij - D_j(the same)]

    The positive term's mean holds the true pair, the negative term's leaves it out. Computed in log space; with
    alpha = 0 the last exponent is clamped at 10.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha of the mutual-information bound lies in [0, 1], not {alpha}", cure="0.1, for example")
    size = len(scores)
    if scores.shape != (size, size) or log_baseline.shape != (size,) or size < 2:
        raise UserError(
            f"scores of shape {tuple(scores.shape)} and a baseline of shape {tuple(log_baseline.shape)} do not fit",
            cure="a batch of B >= 2 pairs has scores [B, B] and a baseline [B]",
        )
    s, b = scores.float(), log_baseline.float()
    true = torch.eye(size, dtype=torch.bool, device=s.device)
    off = ~true if negatives is None else negatives.to(s.device).bool() & ~true
    if negatives is not None:  # without any taken out, two pairs are enough
        problem = UserError("an example has no negative left", cure="use larger batches or take out fewer pairs")
        require(off.any(0).all(), problem)
    log_mean_off = _log_mean_exp(s, off)
    positive = s.diagonal() - _partition(_log_mean_exp(s, off | true), b, alpha)
    exponent = log_mean_off - _partition(log_mean_off, b, alpha)
    return 1 + positive.mean() - (exponent.clamp(max=10.0) if alpha == 0 else exponent).exp().mean()


def _log_mean_exp(scores: Tensor, counted: Tensor) -> Tensor:
    """Over i, for each j."""
    return scores.masked_fill(~counted, -torch.inf).logsumexp(0) - counted.sum(0).log()


def _partition(log_mean: Tensor, log_baseline: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        return log_mean
    if alpha == 0:
        return log_baseline
    return torch.logaddexp(math.log(alpha) + log_mean, math.log(1 - alpha) + log_baseline)
