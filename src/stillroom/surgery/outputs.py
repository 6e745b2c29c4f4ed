"""The order of a classifier's outputs, changed in its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def reorder_outputs(network: nn.Module, order: Sequence[int], ask: Callable[[nn.Module], Tensor]) -> bool:
    """Make output i what output ``order[i]`` was, by exchanging the rows of the last layer that has an output for each
    class. Nothing else changes.

    ask: the network's logits ``[B, classes]`` on some input, by which the result is checked. Returns whether it was
    done; if not, the network is as it was: it has no such layer, or more than one.
    """
    index, training = torch.tensor(list(order)), network.training
    wanted = ask(network.eval())[:, index]
    heads = [one for one in network.modules() if isinstance(one, nn.Linear) and one.out_features == len(index)]
    done = any(_exchanged(head, index, lambda: ask(network), wanted) for head in reversed(heads))
    network.train(training)
    return done


def _exchanged(head: nn.Linear, index: Tensor, ask: Callable[[], Tensor], wanted: Tensor) -> bool:
    _exchange(head, index)
    if torch.allclose(ask(), wanted, rtol=1e-4, atol=1e-5):
        return True
    _exchange(head, index.argsort())
    return False


def _exchange(head: nn.Linear, index: Tensor) -> None:
    rows = index.to(head.weight.device)
    head.weight.copy_(head.weight[rows])
    if head.bias is not None:
        head.bias.copy_(head.bias[rows])
