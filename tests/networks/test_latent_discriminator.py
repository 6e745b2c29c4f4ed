"""Heads on several frozen blocks: their spectral norm, their reach, and the pass that ends at the last block."""

from __future__ import annotations

import copy

import pytest
import torch

from stillroom.errors import UserError
from stillroom.losses.adversarial import hinge_generator, hinge_told
from stillroom.networks.discriminators import (
    BlockFeatures,
    LatentDiscriminator,
    MapHead,
    PictureDiscriminator,
    SpectralConv,
    TokenConvHead,
    spread_blocks,
)
from stillroom.surgery.freezing import frozen
from tiny_denoisers import dit_teacher, point_teacher
from tiny_text_images import tiny_codec


def test_a_convolution_is_divided_by_its_greatest_singular_value() -> None:
    torch.manual_seed(0)
    layer, x = SpectralConv(6, 5, 3, iterations=200), torch.randn(2, 6, 7)
    matrix = layer.conv.weight.flatten(1)
    scaled = copy.deepcopy(layer.conv)
    with torch.no_grad():
        scaled.weight.div_(torch.linalg.matrix_norm(matrix, 2))
    torch.testing.assert_close(layer(x), scaled(x))
    few = SpectralConv(6, 5, 3)
    top = torch.linalg.matrix_norm(few.conv.weight.flatten(1), 2)
    with torch.no_grad():
        ratio = (few(x) - few.conv.bias[:, None]).norm() / (
            torch.nn.functional.conv1d(torch.cat([x[..., -1:], x, x[..., :1]], -1), few.conv.weight / top).norm()
        )
    assert 1 - 1e-5 < ratio < 1.1  # what few iterations find is at most the greatest
    assert torch.equal(few(x), few(x))


@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_any_number_of_tokens_is_read_and_what_lies_beside_a_single_one_is_nothing(tokens: int) -> None:
    torch.manual_seed(0)
    layer, x = SpectralConv(4, 3, 9), torch.randn(2, 4, tokens)
    assert layer(x).shape == (2, 3, tokens)
    if tokens == 1:
        alone = torch.nn.functional.conv1d(x, layer.conv.weight, None, padding=4)
        ratio = (layer(x) - layer.conv.bias[:, None]) / alone
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_heads_read_neighbours_and_no_other_sample() -> None:
    torch.manual_seed(0)
    head, x = TokenConvHead(8, 16), torch.randn(2, 12, 8)
    logits = head(x)
    assert logits.shape == (2, 12)
    other = x.clone()
    other[0, 6] += 1
    changed = head(other)
    assert torch.equal(changed[1], logits[1])
    assert not torch.equal(changed[0], logits[0])


def test_the_blocks_are_spread_as_the_paper_s() -> None:
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(20))
    assert [int(path.split(".")[1]) for path in spread_blocks(network)] == [2, 8, 14, 19]
    network.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))
    assert len(spread_blocks(network)) == 3


@pytest.mark.parametrize("make", [point_teacher, dit_teacher])
def test_logits_are_of_every_block_and_carry_gradients_to_the_input_alone(make: object) -> None:
    assert callable(make)
    teacher = frozen(make())
    discriminator = LatentDiscriminator(teacher, hidden=8)
    x = torch.randn(3, *teacher.shape, requires_grad=True)
    t, cond = torch.tensor([0.2, 0.5, 0.8]), {"label": torch.tensor([0, 1, 2])}
    logits = discriminator.logits(teacher, x, t, cond)
    per_head = 1 if len(teacher.shape) == 1 else 4
    assert logits.shape == (3, per_head * len(discriminator.heads))
    hinge_generator(logits).backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in teacher.parameters())
    again = copy.deepcopy(discriminator)
    torch.testing.assert_close(again.logits(teacher, x, t, cond), logits)


def test_the_hinge_loss_is_written_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [-3.0, 0.5]])
    assert hinge_generator(logits) == pytest.approx(0.125)
    assert hinge_told(logits, True) == pytest.approx((0 + 1 + 4 + 0.5) / 4)
    assert hinge_told(logits, False) == pytest.approx((3 + 1 + 0 + 1.5) / 4)
    assert hinge_told(logits, False, torch.tensor([0.0, 1.0])) == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("shape", "width", "places"),
    [((6, 8, 8), 6, 16), ((6, 5, 3), 6, 6), ((6, 1, 1), 6, 1), ((7, 6), 6, 4), ((6,), 6, 1)],
)
def test_maps_tokens_and_vectors_of_any_size_get_logits(shape: tuple[int, ...], width: int, places: int) -> None:
    """One for every four places, rounded up."""
    features = torch.randn(2, *shape, requires_grad=True)
    logits = MapHead(width, hidden=4)(features)
    assert logits.shape == (2, places)
    logits.sum().backward()
    assert bool(features.grad.abs().any())


def test_an_autoencoder_s_own_encoder_shows_its_blocks_with_a_graph_to_the_pictures() -> None:
    codec = tiny_codec()
    encoder = BlockFeatures(codec.network.encoder)
    pictures = torch.randn(2, 3, 16, 16, requires_grad=True)
    found = encoder(pictures)
    assert len(found) == 2
    torch.testing.assert_close(found[0], codec.network.encoder.down_blocks[0](codec.network.encoder.conv_in(pictures)))
    judge = PictureDiscriminator(encoder, torch.zeros(1, 3, 16, 16))
    assert not next(encoder.parameters()).requires_grad
    assert not any("encoder" in name for name, _ in judge.named_parameters())
    judge.logits(found).sum().backward()
    assert float(pictures.grad.abs().max()) > 0
    with pytest.raises(UserError, match="gave a Tensor, no list of feature maps"):
        PictureDiscriminator(torch.nn.Identity(), torch.zeros(1, 3, 16, 16))
