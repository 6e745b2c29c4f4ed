"""Non-saturating GAN losses on logits ``[B, N]`` (one per token) or ``[B]``."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def generator_loss(fake_logits: Tensor) -> Tensor:
    """``softplus(-l_fake)`` per sample ``[B]``, averaged over its logits."""
    return softplus(-fake_logits).reshape(len(fake_logits), -1).mean(1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``softplus(-l_real) + softplus(l_fake)`` (binary cross-entropy, real = 1), averaged: a scalar."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()
