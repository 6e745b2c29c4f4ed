"""Whether two losses pull the same weights in the same direction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_cosine(first: Tensor, second: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The cosine of the angle between the gradients of two scalar losses over all ``parameters`` together: below 0 the
    losses work against each other (arXiv 2001.06782, definition 1). A detached scalar; 0 where a gradient vanishes.

    Both graphs are kept and no ``.grad`` is touched. Costs a backward pass for each loss.
    """
    weights = [p for p in parameters if p.requires_grad]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, weights)])

    a, b = gradient(first), gradient(second)
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-12)).detach()
