"""Networks without weights, and copies that share theirs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stillroom.surgery.skeleton import unshared


@pytest.mark.parametrize("held", ["itself", "in a list", "by an attribute's attribute"])
def test_a_copy_has_the_same_tensors_and_may_lose_them(held: str) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight, mean = network[0].weight, network[1].running_mean
    if held == "itself":
        copied = unshared(network)
    elif held == "in a list":
        copied = unshared([network])[0]
    else:
        copied = unshared(SimpleNamespace(pipeline=SimpleNamespace(unet=network, name="x"))).pipeline.unet
    assert copied is not network
    assert copied[0].weight is weight
    assert copied[1].running_mean is mean
    copied[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert network[0].weight is weight
