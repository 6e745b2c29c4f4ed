"""New weights for an architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from stillroom.errors import UserError


@torch.no_grad()
def overwrite(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill ``network`` with a whole state, also where its weights are sharded (collective then: every process gives the
    same state). Raises KeyError for a name that the state lacks."""
    for name, mine in network.state_dict(keep_vars=True).items():
        value = state[name].to(mine.device)
        if isinstance(mine, DTensor):
            value = distribute_tensor(value, mine.device_mesh, mine.placements)
        mine.copy_(value)


def fresh_weights(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state of a network like ``network`` whose weights are drawn anew, as its class draws them; on its device.

    A sharded network is no example of its architecture: give a copy that was taken before it was sharded. A
    transformers model is made from its config; in any other module each part resets itself. Raises UserError where a
    part cannot.
    """
    from transformers import PreTrainedModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(network, PreTrainedModel):
            new: nn.Module = type(network)(copy.deepcopy(network.config))
        else:
            new = copy.deepcopy(network).cpu()
            for name, part in new.named_modules():
                if callable(reset := getattr(part, "reset_parameters", None)):
                    reset()
                elif any(True for _ in part.parameters(recurse=False)):
                    raise UserError(
                        f"the weights of {name or type(part).__name__!r} cannot be drawn anew",
                        cure="give the module a reset_parameters(), or start from the given weights",
                    )
    device = next(network.parameters()).device
    return {name: value.to(device) for name, value in new.state_dict().items()}
