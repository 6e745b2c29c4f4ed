"""What may be asked of any module."""

from __future__ import annotations

import pytest
from torch import nn

from stillroom.surgery.modules import evaluating


def test_each_part_is_in_its_own_mode_again_after_an_evaluation_and_after_a_failure() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    network[1].eval()
    with evaluating(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == [True, True, False]
    with pytest.raises(ValueError, match="on the way"), evaluating(network):
        raise ValueError("on the way")
    assert network[0].training
