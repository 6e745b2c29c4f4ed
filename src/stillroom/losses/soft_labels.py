"""Losses on logits: what a student learns from a teacher's class probabilities.

Logits and probabilities are ``[..., C]``; a loss is made per position ``[...]`` and then reduced:

- ``mean``: over the positions that count; ``batchmean``: their sum over the size of the first dimension; ``sum``;
  ``none``: per position, zero where it does not count.
- ``keep``: bool ``[...]``, True where a position counts (real tokens, labelled rows); None: all.
- A class whose logit is -inf has probability 0. Where that is so on both sides it adds nothing to values and gradients:
  they are those of the other classes.
- ``temperature`` tau divides the logits; gradients shrink by 1 / tau^2, which ``temperature_squared`` undoes by the
  factor tau^2 (arXiv 1503.02531).

No gradient reaches the teacher. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from stillroom.errors import UserError

Reduction = Literal["mean", "batchmean", "sum", "none"]


def reduce(values: Tensor, reduction: Reduction, keep: Tensor | None = None) -> Tensor:
    """Reduce a loss per position ``[...]``; ``keep`` has its shape. A mean over no position at all is 0, with a graph.

    Raises UserError for a mask of another shape and for an unknown reduction.
    """
    if keep is not None:
        if keep.shape != values.shape:
            raise UserError(
                f"the mask has shape {tuple(keep.shape)}, the loss {tuple(values.shape)}",
                cure="give one bool for each position, True where it counts",
            )
        values = torch.where(keep.bool(), values, values.new_zeros(()))
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "batchmean":
        return values.sum() / len(values)
    if reduction == "mean":
        return values.mean() if keep is None else values.sum() / keep.sum().clamp(min=1)
    raise UserError(f"unknown reduction {reduction!r}", cure="one of: mean, batchmean, sum, none")


def _log_probabilities(logits: Tensor, temperature: float, keep: Tensor | None = None) -> Tensor:
    """Positions that do not count are made harmless first: what stands there (-inf, nan) would spoil gradients."""
    if temperature <= 0:
        raise UserError(f"a temperature is above 0, not {temperature}", cure="1 leaves the logits as they are")
    return (_counting(logits.float(), keep) / temperature).log_softmax(-1)


def _counting(values: Tensor, keep: Tensor | None) -> Tensor:
    """Values ``[..., C]``, 0 at positions that do not count."""
    if keep is None or keep.shape != values.shape[:-1]:  # a mask of another shape is refused by the reduction
        return values
    return values.masked_fill(~keep.bool()[..., None], 0.0)


def _same_classes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise UserError(
            f"student logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            cure="student and teacher must see the same rows and have the same classes in the same order",
        )


def soft_cross_entropy(
    student_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: Reduction = "mean",
    keep: Tensor | None = None,
) -> Tensor:
    """``- sum_c p_c log softmax(z_S / tau)_c`` for target probabilities p ``[..., C]``, as they are (no temperature
    acts on them). Its floor is the entropy of the target, not 0."""
    _same_classes(student_logits, target)
    p = _counting(target.detach().float(), keep)
    values = _cross_entropy(p, _log_probabilities(student_logits, temperature, keep))
    return reduce(values * (temperature**2 if temperature_squared else 1.0), reduction, keep)


def _cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """``- sum_c p_c log q_c`` per position; a class with p = 0 adds 0, whatever q is."""
    return -(p * log_q.masked_fill(p == 0, 0.0)).sum(-1)


def _divergence(first: Tensor, second: Tensor, scale: float, reduction: Reduction, keep: Tensor | None) -> Tensor:
    """``KL(first || second)`` of log-probabilities; a class of probability 0 (logit -inf) in ``first`` adds 0."""
    p = first.exp()
    difference = torch.where(p > 0, first - second, torch.zeros_like(p))
    return reduce(scale * (p * difference).sum(-1), reduction, keep)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: Reduction = "mean",
    keep: Tensor | None = None,
) -> Tensor:
    """``KL(p_T || p_S)``, p = softmax(z / tau): the student covers what the teacher finds likely (arXiv 1503.02531)."""
    _same_classes(student_logits, teacher_logits)
    student = _log_probabilities(student_logits, temperature, keep)
    teacher = _log_probabilities(teacher_logits.detach(), temperature, keep)
    return _divergence(teacher, student, temperature**2 if temperature_squared else 1.0, reduction, keep)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: Reduction = "mean",
    keep: Tensor | None = None,
) -> Tensor:
    """``KL(p_S || p_T)``: the student stays where the teacher finds it likely (arXiv 2306.08543)."""
    _same_classes(student_logits, teacher_logits)
    student = _log_probabilities(student_logits, temperature, keep)
    teacher = _log_probabilities(teacher_logits.detach(), temperature, keep)
    return _divergence(student, teacher, temperature**2 if temperature_squared else 1.0, reduction, keep)


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: Reduction = "mean",
    keep: Tensor | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence ``beta KL(p_T || m) + (1 - beta) KL(p_S || m)``,
    ``m = beta p_T + (1 - beta) p_S``, 0 < beta < 1 (arXiv 2306.13649)."""
    if not 0 < beta < 1:
        raise UserError(
            f"beta of a Jensen-Shannon divergence lies strictly between 0 and 1, not {beta}",
            cure="its limits, rescaled, are forward_kl (beta -> 0) and reverse_kl (beta -> 1)",
        )
    _same_classes(student_logits, teacher_logits)
    student = _log_probabilities(student_logits, temperature, keep)
    teacher = _log_probabilities(teacher_logits.detach(), temperature, keep)
    neither = (teacher == -torch.inf) & (student == -torch.inf)  # there the mixture's slope is no number
    parts = (teacher.masked_fill(neither, 0.0), beta), (student.masked_fill(neither, 0.0), 1 - beta)
    mixture = torch.logaddexp(*(log_p + torch.tensor(share).log() for log_p, share in parts))
    scale = temperature**2 if temperature_squared else 1.0
    first = _divergence(teacher, mixture, beta * scale, reduction, keep)
    return first + _divergence(student, mixture, (1 - beta) * scale, reduction, keep)


