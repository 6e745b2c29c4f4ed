"""Direct preference optimisation on a loss instead of a likelihood (Diffusion-DPO, arXiv 2311.12908, eq. 14; LightGen,
arXiv 2503.08619, eq. 7).

For any student whose loss on one sample is minus a log-likelihood up to a constant factor: a denoiser's squared error,
a flow-matching loss, the masked tokens' denoising error. The four losses of a pair must share all that is random
(times, noise, masks; no dropout), or their differences are noise: at beta 5000 a jitter of 1e-3 moves the logit by 2.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

HEALTH = {
    "preference_accuracy": "share of pairs with L_theta(w) - L_ref(w) < L_theta(l) - L_ref(l); ties count half",
    "winner_drift": "mean of L_theta(w) - L_ref(w): above 0 the student gets worse at winners too; stop, or lower the "
    "learning rate",
    "loser_drift": "mean of L_theta(l) - L_ref(l)",
    "margin": "mean of -beta/2 Delta, the logit: 1 to 3 after some hundred steps where beta fits",
}
"""What :func:`dpo_loss` tells of a step beside its terms."""


class Preference(NamedTuple):
    """What to minimise, ``dpo`` and, with an anchor, ``anchor``; and the numbers of ``HEALTH``. All scalars."""

    terms: dict[str, Tensor]
    health: dict[str, Tensor]


def dpo_loss(
    policy_win: Tensor, policy_lose: Tensor, ref_win: Tensor, ref_lose: Tensor, beta: float, anchor: float = 0.0
) -> Preference:
    """``-log sigmoid(-beta/2 Delta)``, averaged over pairs, with ``Delta = [L_theta(w) - L_ref(w)] - [L_theta(l) -
    L_ref(l)]``.

    All losses are per sample, ``[B]``; the references' carry no gradient. anchor: weight gamma of an additional ``gamma
    L_theta(w)``, which keeps the student from becoming worse at both as long as the loser's loss grows faster; 0 is the
    papers' loss.
    """
    win, lose = policy_win - ref_win.detach(), policy_lose - ref_lose.detach()
    delta = win - lose
    logit = -0.5 * beta * delta
    terms = {"dpo": -logsigmoid(logit).mean()}
    if anchor:
        terms["anchor"] = anchor * policy_win.mean()
    right = (delta < 0).float() + 0.5 * (delta == 0).float()
    health = {
        "preference_accuracy": right.mean(),
        "winner_drift": win.detach().mean(),
        "loser_drift": lose.detach().mean(),
        "margin": logit.detach().mean(),
    }
    return Preference(terms, health)


def transition_loss(z: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """``mean (z - mean)^2 / std^2`` over the elements of each sample, ``[B]``: -2 times the log-density of ``z`` under
    ``N(mean, std^2)``, per element and up to a constant. In :func:`dpo_loss` half its differences are log-ratios of
    transitions of a sampler that noises its own guess anew, ``mean = alpha x0`` (arXiv 2511.20549)."""
    return ((z - mean) / std).square().flatten(1).mean(1)


def best_and_worst(candidates: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``K`` candidates ``[K, B, ...]`` with scores ``[K, B]``, row by row the one of the highest score and the one
    of the lowest, ``[B, ...]`` each."""
    rows = torch.arange(scores.shape[1], device=scores.device)
    return candidates[scores.argmax(0), rows], candidates[scores.argmin(0), rows]
