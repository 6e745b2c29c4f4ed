"""Masked autoencoders: masks against transformers' own, encoding of chosen patches, the pixel loss, folders, probes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillroom as sr
from stillroom.data.source import ArrayData
from stillroom.errors import UserError
from stillroom.evaluation.probes import (
    few_labels,
    fine_tune,
    linear_probe,
    nearest_neighbours,
    noisy,
    occluded,
    probe_scores,
)
from stillroom.losses.pixels import masked_pixel_loss
from stillroom.networks.mae import decode, encode, learned, make_encoder, masking, own_pixels, patchify, same_patches
from stillroom.networks.vit import PooledClassifier, encoder_of
from stillroom.surgery.taps import Taps, projection_path
from stillroom.tasks.encode.model import ImageEncoder


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(1)
    return make_encoder("mae-nano", 2, 12).eval()  # 9 patches


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 2, 12, 12, generator=torch.Generator().manual_seed(2)) * 2 - 1


# --- masks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_masks_and_reconstructions_are_those_of_transformers(network: Any, images: Tensor, ratio: float) -> None:
    noise = torch.rand(5, 9, generator=torch.Generator().manual_seed(3))
    network.config.mask_ratio = ratio
    theirs = network(images, noise=noise)
    network.config.mask_ratio = 0.25  # what stands in the config must not matter to us, and must stay
    mask = masking(noise, ratio)
    latent = encode(network.vit, images, mask.ids_keep)
    assert network.config.mask_ratio == 0.25
    assert latent.shape == (5, 1 + int(9 * (1 - ratio)), 48)
    assert torch.equal(mask.mask, theirs.mask.bool())
    assert torch.equal(mask.ids_restore, theirs.ids_restore)
    torch.testing.assert_close(decode(network.decoder, latent, mask.ids_restore), theirs.logits)
    if ratio:
        ours = masked_pixel_loss(theirs.logits, patchify(images, 4), mask.mask)
        torch.testing.assert_close(ours, theirs.loss)


def test_a_mask_leaves_the_promised_number_of_patches() -> None:
    noise = torch.rand(3, 25, generator=torch.Generator().manual_seed(4))
    for ratio, kept in {0.76: 6, 0.92: 2, 0.96: 1, 0.0: 25}.items():
        mask = masking(noise, ratio)
        assert mask.ids_keep.shape == (3, kept)
        assert (~mask.mask).sum(1).tolist() == [kept] * 3
        assert not mask.mask.gather(1, mask.ids_keep).any()
        assert torch.equal(noise.gather(1, mask.ids_keep).max(1).values, noise.masked_fill(mask.mask, -1).max(1).values)
    with pytest.raises(UserError, match="leaves 0 of 25"):
        masking(noise, 0.99)


def test_kept_patches_come_in_the_order_that_is_asked_for(network: Any, images: Tensor) -> None:
    everything = encode(network.vit, images)
    assert everything.shape == (5, 10, 48)
    order = torch.tensor([[7, 2, 4, 0, 8, 1, 3, 6, 5]]).expand(5, -1)
    torch.testing.assert_close(
        encode(network.vit, images, order)[:, 1:], everything[:, 1:].gather(1, order[..., None].expand(-1, -1, 48))
    )
    few = encode(network.vit, images, order[:, :3])
    hidden = images.clone()
    for patch in (0, 8, 1, 3, 6, 5):
        row, column = divmod(patch, 3)
        hidden[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 9.0
    torch.testing.assert_close(encode(network.vit, hidden, order[:, :3]), few)  # what was left out is never seen


def test_the_pixel_loss_counts_removed_patches_alone_and_may_normalise() -> None:
    predicted, patches = torch.zeros(2, 3, 4), torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[True, False, False], [False, False, True]])
    rows = torch.cat([patches[0, 0], patches[1, 2]])
    assert float(masked_pixel_loss(predicted, patches, mask)) == pytest.approx(float(rows.square().mean()))
    unit = (torch.arange(4.0) - 1.5) / (5 / 3) ** 0.5  # every row is four numbers in steps of one
    assert float(masked_pixel_loss(predicted, patches, mask, True)) == pytest.approx(
        float(unit.square().mean()), rel=1e-4
    )
    assert float(masked_pixel_loss(predicted, patches, mask & False)) == 0.0


def test_a_new_decoder_knows_where_its_patches_are(network: Any) -> None:
    positions = network.decoder.decoder_pos_embed[0, 1:]
    assert torch.cdist(positions, positions)[~torch.eye(9, dtype=torch.bool)].min() > 0.1
    left = set(dict(network.named_parameters())) - set(learned(dict(network.named_parameters())))
    assert left == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}


def test_what_does_not_fit_is_refused(network: Any, images: Tensor) -> None:
    for call, message in {
        lambda: make_encoder("mae-nanu", 1, 20): "did you mean 'mae-nano'",
        lambda: make_encoder("mae-nano", 1, 30): "do not split into patches of 4",
        lambda: same_patches(network, make_encoder("mae-nano", 2, 16)): "cut images differently",
        lambda: ImageEncoder(network).tokens(images[:, :1]): "do not fit this encoder",
        lambda: projection_path(network.vit, "layers.0.mlp", "query"): "no query projection",
        lambda: few_labels(torch.tensor([0, 1, 1]), 2): "fewer than 2",
    }.items():
        with pytest.raises(UserError, match=message):
            call()


def test_query_projections_are_found_by_the_block(network: Any, images: Tensor) -> None:
    path = projection_path(network.vit, "layers.2", "query")
    with Taps(network.vit, {"q": path}) as taps, taps.recording() as features:
        encode(network.vit, images, torch.tensor([[3, 1]]).expand(5, -1))
    assert path.startswith("layers.2.attention")
    assert features["q"].shape == (5, 3, 48)


# --- folders ----------------------------------------------------------------------------------------------------------
def test_a_folder_of_transformers_goes_in_and_comes_out(network: Any, images: Tensor, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path / "whole")
    whole = sr.load(tmp_path / "whole")
    assert type(whole.network).__name__ == "ViTMAEForPreTraining"
    ImageEncoder(network.vit).save(tmp_path / "encoder", method="dmae")
    loaded = sr.load(tmp_path / "encoder")
    expected = encode(network.vit, images)[:, 1:].detach()
    torch.testing.assert_close(whole.tokens(images), expected)
    torch.testing.assert_close(loaded.tokens(images), expected)
    torch.testing.assert_close(loaded.features(images), expected.mean(1))
    from transformers import ViTMAEModel

    direct = ViTMAEModel.from_pretrained(tmp_path / "encoder").eval()
    torch.testing.assert_close(encode(direct, images)[:, 1:], expected)


def test_a_folders_own_normalisation_is_used(network: Any, images: Tensor, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    processor = {"image_mean": [0.4, 0.6], "image_std": [0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = ImageEncoder.load(tmp_path)
    by_hand = torch.stack([((images[:, i] + 1) / 2 - m) / s for i, (m, s) in enumerate([(0.4, 0.2), (0.6, 0.3)])], 1)
    torch.testing.assert_close(own_pixels(encoder.network, images), by_hand)
    torch.testing.assert_close(encoder.tokens(images), encode(network.vit, by_hand)[:, 1:].detach())
    encoder.save(tmp_path / "again")
    torch.testing.assert_close(ImageEncoder.load(tmp_path / "again").tokens(images), encoder.tokens(images))


def test_a_damaged_folder_is_named(network: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no image encoder"):
        ImageEncoder.load(tmp_path)
    network.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".3." not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit.*\.3\."):
        ImageEncoder.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        ImageEncoder.load(tmp_path)


def test_an_ordinary_vit_is_an_encoder_too(images: Tensor, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=12, patch_size=4,
        num_channels=2,
    )  # fmt: skip
    network = ViTModel(config).eval()
    network.save_pretrained(tmp_path)
    encoder = sr.load(tmp_path)
    torch.testing.assert_close(encoder.tokens(images), network(images).last_hidden_state[:, 1:].detach())
    with pytest.raises(UserError, match="cannot leave patches out"):
        encode(network, images, torch.zeros(5, 1, dtype=torch.long))


# --- probes -----------------------------------------------------------------------------------------------------------
def test_a_linear_probe_finds_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, 4, generator=generator)
    y = (x[:, 0] - 2 * x[:, 1] > 0).long()
    scaled = x * torch.tensor([1e3, 1.0, 1e-3, 1.0])
    (found,) = linear_probe(scaled[:200], y[:200], scaled[200:])
    assert float((found == y[200:]).float().mean()) > 0.95
    xor = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    (found,) = linear_probe(x[:200], xor[:200], x[200:])
    assert float((found == xor[200:]).float().mean()) < 0.7


def test_neighbours_vote_by_angle() -> None:
    train = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 5.0], [0.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert nearest_neighbours(train, labels, torch.tensor([[9.0, 1.0], [0.1, 0.2]]), k=2).tolist() == [0, 1]


def test_damage_is_what_it_says() -> None:
    images = torch.full((40, 1, 12, 12), -1.0)
    covered = occluded(images, 4) == 0
    per_patch = patchify(covered.float(), 4)
    assert per_patch.mean(-1).unique().tolist() == [0.0, 1.0]
    assert per_patch.mean(-1).sum(1).tolist() == [3.0] * 40
    assert len(torch.unique(per_patch.mean(-1), dim=0)) > 20
    torch.testing.assert_close(occluded(images, 4), occluded(images, 4))
    assert float((noisy(images) - images).std()) == pytest.approx(0.4, rel=0.05)


def test_fine_tuning_learns_and_leaves_the_encoder_as_it_was() -> None:
    torch.manual_seed(3)
    network = make_encoder("mae-nano", 1, 8)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images = torch.randn(40, 1, 8, 8)
    labels = (torch.arange(40) % 2).long()
    images[labels == 1, :, :4] += 2
    state = torch.random.get_rng_state()
    tuned = fine_tune(network, images, labels, 2, steps=30, batch=16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float((tuned(images).argmax(1) == labels).float().mean()) > 0.9
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before.items())
    mine = tuned.encoder.embeddings.position_embeddings
    assert torch.equal(mine, before["vit.embeddings.position_embeddings"])
    assert encoder_of(tuned) is tuned.encoder
    assert encoder_of(network) is network.vit


def test_a_student_that_is_its_teacher_agrees_with_it() -> None:
    torch.manual_seed(4)
    images = torch.randn(60, 1, 8, 8)
    labels = torch.arange(60) % 2
    images[labels == 1] *= 2
    data = ArrayData(images, {"label": labels}, ["a", "b"])
    encoder = ImageEncoder(make_encoder("mae-nano", 1, 8).vit)
    scores = probe_scores(encoder, data, data, encoder, tuning=2)
    assert scores["agreement"] == 1.0
    assert scores["cka"] == pytest.approx(1.0, abs=1e-4)
    other = probe_scores(encoder, data, data, ImageEncoder(make_encoder("mae-nano", 1, 8).vit), 2)
    assert other["cka"] < 0.999
    assert set(probe_scores(encoder, data, data, tuning=2)) == set(scores) - {"agreement", "cka"}
    assert isinstance(PooledClassifier(encoder.network, 2)(images), Tensor)
    assert isinstance(encoder.network, nn.Module)
