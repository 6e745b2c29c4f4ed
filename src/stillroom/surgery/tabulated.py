"""A DiT that is asked at few times only: its conditioning, a function of time and class alone, as tables."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError
from stillroom.surgery.modules import device_of


class _Rows(nn.Module):
    """What ``emb`` of diffusers' adaLN-Zero says, by row."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, rows: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return self.table[rows]


class _Norm(nn.Module):
    """diffusers' ``AdaLayerNormZero`` with its shifts, scales and gates by row."""

    def __init__(self, norm: Any, said: Tensor) -> None:
        super().__init__()
        self.norm, self.emb = norm.norm, _Rows(said)
        self.table = nn.Parameter(norm.linear(norm.silu(said)), requires_grad=False)

    def forward(
        self, x: Tensor, rows: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        shift, scale, *others = self.table[rows].chunk(6, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], *others


class TabulatedDiT(nn.Module):
    """A copy of a ``DiTTransformer2DModel`` for inference at ``times [T]`` (the network's own) and no others.

    In each block time and class embeddings, their MLP and the modulation's product (about a third of the parameters)
    become ``T x classes`` rows. The answers are the same up to the order of floating-point sums.
    """

    def __init__(self, network: Any, times: Tensor) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.classes = int(network.config["num_embeds_ada_norm"]) + 1  # the last one means "unconditional"
        self.register_buffer("times", times, persistent=False)
        rows = times.repeat_interleave(self.classes)
        labels = torch.arange(self.classes, device=times.device).repeat(len(times))
        with torch.no_grad():
            for block in self.network.transformer_blocks:
                said = block.norm1.emb(rows, labels, hidden_dtype=next(network.parameters()).dtype)
                block.norm1 = _Norm(block.norm1, said)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """As the network's own. Raises ValueError for a time that has no row."""
        found = timestep[:, None] == self.times
        if not bool(found.any(1).all()):
            raise ValueError(f"the network was tabulated for times {self.times.tolist()}, not {timestep.tolist()}")
        rows = found.int().argmax(1) * self.classes + class_labels
        return self.network(hidden_states, timestep=rows, class_labels=class_labels, return_dict=return_dict)


def tabulate(denoiser: Denoiser, sampler: Sampler) -> Denoiser:
    """``denoiser`` with its conditioning as tables, for the times at which ``sampler`` asks: the same samples, faster.

    A sampler's times do not depend on noise or class, so one sample shows them all. For inference: such a network is
    neither trained nor saved. Raises UserError for networks other than class-conditional DiTs.
    """
    times: list[Tensor] = []

    def watch(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        times.append(given["timestep"].detach().unique())

    if type(denoiser.network).__name__ != "DiTTransformer2DModel":
        raise UserError(
            f"the conditioning of a {type(denoiser.network).__name__} cannot be tabulated",
            cure="use the network as it is: only a DiTTransformer2DModel's is a function of time and class alone",
        )
    hook = denoiser.network.register_forward_pre_hook(watch, with_kwargs=True)
    device = device_of(denoiser.network)
    try:
        label = {"label": torch.zeros(1, dtype=torch.long, device=device)}
        sampler.sample(denoiser, torch.zeros(1, *denoiser.shape, device=device), label, torch.Generator())
    finally:
        hook.remove()
    fast = copy.copy(denoiser)
    fast._modules = {**denoiser._modules, "network": TabulatedDiT(denoiser.network, torch.cat(times).unique())}
    return fast
