"""Classifiers with two last layers on one backbone: one learns from labels, one from a teacher (arXiv 2505.07675)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.losses.soft_labels import mix_heads

Align = Literal["none", "paper", "code"]
ALPHAS = tuple(i / 20 for i in range(21))
TEMPERATURES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


class TwoHeads(nn.Linear):
    """Features ``[B, D]`` to logits ``[B, 2 C]``: the labels' head, then the teacher's. Its weights are those of one
    linear layer with 2 C outputs, so that a network that ends in it keeps its class and its file layout.

    align: the teacher's head for a text-image teacher. ``paper``: ``cos(z, w_c) / zeta``, without bias. ``code``: as
    the authors' code has it, ``(w_c z / |z| + b_c) / zeta``, the weights not normalised.
    """

    def __init__(self, width: int, classes: int, align: Align = "none", zeta: float = 0.01) -> None:
        super().__init__(width, 2 * classes)
        self.classes, self.align, self.zeta = classes, align, zeta

    def forward(self, input: Tensor) -> Tensor:
        if self.align == "none":
            return super().forward(input)
        c, direction = self.classes, F.normalize(input, dim=-1)
        label = F.linear(input, self.weight[:c], self.bias[:c])
        if self.align == "paper":
            taught = F.linear(direction, F.normalize(self.weight[c:], dim=-1))
        else:
            taught = F.linear(direction, self.weight[c:], self.bias[c:])
        return torch.cat([label, taught / self.zeta], -1)

    @torch.no_grad()
    def start(self, directions: Tensor, both: bool) -> None:
        """Begin the labels' head, or ``both``, at class directions ``[C, D]`` with biases 0. Raises UserError where
        they have another width than the features."""
        if directions.shape != (self.classes, self.in_features):
            raise UserError(
                f"the teacher's text features are {tuple(directions.shape)}, the student's heads need "
                f"({self.classes}, {self.in_features})",
                cure="set options.init to none, or give a student whose last features have the width of the teacher's",
            )
        for head in range(2 if both else 1):
            rows = slice(head * self.classes, (head + 1) * self.classes)
            self.weight[rows] = directions
            self.bias[rows] = 0.0


def last_layer(network: nn.Module) -> tuple[str, nn.Linear]:
    """Path of a classifier's last linear layer, and the layer. Raises UserError where there is none."""
    found = [(path, part) for path, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not found:
        raise UserError(
            f"the network {type(network).__name__} does not end in a linear layer", cure="give one that does"
        )
    return found[-1]


def exchange(network: nn.Module, align: Align, zeta: float) -> TwoHeads:
    """Put :class:`TwoHeads` with new weights where the network's last linear layer with C outputs was, in place."""
    path, old = last_layer(network)
    config: Any = getattr(network, "config", None)
    if config is not None and config.num_labels != old.out_features:
        raise UserError(
            f"the last linear layer {path!r} of {type(network).__name__} has {old.out_features} outputs, not one for "
            f"each of {config.num_labels} classes",
            cure="give a classifier that ends in one linear layer",
        )
    heads = TwoHeads(old.in_features, old.out_features, align, zeta).to(old.weight.device)
    _put(network, path, heads)
    if config is not None:
        config.num_labels = 2 * heads.classes
    return heads


def restore(network: nn.Module, settings: dict[str, Any]) -> None:
    """The last linear layer with 2 C outputs becomes :class:`TwoHeads` with the same weights, in place."""
    path, old = last_layer(network)
    heads = TwoHeads(old.in_features, old.out_features // 2, **settings)
    heads.load_state_dict(old.state_dict())
    _put(network, path, heads)


def two_heads(network: nn.Module) -> TwoHeads | None:
    """The two heads that a network ends in, if it does."""
    return next((part for part in network.modules() if isinstance(part, TwoHeads)), None)


def _put(network: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, part)


def best_mixture(label_logits: Tensor, taught_logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """``(alpha, temperature)`` of :func:`~stillroom.losses.soft_labels.mix_heads` with the highest accuracy on
    validation logits ``[N, C]`` and labels ``[N]``, over the paper's grid; of equals the one of least log loss."""

    def score(alpha: float, temperature: float) -> tuple[float, float]:
        p = mix_heads(label_logits, taught_logits, alpha, temperature)
        right = float((p.argmax(-1) == labels).double().mean())
        return right, -float(F.nll_loss(p.clamp_min(1e-12).log(), labels))

    grid = [(alpha, temperature) for alpha in ALPHAS for temperature in TEMPERATURES]
    return max(grid, key=lambda pair: score(*pair))
