"""How the scenes' shared parts and teachers are trained: exact pieces, and a whole run of the smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.bench.scenes import teach as teach_scenes
from stillroom.bench.scenes.bench import ScenesBench
from stillroom.bench.scenes.teach import (
    OF_A_THING,
    CaptionTokens,
    EndlessScenes,
    Reader,
    answers,
    full_scenes,
    make_tokenizer,
    normalise,
    override,
    start_as_identity,
    teacher_captions,
)
from stillroom.bench.teach import TeacherRecipe, teach
from stillroom.data.scenes.captions import (
    CATEGORIES,
    COLOURS,
    DIGIT_WORDS,
    HELD_COLOURS,
    PLURALS,
    all_captions,
    parse_caption,
    seeded,
    vocabulary,
)
from stillroom.errors import UserError
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.tasks.text_images.model import TextImageGenerator
from tiny_text_images import tiny_codec


def test_the_tokenizer_knows_every_word_and_every_caption_fits() -> None:
    tokenizer = make_tokenizer(vocabulary(), 16)
    assert len(tokenizer) == len(vocabulary()) + 3
    texts = [c.text for category in CATEGORIES for split in ("train", "heldout") for c in all_captions(category, split)]
    tokens = tokenizer(texts).input_ids
    assert max(map(len, tokens)) <= 16
    assert all(tokenizer.unk_token_id not in row and row[-1] == tokenizer.eos_token_id for row in tokens)


def test_endless_scenes_follow_from_seed_and_step() -> None:
    data = EndlessScenes()
    whole = data.batch(1, 5, 8, slice(0, 8))["x"]
    assert torch.equal(data.batch(1, 5, 8, slice(4, 8))["x"], whole[4:])
    assert whole.shape == (8, 3, 32, 32)
    assert float(whole.min()) >= -1
    assert not torch.equal(data.batch(1, 6, 8, slice(0, 8))["x"], whole)
    assert {data.batch(0, step, 4, slice(0, 4))["x"].shape[-1] for step in range(8)} == {24, 32, 48}


def test_full_scenes_hold_four_digits_and_nothing_that_is_held_out() -> None:
    scenes = full_scenes(200, seeded("test"))
    assert all(len(scene.things) == 4 for scene in scenes)
    assert not {(t.digit, t.colour) for scene in scenes for t in scene.things} & HELD_COLOURS


def test_normalising_folds_the_moments_into_the_network_and_changes_no_image() -> None:
    torch.manual_seed(1)
    network: Any = tiny_codec(channels=3, scaling_factor=0.5).network
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        before = network.encode(images).latent_dist
        image = network.decode(before.mean).sample
        normalise(network, images)
        after = network.encode(images).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    scale = before.mean.std((0, 2, 3))[:, None, None]
    torch.testing.assert_close(after.std, before.std / scale, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(network.decode(after.mean).sample, image, rtol=1e-3, atol=1e-3)
    assert (network.config["scaling_factor"], network.config["shift_factor"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("a three above a seven", (1, 3, 6, 2, 1), (4, 7, 6, 3, 1)),
        ("three fives", (1, 5, 6, 4, 2), (1, 5, 6, 4, 2)),
        ("a red four and a blue nine", (2, 4, 0, 4, 1), (6, 9, 2, 4, 1)),
        ("the digit two", (2, 2, 6, 4, 0), (2, 2, 6, 4, 0)),
    ],
)
def test_answers_say_what_a_caption_means(text: str, first: Any, second: Any) -> None:
    assert answers(parse_caption(text)) == [*first, *second]


def test_every_answer_is_one_of_its_question_s_and_stands_at_its_word() -> None:
    limits = [*2 * (11, *OF_A_THING.values())]
    for category in CATEGORIES:
        for caption in all_captions(category)[::97]:
            found, words = answers(caption), caption.text.split()
            assert all(0 <= answer < limit for answer, limit in zip(found, limits, strict=True))
            for start, want in ((0, caption.wants[0]), (5, caption.wants[-1])):
                assert words[found[start]] in (DIGIT_WORDS[want.digit], PLURALS[want.digit])


def test_the_reader_reads_features_of_the_asked_words() -> None:
    tokenizer = make_tokenizer(vocabulary(), 16)
    batch = CaptionTokens(tokenizer, 16).read([parse_caption("a red four and a blue nine")] * 2)
    features, reader = torch.zeros(2, 16, 4), Reader(4, len(tokenizer))
    features[1, 6] = 1.0  # "nine"
    asked = reader(features, batch)
    assert len(asked) == 1 + 2 * len(OF_A_THING)
    assert torch.equal(asked["word 1: digit"][0][0], asked["word 1: digit"][0][1])
    assert not torch.equal(asked["word 2: digit"][0][0], asked["word 2: digit"][0][1])
    assert asked["word 2: colour"][1].tolist() == [COLOURS.index("blue")] * 2
    logits, tokens = asked["word"]
    assert logits.shape == (16, len(tokenizer))  # seven words and the end, twice
    assert " ".join(tokenizer.convert_ids_to_tokens(tokens[:8].tolist())) == "a red four and a blue nine </s>"


def test_captions_of_teachers_hold_what_is_hard_more_often_and_nothing_held_out() -> None:
    captions = teacher_captions(3000, 0)
    counts = {category: sum(c.category == category for c in captions) for category in CATEGORIES}
    assert captions[:50] == teacher_captions(50, 0)
    assert counts["position"] > 1.5 * counts["single"]
    assert min(counts.values()) > 200
    assert all(caption.belongs_to("train") for caption in captions)


@pytest.mark.parametrize("name", ["scenes-sd3", "scenes-pixart"])
def test_teachers_start_as_the_identity_and_learn_from_there(name: str) -> None:
    denoiser = TeacherRecipe.load(name, ["config.num_layers=1"]).denoiser()
    start_as_identity(denoiser.network)
    cond = {"encoder_hidden_states": torch.randn(2, 16, 64), "pooled_projections": torch.randn(2, 64)}
    cond = {k: v for k, v in cond.items() if name == "scenes-sd3" or k == "encoder_hidden_states"}
    value = denoiser(torch.randn(2, 4, 8, 8), 0.5 * denoiser.process.t_max, cond).value
    assert bool((value == 0).all())
    (value - 1).square().sum().backward()
    output: Any = denoiser.network.proj_out
    assert float(output.weight.grad.abs().max()) > 0


def test_overrides_reach_inside_and_typos_do_not() -> None:
    values = {"codec": {"engine": {"steps": 5}}}
    assert override(values, ["codec.engine.steps=7", "codec.engine.new=[1, 2]"]) == {
        "codec": {"engine": {"steps": 7, "new": [1, 2]}}
    }
    for wrong in ("codec.engin.steps=7", "steps", "codec.engine.steps", "codec.engine.steps.more=1", "steps=1"):
        with pytest.raises(UserError, match="is not understood"):
            override({"codec": {"engine": {"steps": 5}}}, [wrong])


@pytest.mark.slow
def test_space_and_teacher_of_the_smallest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, killed once in between: parts, encoded data, training, scores, folders that share the parts."""
    short = ["codec.engine.steps=2", "codec.engine.batch=4", "text.engine.steps=2", "text.engine.batch=4"]
    card = teach_scenes.teach_space(ScenesBench(), tmp_path / "space", [*short, "evaluate.n=300"])
    assert set(card["text"]["accuracy"]) == {"train", "heldout"}
    assert card["codec"]["psnr"] > 0
    assert TextImageSpace.load(tmp_path / "space").name == f"{card['text']['name']}, {card['codec']['name']}"
    assert json.loads((tmp_path / "space" / "card.json").read_text())["cost"]["codec"]["steps"] == 2

    small = TeacherRecipe.load("scenes-sd3", ["engine.steps=4", "engine.batch=4", "config.num_layers=1"])
    small.images, small.evaluate["n"] = 40, 12
    small.evaluate["samplers"] = [{"solver": "euler", "steps": 2, "guidance": w} for w in (1.0, 2.0)]
    monkeypatch.setattr(TeacherRecipe, "load", lambda name, overrides: small)
    monkeypatch.setattr(teach_scenes, "ASSETS", tmp_path)
    (tmp_path / "space").rename(tmp_path / "scenes-space")
    card = teach("scenes-sd3", run_dir=tmp_path / "run")
    generator = TextImageGenerator.load(tmp_path / "scenes-sd3")
    assert card["space"] == generator.space.name
    assert [row["scores"]["n"] for row in card["samplers"]] == [12, 12]
    assert card["best"]["sampler"] == generator.sampler.to_dict()
    assert json.loads((tmp_path / "scenes-sd3" / "stillroom.json").read_text())["components"] == "../scenes-space"
    again = teach("scenes-sd3", tmp_path / "again", run_dir=tmp_path / "run", resume=True)
    assert again["samplers"][0]["scores"] == card["samplers"][0]["scores"]
