"""Distances between a student's and a teacher's features.

Features are tokens ``[B, N, D]`` or vectors ``[B, D]``, of equal shape: a student of another width goes through a
projector first (:mod:`stillroom.networks.projectors`). ``keep``: bool ``[B, N]`` (``[B]`` for vectors), True where a
token counts (transformers' ``attention_mask``); None: all. Reductions are those of :mod:`stillroom.losses.soft_labels`,
over tokens; means over channels are taken first, sums where a formula says so. No gradient reaches the teacher;
everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, normalize
from torch.nn.functional import smooth_l1_loss as torch_smooth_l1

from stillroom.errors import UserError, nearest
from stillroom.losses.soft_labels import Reduction, reduce

Normalise = Literal["none", "l2", "layer"]


def normalised(features: Tensor, how: Normalise) -> Tensor:
    """``l2``: each token to length 1. ``layer``: each token to mean 0 and variance 1 over its channels (eps 1e-6), a
    layer norm without weights (the whitened target of arXiv 2302.14771). ``none``: as it is."""
    if how == "none":
        return features
    if how == "l2":
        return normalize(features, dim=-1)
    if how == "layer":
        return layer_norm(features, features.shape[-1:], eps=1e-6)
    raise UserError(f"unknown normalisation {how!r}", cure="one of: none, l2, layer")


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise UserError(
            f"student features have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            cure="project the student to the teacher's width, and give both the same tokens",
        )
    return student.float(), teacher.detach().float()


def mse(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean", keep: Tensor | None = None) -> Tensor:
    """Mean over channels of ``(s - t)^2`` (FitNets, arXiv 1412.6550)."""
    s, t = _pair(student, teacher)
    return reduce((s - t).square().mean(-1), reduction, keep)


def l1(
    student: Tensor,
    teacher: Tensor,
    *,
    normalise: Normalise = "none",
    reduction: Reduction = "mean",
    keep: Tensor | None = None,
) -> Tensor:
    """Mean over channels of ``|n(s) - n(t)|``. DMAE's paper (arXiv 2208.12256) has n = identity, its code ``l2``."""
    s, t = _pair(student, teacher)
    return reduce((normalised(s, normalise) - normalised(t, normalise)).abs().mean(-1), reduction, keep)


def l2(
    student: Tensor,
    teacher: Tensor,
    *,
    normalise: Normalise = "none",
    reduction: Reduction = "mean",
    keep: Tensor | None = None,
) -> Tensor:
    """Squared length ``|n(s) - n(t)|^2``, summed over channels; with ``l2`` it is PKD's loss (arXiv 1908.09355) and
    equals ``2 - 2 cos(s, t)``."""
    s, t = _pair(student, teacher)
    return reduce((normalised(s, normalise) - normalised(t, normalise)).square().sum(-1), reduction, keep)


def smooth_l1(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    target: Normalise = "none",
    reduction: Reduction = "mean",
    keep: Tensor | None = None,
) -> Tensor:
    """Mean over channels of ``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``; ``d = s - n(t)``: only
    the target is normalised. G2SD (arXiv 2302.14771): beta 2, target ``layer``."""
    s, t = _pair(student, teacher)
    values = torch_smooth_l1(s, normalised(t, target), beta=beta, reduction="none")
    return reduce(values.mean(-1), reduction, keep)


