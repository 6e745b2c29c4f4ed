"""A deeper network that begins as a trained one: new blocks that change nothing yet."""

from __future__ import annotations

import torch
from torch import nn

from stillroom.errors import UserError

BLOCKS = "transformer_blocks"
BRANCH_ENDS = ("to_out.0", "to_add_out", "net.2")
"""The last products of the attention and feed-forward branches of diffusers' transformer blocks."""


@torch.no_grad()
def grow(network: nn.Module, trained: nn.Module) -> None:
    """Fill ``network`` with the weights of ``trained``, a network of its class and sizes with as many blocks or fewer,
    so that it computes the same: the blocks of ``trained`` in their order, the last one last, each but that one
    followed by copies of itself whose branches end in zero, which add nothing to their input (function-preserving
    growth, arXiv 1511.05641; zero ends, arXiv 1901.09321). Their gradients are not zero.

    Raises UserError for networks that differ in more than their depth.
    """
    mine, given = (dict(part.named_children()).get(BLOCKS) for part in (network, trained))
    if not (isinstance(mine, nn.ModuleList) and isinstance(given, nn.ModuleList)):
        raise UserError(f"a network to grow from needs {BLOCKS}", cure="start from a transformer of diffusers")
    if len(mine) < len(given):
        raise UserError(
            f"a network of {len(mine)} blocks cannot begin as one of {len(given)}",
            cure=f"set config.num_layers to {len(given)} or more",
        )
    sources = origins(len(given), len(mine))
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith(f"{BLOCKS}.")}
    for new, (old, fresh) in enumerate(sources):
        for name, value in given[old].state_dict().items():
            ends = fresh and name.rpartition(".")[0].endswith(BRANCH_ENDS)
            state[f"{BLOCKS}.{new}.{name}"] = torch.zeros_like(value) if ends else value
    try:
        network.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            "the network and the one that it begins as differ in more than their depth",
            cure="give both the same config but for num_layers",
        ) from None


def origins(given: int, wanted: int) -> list[tuple[int, bool]]:
    """For each of ``wanted`` blocks, the block of ``given`` that it is a copy of, and whether it is a new one. The last
    is never doubled: it often has another shape."""
    found, seen = [], set()
    for new in range(wanted):
        old = given - 1 if new == wanted - 1 else new * (given - 1) // (wanted - 1)
        found.append((old, old in seen))
        seen.add(old)
    return found