def ensemble_probabilities(teacher_logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Mean of the teachers' probabilities ``[..., C]``, not the softmax of their mean logits (arXiv 2009.08453)."""
    if not teacher_logits:
        raise UserError("an ensemble needs at least one teacher", cure="give a list of logits [..., C]")
    parts = [_log_probabilities(z.detach(), temperature).exp() for z in teacher_logits]
    return torch.stack(parts).mean(0)


def mix_ground_truth(distillation: Tensor, ground_truth: Tensor, gt_weight: float) -> Tensor:
    """``gt_weight * ground_truth + (1 - gt_weight) * distillation`` of two losses; gt_weight in [0, 1]."""
    _weight(gt_weight)
    return gt_weight * ground_truth + (1 - gt_weight) * distillation


def mix_labels(probabilities: Tensor, labels: Tensor, gt_weight: float) -> Tensor:
    """Targets ``[..., C]``: ``gt_weight * onehot(labels) + (1 - gt_weight) * probabilities``, labels int ``[...]``.

    Cross-entropy to them is the same mixture of the two cross-entropies, so this agrees with
    :func:`mix_ground_truth` where both losses have temperature 1.
    """
    _weight(gt_weight)
    hard = one_hot(labels.long(), probabilities.shape[-1]).to(probabilities)
    return gt_weight * hard + (1 - gt_weight) * probabilities


def mix_heads(label_logits: Tensor, distilled_logits: Tensor, alpha: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Probabilities ``alpha softmax(z_CE) + (1 - alpha) softmax(z_KD / temperature)`` of a student with one head for
    the labels and one for the teacher (DHO, arXiv 2505.07675)."""
    _weight(alpha)
    label = _log_probabilities(label_logits, 1.0).exp()
    return alpha * label + (1 - alpha) * _log_probabilities(distilled_logits, temperature).exp()


def _weight(value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"a mixing weight lies in [0, 1], not {value}", cure="0.5 weighs both alike")


def decoupled_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """NKD (arXiv 2303.13005): the teacher's probability weighs the label's own term, and the other classes,
    renormalised among themselves, have a cross-entropy of their own:
    ``mean(- p_T,y log p_S,y) + alpha tau^2 mean(- sum_(c != y) q_T,c log q_S,c)``, q at temperature tau.

    logits ``[B, C]``, C >= 3; labels int ``[B]``.
    """
    _same_classes(student_logits, teacher_logits)
    teacher_logits, own = teacher_logits.detach(), labels.long()[:, None]
    target = _log_probabilities(teacher_logits, 1.0).exp().gather(1, own)
    label = _cross_entropy(target, _log_probabilities(student_logits, 1.0).gather(1, own)).mean()
    others = torch.ones_like(student_logits, dtype=torch.bool).scatter(1, own, False)
    rest = (len(own), student_logits.shape[-1] - 1)
    q_student = _log_probabilities(student_logits[others].view(rest), temperature)
    q_teacher = _log_probabilities(teacher_logits[others].view(rest), temperature)
    return label + alpha * temperature**2 * _cross_entropy(q_teacher.exp(), q_student).mean()


def probability_mse(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference over the batch AND the classes; both ``[B, C]``. A scalar."""
    return (probabilities - targets).square().mean()


def norm_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """The sum of the 2-norms of weight tensors, not squared. Of sharded tensors the whole norms, on every process."""
    norms = [torch.linalg.vector_norm(p) for p in parameters]
    return torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).sum()


def least_squares_mix(taught: Any, truth: Any, targets: Any, clip: tuple[float, float] | None = (0.0, 1.0)) -> float:
    """The weight ``w`` for which ``w * truth + (1 - w) * taught`` is nearest to ``targets`` in squared error.

    taught, truth: predictions of the model that learnt from a teacher alone and of the one that learnt from the ground
    truth alone, on held-out data, ``[N]`` or ``[N, C]`` (arrays or tensors); one weight serves all columns. ``clip``:
    the interval that the weight may lie in; None leaves it free. Where the two models agree any weight is as good, and
    the answer is 1.
    """
    change = truth - taught
    length = float((change * change).sum())
    if length < 1e-12:
        return 1.0
    weight = float(((targets - taught) * change).sum()) / length
    return weight if clip is None else min(max(weight, clip[0]), clip[1])
