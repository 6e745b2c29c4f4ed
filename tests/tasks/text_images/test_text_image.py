"""Text-to-image models: captions checked and encoded, latents there and back, folders of any size, mismatches named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.masking import MaskedSampler
from stillroom.diffusion.process import RectifiedFlow
from stillroom.errors import UserError
from stillroom.folders.denoisers import SIDE_FILE, WEIGHTS, load_denoiser
from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network, scheduler_config
from stillroom.networks.text_encoder import CONDITIONS, TextEncoder
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.text_images.model import TextImageGenerator
from tiny_text_images import FLOW, SIZES, WORDS, mar, noisy, pixart, sd3, tiny_codec, tiny_space, tiny_text

MAKE: dict[str, tuple[Any, Any]] = {
    "sd3": (sd3, FLOW), "pixart": (pixart, FLOW), "mar": (lambda: noisy(mar()), MaskedSampler(steps=2, head_steps=3)),
}  # fmt: skip
CAPTIONS = ["a red three", "blue seven left of a three", "a seven"]


@pytest.fixture(params=MAKE)
def generator(request: pytest.FixtureRequest) -> TextImageGenerator:
    make, sampler = MAKE[request.param]
    return TextImageGenerator(make(), sampler, tiny_space())


# --- text -------------------------------------------------------------------------------------------------------------
def test_features_are_padded_masked_and_pooled() -> None:
    text = tiny_text()
    found = text.encode(["a red three", "a seven"])
    states, mask, pooled = (found[name] for name in CONDITIONS)
    assert states.shape == (2, 8, 8)
    assert states.dtype == torch.float32
    assert mask.tolist() == [[True] * 4 + [False] * 4, [True] * 3 + [False] * 5]  # three words and the end; two
    assert bool((states[~mask] == 0).all())
    torch.testing.assert_close(pooled[1], states[1, :3].mean(0))
    assert (text.width, text.length) == (8, 8)


def test_features_do_not_depend_on_the_captions_beside_them() -> None:
    text = tiny_text()
    together, alone = text.encode(CAPTIONS, batch=2), text.encode(CAPTIONS[2:])
    for name in CONDITIONS:
        assert len(together[name]) == 3
        torch.testing.assert_close(together[name][2], alone[name][0])
    assert not torch.allclose(together["pooled_projections"][0], together["pooled_projections"][1])


def test_a_caption_that_is_asked_for_several_times_is_encoded_once(
    generator: TextImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [CAPTIONS[1], CAPTIONS[0], CAPTIONS[1], CAPTIONS[1]]
    encode, seen = generator.space.text.encode, []
    monkeypatch.setattr(generator.space.text, "encode", lambda texts: seen.append(list(texts)) or encode(texts))
    found = generator.cond(asked)
    assert seen == [CAPTIONS[1::-1]]
    expected = encode(asked)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_the_empty_caption_is_its_end_token_alone() -> None:
    found = tiny_text().encode([""])
    assert found["encoder_attention_mask"].sum() == 1
    assert bool((found["pooled_projections"] != 0).any())


def test_case_and_punctuation_do_not_matter() -> None:
    text = tiny_text()
    assert text.unknown_words("A red, three.") == []
    assert torch.equal(text.encode(["A red, three."])[CONDITIONS[0]], text.encode(["a red three"])[CONDITIONS[0]])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (3, "not int"),
        (None, "not NoneType"),
        (["a red three"], "not list"),
        ("a red tree", r"'tree' \(did you mean 'three'\?\)"),
        ("a purple cow", "'purple'.*'cow'"),
        ("a red " * 10, "has 21 tokens, 8 are read"),
        ("three " * 1700, "has 1,701 tokens"),
        ("x" * 10_000, "never shown"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_captions_that_cannot_be_drawn_are_refused(caption: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        tiny_text().check(caption)
    assert error.value.cure
    assert len(str(error.value)) < 500


def test_unknown_words_are_listed_once_in_order() -> None:
    assert tiny_text().unknown_words("a cow and a dog and a cow") == ["cow", "dog"]
    tiny_text().check("a red three and a blue seven")


def test_a_tokenizer_of_more_words_than_the_network_knows_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer knows 13 tokens.*encoder has 9 embeddings"):
        tiny_text(rows=9)


def test_the_name_follows_the_weights() -> None:
    text, other = tiny_text(), tiny_text()
    assert text.name.startswith("t5@")
    assert len(text.name) == 11
    assert text.name != other.name


# --- latents ----------------------------------------------------------------------------------------------------------
def test_latents_are_normalised_by_shift_and_scale() -> None:
    codec = tiny_codec()
    images = torch.rand(3, 3, 8, 12) * 2 - 1
    mean, std = codec.moments(images, batch=2)
    raw: Any = codec.network.encode(images).latent_dist  # type: ignore[operator]
    torch.testing.assert_close(mean, (raw.mean - 0.2) * 0.7)
    torch.testing.assert_close(std, raw.std * 0.7)
    assert mean.shape == (3, 2, 4, 6)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(codec.encode(images, noise), mean + std * noise)
    assert torch.equal(codec.encode(images), codec.moments(images)[0])


def test_decoding_undoes_the_normalisation_and_clamps() -> None:
    codec = tiny_codec()
    latents = 50 * torch.randn(3, 2, 4, 4)
    images = codec.decode(latents, batch=2)
    expected = codec.network.decode(latents / 0.7 + 0.2).sample.clamp(-1, 1)  # type: ignore[operator]
    torch.testing.assert_close(images, expected)
    assert float(images.abs().max()) == 1.0


def test_an_autoencoder_of_another_factor_and_without_shift_works() -> None:
    codec = tiny_codec(channels=16, blocks=4, shift_factor=None)
    assert (codec.channels, codec.factor, codec.shift, codec.grid((16, 32))) == (16, 8, 0.0, (2, 4))
    assert codec.decode(codec.encode(torch.zeros(1, 3, 16, 32))).shape == (1, 3, 16, 32)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 7, 8), r"7x8 pixels do not divide.*factor 2"),
        (torch.zeros(1, 1, 8, 8), r"reads images \[B, 3, H, W\], not \[1, 1, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"not \[3, 8, 8\]"),
    ],
)
def test_images_that_do_not_fit_the_codec_are_refused(images: Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny_codec().encode(images)


def test_latents_of_other_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"reads latents \[B, 2, h, w\], not \[1, 4, 4, 4\]"):
        tiny_codec().decode(torch.zeros(1, 4, 4, 4))


def test_frozen_parts_stay_frozen() -> None:
    space = tiny_space()
    space.text.train()
    space.codec.train()
    assert not any(p.requires_grad for part in (space.text, space.codec) for p in part.parameters())


# --- sampling ---------------------------------------------------------------------------------------------------------
def test_captions_become_images(generator: TextImageGenerator) -> None:
    images = generator.sample(CAPTIONS, seed=3)
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.float32
    assert float(images.abs().max()) <= 1
    assert torch.equal(generator.sample(CAPTIONS, seed=3), images)
    assert not torch.equal(generator.sample(CAPTIONS, seed=4), images)
    assert torch.equal(generator.sample("a seven", seed=[5]), generator.sample(["a seven"], seed=[5]))


def test_the_caption_reaches_the_image(generator: TextImageGenerator) -> None:
    same_noise = generator.sample(["a red three", "a blue seven"], seed=[1, 1])
    assert not torch.allclose(same_noise[0], same_noise[1], atol=1e-4)


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_an_image_depends_on_its_own_caption_and_seed_alone(kind: str) -> None:
    make, sampler = MAKE[kind]
    generator = TextImageGenerator(make(), sampler, tiny_space())
    together = generator.sample(CAPTIONS, seed=[7, 8, 9])
    torch.testing.assert_close(generator.sample(CAPTIONS[1:2], seed=[8])[0], together[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(generator.sample(CAPTIONS, seed=[7, 8, 9], batch=2), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        generator.sample(CAPTIONS[:2], seed=5), generator.sample(CAPTIONS, seed=5)[:2], rtol=1e-4, atol=1e-4
    )


def test_sampler_settings_can_be_changed_for_a_call(generator: TextImageGenerator) -> None:
    assert not torch.equal(generator.sample(CAPTIONS, guidance=1.0), generator.sample(CAPTIONS))
    assert generator.changed(steps=9).steps == 9  # type: ignore[attr-defined]
    assert generator.sampler.steps != 9  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"no setting 'guidence' \(did you mean 'guidance'\?\)"):
        generator.sample(CAPTIONS, guidence=2.0)


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_guidance_starts_from_the_empty_caption(kind: str) -> None:
    generator = TextImageGenerator(MAKE[kind][0](), FLOW, tiny_space())
    null, network = generator.space.text.encode([""]), generator.network
    expected = {"sd3": {CONDITIONS[0], CONDITIONS[2]}, "pixart": {CONDITIONS[0], CONDITIONS[1]}}[kind]
    assert isinstance(network, Denoiser)
    assert set(network.null) == expected
    for name in expected:
        assert torch.equal(network.null[name], null[name][0])
    x, cond = torch.randn(1, *network.shape), generator.cond(["a red three"])
    empty = {name: null[name] for name in expected}
    torch.testing.assert_close(network(x, 0.5, cond, guidance=0.0).value, network(x, 0.5, empty).value)


def test_other_sizes_are_drawn_or_refused(generator: TextImageGenerator) -> None:
    assert generator.sample(["a seven"], size=(12, 16)).shape == (1, 3, 12, 16)
    with pytest.raises(UserError, match=r"10x8 pixels.*5x4.*patches of 2.*multiples of 4"):
        generator.sample(["a seven"], size=(10, 8))
    with pytest.raises(UserError, match="factor 2"):
        generator.sample(["a seven"], size=(9, 8))


@pytest.mark.parametrize(
    ("captions", "seed", "words"),
    [
        ([], 0, "no samples"),
        (["a seven", ""], 0, "is empty"),
        (["a seven", "a zebra"], 0, "zebra"),
        (["a seven"], [1, 2], "2 seeds for 1 captions"),
    ],
)
def test_calls_that_make_no_sense_are_refused(captions: Any, seed: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextImageGenerator(sd3(), FLOW, tiny_space()).sample(captions, seed=seed)


def test_in_painting_fills_the_hole_and_nothing_else() -> None:
    make, sampler = MAKE["mar"]
    generator = TextImageGenerator(make(), sampler, tiny_space())
    images, hole = torch.rand(2, 3, 8, 8) * 2 - 1, torch.zeros(8, 8, dtype=torch.bool)
    hole[:3, 4:] = True
    filled = generator.inpaint(CAPTIONS[:2], images, hole, seed=1)
    assert torch.equal(filled[:, :, ~hole], images[:, :, ~hole])
    assert not torch.allclose(filled[:, :, hole], images[:, :, hole])
    with pytest.raises(UserError, match="do not fit each other"):
        generator.inpaint(CAPTIONS[:2], images, hole[:4], seed=1)
    with pytest.raises(UserError, match="cannot fill holes"):
        TextImageGenerator(sd3(), FLOW, tiny_space()).inpaint(CAPTIONS[:2], images, hole)


# --- folders ----------------------------------------------------------------------------------------------------------
def test_a_folder_gives_back_the_same_images(generator: TextImageGenerator, tmp_path: Path) -> None:
    generator.save(tmp_path / "model", trained_on="tests")
    back = TextImageGenerator.load(tmp_path / "model")
    assert torch.equal(back.sample(CAPTIONS, seed=4), generator.sample(CAPTIONS, seed=4))
    assert back.sampler == generator.sampler
    assert back.space.size == generator.space.size
    assert back.space.name == generator.space.name
    assert TextImageGenerator.holds(tmp_path / "model")
    assert json.loads((tmp_path / "model" / SIDE_FILE).read_text())["trained_on"] == "tests"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_components_are_shared(generator: TextImageGenerator, tmp_path: Path) -> None:
    generator.space.save(tmp_path / "space")
    generator.save(tmp_path / "a", components="../space")
    assert not (tmp_path / "a" / "vae").exists()
    assert TextImageGenerator.holds(tmp_path / "a")
    back = TextImageGenerator.load(tmp_path / "a")
    assert torch.equal(back.sample(CAPTIONS, seed=4), generator.sample(CAPTIONS, seed=4))
    shutil.rmtree(tmp_path / "space")
    with pytest.raises(UserError, match="space, which is not there"):
        TextImageGenerator.load(tmp_path / "a")


def test_half_precision_weights_come_back_as_they_were_rounded(tmp_path: Path) -> None:
    generator = TextImageGenerator(sd3(), FLOW, tiny_space())
    generator.save(tmp_path / "half", dtype=torch.float16)
    back = TextImageGenerator.load(tmp_path / "half")
    assert {p.dtype for p in back.network.parameters()} == {torch.float32}
    for a, b in zip(generator.network.parameters(), back.network.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)
    torch.testing.assert_close(back.sample(CAPTIONS), generator.sample(CAPTIONS), atol=0.05, rtol=0)


def test_a_pipeline_folder_of_other_sizes_is_read(tmp_path: Path) -> None:
    """As diffusers and transformers write it: factor 8, 16 channels, another text width, no stillroom.json."""
    from diffusers import DDIMScheduler

    text, codec = tiny_text(width=12, length=20, words=(*WORDS, "cow")), tiny_codec(16, 4, shift_factor=None)
    network: Any = pixart(width=12, channels=16).network
    network.save_pretrained(tmp_path / "transformer")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    codec.network.save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    text.network.save_pretrained(tmp_path / "text_encoder")  # type: ignore[operator]
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert TextImageGenerator.holds(tmp_path)
    generator = TextImageGenerator.load(tmp_path)
    assert (generator.space.text.width, generator.space.text.length, generator.space.size) == (12, 20, (32, 32))
    assert (generator.space.codec.factor, generator.space.shape) == (8, (16, 4, 4))
    assert generator.sample("a cow and a seven", steps=2).shape == (1, 3, 32, 32)


def test_a_sharded_network_is_read(tmp_path: Path) -> None:
    network: Any = sd3().network
    network.save_pretrained(tmp_path / "transformer", max_shard_size="8KB")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config(RectifiedFlow(), "v")))
    assert not (tmp_path / "transformer" / WEIGHTS).exists()
    back = load_denoiser(tmp_path).network
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), back.parameters(), strict=True))


def test_the_encoder_s_long_limit_is_cut(tmp_path: Path) -> None:
    text = tiny_text(length=512)
    text.save(tmp_path)
    assert TextEncoder.load(tmp_path).length == 128
    assert TextEncoder.load(tmp_path, length=200).length == 200


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: sd3(width=12), r"SD3Transformer2DModel reads text features of width 12 .*encoder makes 8"),
        (lambda: pixart(width=12), r"PixArtTransformer2DModel reads text features of width 12 .*encoder makes 8"),
        (lambda: mar(width=12), r"MAR reads text features of width 12 .*encoder makes 8"),
        (lambda: sd3(channels=4), "latents of 4 channels, the autoencoder makes 2"),
        (lambda: mar(channels=4), "latents of 4 channels, the autoencoder makes 2"),
    ],
)  # fmt: skip
def test_networks_of_another_space_are_refused(network: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextImageGenerator(network(), FLOW, tiny_space())


def test_a_network_without_text_is_refused() -> None:
    network = make_network(
        "DiTTransformer2DModel", {**SIZES, "in_channels": 2, "out_channels": 2, "num_embeds_ada_norm": 3}
    )
    denoiser = denoiser_from_diffusers(network, scheduler_config(RectifiedFlow(), "v"))
    with pytest.raises(UserError, match="DiTTransformer2DModel reads no text"):
        TextImageGenerator(denoiser, FLOW, tiny_space())


def test_a_size_that_the_factor_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="7x8 pixels"):
        tiny_space((7, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TextImageGenerator(sd3(), FLOW, tiny_space()).save(tmp_path)
    return tmp_path


def cut(*parts: str) -> Any:
    return lambda folder: folder.joinpath(*parts).write_bytes(folder.joinpath(*parts).read_bytes()[:-20])


def changed(*parts: str, **values: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder.joinpath(*parts)
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "no vae/"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "no text_encoder/"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer/"),
        (lambda f: (f / "vae" / WEIGHTS).unlink(), "vae holds no weights"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "text_encoder holds no weights"),
        (lambda f: (f / "vae" / "config.json").unlink(), r"vae/config\.json is missing"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer"),
        (cut("vae", WEIGHTS), "vae"),
        (cut("text_encoder", "model.safetensors"), "text_encoder"),
        (changed("vae", "config.json", latent_channels=3), "vae"),
        (changed("vae", "config.json", _class_name="VQModel"), "holds a VQModel"),
        (changed("text_encoder", "config.json", d_ff=20), "text_encoder"),
        (changed("text_encoder", "config.json", num_layers=2), "text_encoder"),
        (changed("text_encoder", "config.json", architectures=["CLIPTextModel"]), "holds a CLIPTextModel"),
        (changed("transformer", "config.json", joint_attention_dim=9), r"do not fit their config\.json"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_with_its_part(damage: Any, words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        TextImageGenerator.load(folder)
    assert error.value.cure


def test_a_masked_generator_is_no_denoiser(tmp_path: Path) -> None:
    TextImageGenerator(mar(), MaskedSampler(steps=2, head_steps=2), tiny_space()).save(tmp_path)
    with pytest.raises(UserError, match="masked generator"):
        ImageGenerator.load(tmp_path)
    assert not TextImageGenerator.holds(tmp_path / "network")
