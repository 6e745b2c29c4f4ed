"""Reconstruction of removed patches (arXiv 2111.06377)."""

from __future__ import annotations

from torch import Tensor


def masked_pixel_loss(predicted: Tensor, patches: Tensor, mask: Tensor, normalise: bool = False) -> Tensor:
    """``sum_i mask_i mean_pixels (y_i - x_i)^2 / sum_i mask_i``: the mean squared error on removed patches alone.

    predicted, patches: ``[B, N, P]``; mask: ``[B, N]``, True = removed. normalise: the target is each patch with its
    own mean and (unbiased) variance taken out.
    """
    target = patches.float()
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (predicted.float() - target).square().mean(-1)
    return (errors * mask).sum() / mask.sum().clamp(min=1)
