"""Non-saturating and hinge GAN losses on logits ``[B, N]`` (one per token) or ``[B]``; discrimination of logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu, softplus

from stillroom.errors import UserError

HEALTH = {
    "real_logit": "mean logit of the discriminator on noised real data: log odds of being real, 0 where it cannot tell",
    "fake_logit": "the same on noised samples of the student; far below real_logit where the discriminator wins",
}
"""What methods with a discriminator of real and generated data note in a run."""


def generator_loss(fake_logits: Tensor) -> Tensor:
    """``softplus(-l_fake)`` per sample ``[B]``, averaged over its logits."""
    return softplus(-fake_logits).reshape(len(fake_logits), -1).mean(1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """``softplus(-l_real) + softplus(l_fake)`` (binary cross-entropy, real = 1), averaged: a scalar. ``weight [B]``: of
    each pair of samples, where both are seen at one time."""
    return told(real_logits, True, weight) + told(fake_logits, False, weight)


def told(logits: Tensor, real: bool, weight: Tensor | None = None) -> Tensor:
    """One half of :func:`discriminator_loss`: ``softplus(-l)`` of real data, or ``softplus(l)`` of generated."""
    signed = logits if real else -logits
    if weight is None:
        return softplus(-signed).mean()
    return (weight * generator_loss(signed)).mean()


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """``-l_fake``, averaged: a scalar (arXiv 1705.02894)."""
    return -fake_logits.mean()


def hinge_told(logits: Tensor, real: bool, weight: Tensor | None = None) -> Tensor:
    """One half of the hinge loss, averaged over samples and their logits: ``relu(1 - l)`` of real data, or
    ``relu(1 + l)`` of generated. ``weight [B]``: of each sample, 0 for one that does not count."""
    each = relu(1 - logits if real else 1 + logits).reshape(len(logits), -1).mean(1)
    return each.mean() if weight is None else (weight * each).mean()


def logit_discrimination(
    discriminator: nn.Module, student_logits: Tensor, teacher_logits: Tensor, sign: int = 1
) -> Tensor:
    """Mean binary cross-entropy of a discriminator's two outputs ``[2B, 2]``: (1, 0) for student rows, (0, 1) for
    teacher rows.

    sign = 1: student and discriminator both descend it, a regulariser that keeps the student's logits recognisable
    (MEAL V2, arXiv 2009.08453). sign = -1: the student's gradient is reversed, so that one backward pass trains an
    adversarial game. Logits ``[B, C]``; the teacher's are those of the ensemble's mean logits, and get no gradient.
    """
    if sign not in (1, -1):
        raise UserError(f"sign is {sign}", cure="1: both descend; -1: the student ascends")
    student = student_logits if sign == 1 else 2 * student_logits.detach() - student_logits
    verdict = discriminator(torch.cat([student, teacher_logits.detach()]))
    is_student = torch.cat([torch.ones(len(student)), torch.zeros(len(teacher_logits))]).to(verdict)
    return binary_cross_entropy_with_logits(verdict, torch.stack([is_student, 1 - is_student], 1))
