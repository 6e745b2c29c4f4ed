"""Rewards: what scores a student's samples, and how it is followed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stillroom.errors import UserError
from stillroom.registry import named_function

Reward = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""``(samples [B, ...], conditions by name)`` to scores ``[B]``, the higher the better; with a graph."""
CURE = "for example options.reward=my_package.rewards:colourful, a function of images and conditions"


def hinge(scores: Tensor, margin: float) -> Tensor:
    """``mean ReLU(margin - score)``: what is good enough is left alone (arXiv 2404.13686). A scalar."""
    return torch.relu(margin - scores).mean()


def named_reward(entry: str) -> Reward:
    """A reward of the user's own, ``package.module:function``, of an installed package or one on Python's path. Raises
    UserError for one that there is not, and when what it gives is not one number for each sample."""
    function = named_function(entry, "options.reward", CURE)

    def checked(samples: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        scores = function(samples, cond)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (len(samples),):
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(
                f"options.reward={entry!r} gave {found} for {len(samples)} samples", cure="give one number for each"
            )
        return scores

    return checked