def cosine(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean", keep: Tensor | None = None) -> Tensor:
    """``1 - cos(s, t)`` of each token, in [0, 2]."""
    s, t = _pair(student, teacher)
    return reduce(1 - cosine_similarity(s, t, dim=-1), reduction, keep)


def cka_loss(student: Tensor, teacher: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """``1 - CKA``, linear (arXiv 1905.00414), of all tokens that count as one set of examples; a scalar in [0, 1].

    ``CKA = |S' T|_F^2 / (|S' S|_F |T' T|_F)`` of centred features. Widths may differ; rotations and scale of either
    side do not matter. Needs at least two tokens.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise UserError(
            f"student features have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            cure="CKA compares widths that differ, but needs the same tokens",
        )
    s, t = student.float().flatten(0, -2), teacher.detach().float().flatten(0, -2)
    weight = torch.ones(len(s), 1, device=s.device) if keep is None else keep.flatten()[:, None].float()
    s, t = (weight * (x - (weight * x).sum(0) / weight.sum().clamp(min=1)) for x in (s, t))
    scale = (s.T @ s).norm() * (t.T @ t).norm()
    return 1 - (s.T @ t).square().sum() / scale.clamp(min=1e-12)


DISTANCES: dict[str, Callable[..., Tensor]] = {
    "mse": mse, "l1": l1, "l2": l2, "smooth_l1": smooth_l1, "cosine": cosine, "cka": cka_loss
}  # fmt: skip


def get_distance(name: str) -> Callable[..., Tensor]:
    """A distance by name, as recipes have it."""
    if name not in DISTANCES:
        raise UserError(
            f"unknown feature distance {name!r}{nearest(name, DISTANCES)}", cure=f"one of: {', '.join(DISTANCES)}"
        )
    return DISTANCES[name]


# --- attention and relations ------------------------------------------------------------------------------------------
def relation(first: Tensor, second: Tensor) -> Tensor:
    """Scaled products ``a b' / sqrt(d)`` ``[B, heads, N, N]`` of heads ``[B, heads, N, d]``: queries with keys are the
    attention scores before their softmax; values with values are MiniLM's value relation (arXiv 2002.10957)."""
    return first.float() @ second.float().transpose(-1, -2) * first.shape[-1] ** -0.5


def gather_relation(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores ``[B, heads, N, N]`` at the kept tokens ``[B, K]`` (indices) on both axes: ``[B, heads, K, K]``. Gather
    before the softmax, or rows no longer sum to 1 (arXiv 2306.15876)."""
    b, heads, _, n = scores.shape
    k = tokens.shape[1]
    rows = scores.gather(2, tokens[:, None, :, None].expand(b, heads, k, n))
    return rows.gather(3, tokens[:, None, None, :].expand(b, heads, k, k))


def relation_kl(
    student_scores: Tensor, teacher_scores: Tensor, *, reduction: Reduction = "mean", keep: Tensor | None = None
) -> Tensor:
    """``KL(softmax(R_T) || softmax(R_S))`` of each query's row, averaged over heads, then reduced over queries
    (MiniLMv2, arXiv 2012.15828; Hybrid Distill, arXiv 2306.15876).

    Scores before the softmax, ``[B, heads, N, N]``; ``keep [B, N]`` takes tokens out as keys and as queries.
    """
    student, teacher = _scores(student_scores, teacher_scores)
    if keep is not None:
        dropped = ~keep.bool()[:, None, None, :]
        lowest = torch.finfo(student.dtype).min
        student, teacher = student.masked_fill(dropped, lowest), teacher.masked_fill(dropped, lowest)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_t.exp()
    rows = torch.where(p > 0, p * (log_t - log_s), torch.zeros_like(p)).sum(-1).mean(1)
    return reduce(rows, reduction, keep)


def attention_kl(
    student_maps: Tensor, teacher_maps: Tensor, *, reduction: Reduction = "mean", keep: Tensor | None = None
) -> Tensor:
    """:func:`relation_kl` of attention probabilities ``[B, heads, N, N]`` (MiniLM, arXiv 2002.10957), as attention taps
    read them, clamped below at 1e-12. ``keep [B, N]``: queries that count; the maps hold the keys' mask themselves."""
    student, teacher = _scores(student_maps, teacher_maps)
    log_s, log_t = student.clamp(min=1e-12).log(), teacher.clamp(min=1e-12).log()
    return reduce((teacher * (log_t - log_s)).sum(-1).mean(1), reduction, keep)


def attention_mse(student_scores: Tensor, teacher_scores: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Mean of ``(A_S - A_T)^2`` over heads and pairs of tokens that both count (TinyBERT, arXiv 1909.10351): a scalar.
    ``[B, heads, N, N]``, scores before the softmax (:func:`relation`) or probabilities; ``keep [B, N]``."""
    student, teacher = _scores(student_scores, teacher_scores)
    if keep is None:
        return (student - teacher).square().mean()
    both = (keep.bool()[:, :, None] & keep.bool()[:, None, :])[:, None].expand_as(student)
    gap = torch.where(both, student - teacher, torch.zeros_like(student))
    return gap.square().sum() / both.sum().clamp(min=1)


def _scores(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.ndim != 4:
        raise UserError(
            f"student maps have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            cure="maps are [B, heads, N, N]; where heads differ, split queries and keys of both into equally many with "
            "split_heads, or average over heads with mean(1, keepdim=True)",
        )
    return student.float(), teacher.detach().float()
