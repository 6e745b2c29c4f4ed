"""How a network that recognises is run: one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond
from stillroom.losses.soft_labels import mix_heads

if TYPE_CHECKING:
    pass
from stillroom.diffusion.sampling import Sampler


@dataclass(frozen=True)
class ForwardPass(Sampler):
    """One evaluation: how a network that recognises images is run. ``noise`` stands for the images."""

    name: ClassVar[str] = "forward"

    @property
    def nfe(self) -> int:
        return 1

    @torch.no_grad()
    def sample(
        self, denoiser: Any, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return class_logits(denoiser, noise)


@dataclass(frozen=True)
class TwoHeadPass(ForwardPass):
    """One evaluation of a network with two heads (DHO, arXiv 2505.07675): the LOGARITHM of the mixture of their
    probabilities, ``alpha softmax(z_CE) + (1 - alpha) softmax(z_KD / temperature)``, which softmax gives back."""

    alpha: float = 0.5
    temperature: float = 0.5
    name: ClassVar[str] = "two-heads"

    @torch.no_grad()
    def sample(
        self, denoiser: Any, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        label, taught = class_logits(denoiser, noise).float().chunk(2, -1)
        return mix_heads(label, taught, self.alpha, self.temperature).clamp_min(torch.finfo(torch.float32).tiny).log()


def class_logits(network: nn.Module, inputs: Any) -> Tensor:
    """``[B, classes]`` of a plain module, or of a transformers model for classification. Inputs are images, or the
    network's arguments by name (texts: ``input_ids`` and ``attention_mask``)."""
    output = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
    return output if isinstance(output, Tensor) else output.logits
