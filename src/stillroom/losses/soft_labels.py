"""Soft labels: comparing probabilities, and the best weight of ground truth beside a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def probability_mse(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference over the batch AND the classes; both ``[B, C]``. A scalar."""
    return (probabilities - targets).square().mean()


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """``-sum_c p_c log softmax(logits)_c``, averaged over the batch; both ``[B, C]``. KL(p || softmax) plus the entropy
    of ``p``, which is its least value. A scalar, in nats."""
    return -(probabilities * logits.log_softmax(-1)).sum(-1).mean()


def norm_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """The sum of the 2-norms of weight tensors, not squared."""
    return torch.stack([torch.linalg.vector_norm(p) for p in parameters]).sum()


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
