"""Networks that grow in depth: what they compute at first, and that their new blocks can learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillroom.bench.teach import TeacherRecipe
from stillroom.errors import UserError
from stillroom.surgery.growing import grow, origins


def made(name: str, layers: int, width: int = 16) -> Any:
    sizes = ["config.num_attention_heads=2", f"config.attention_head_dim={width // 2}", f"config.num_layers={layers}"]
    sizes.append(f"config.c{'aption_projection' if 'sd3' in name else 'ross_attention'}_dim={width}")
    return TeacherRecipe.load(name, sizes).denoiser()


def answer(denoiser: Any) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    cond = {
        "encoder_hidden_states": torch.randn(3, 16, 64, generator=draws),
        "pooled_projections": torch.randn(3, 64, generator=draws),
    }
    if "SD3" not in type(denoiser.network).__name__:
        del cond["pooled_projections"]
    return denoiser(torch.randn(3, 4, 8, 8, generator=draws), 0.4 * denoiser.process.t_max, cond).value


@pytest.mark.parametrize("name", ["scenes-sd3", "scenes-pixart"])
@pytest.mark.parametrize("layers", [3, 4, 7])
def test_a_grown_network_computes_what_the_old_one_does_and_its_new_blocks_learn(name: str, layers: int) -> None:
    old, new = made(name, 3), made(name, layers)
    grow(new.network, old.network)
    given, grown = answer(old), answer(new)
    assert float(given.detach().std()) > 1e-2
    torch.testing.assert_close(grown, given, atol=1e-6, rtol=1e-5)
    grown.square().sum().backward()
    for block, (_, fresh) in zip(new.network.transformer_blocks, origins(3, layers), strict=True):
        last = block.ff.net[2].weight
        assert bool((last == 0).all()) == fresh
        assert float(last.grad.abs().max()) > 0


def test_new_blocks_are_spread_and_the_last_stays_last() -> None:
    assert origins(4, 4) == [(0, False), (1, False), (2, False), (3, False)]
    assert [old for old, _ in origins(4, 8)] == [0, 0, 0, 1, 1, 2, 2, 3]
    for given in range(1, 6):
        for wanted in range(given, 12):
            found = origins(given, wanted)
            assert [old for old, fresh in found if not fresh] == list(range(given))
            assert found == sorted(found)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="2 blocks cannot begin as one of 3"):
        grow(made("scenes-sd3", 2).network, made("scenes-sd3", 3).network)
    with pytest.raises(UserError, match="more than their depth"):
        grow(made("scenes-sd3", 3, width=32).network, made("scenes-sd3", 3).network)
    with pytest.raises(UserError, match="needs transformer_blocks"):
        grow(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
