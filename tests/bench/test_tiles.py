"""Tiles: the judge sees what is there, the renderer draws what is asked, held-out captions stay held out, and LightGen
trains on this bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.bench import get_bench
from stillroom.bench.captioned import mismatched
from stillroom.bench.tiles.bench import KINDS, WORDS, TileCodec, TilesBench, TileText
from stillroom.errors import UserError
from stillroom.proofs.base import Arm
from stillroom.proofs.lightgen import DPO, MANY_CAPTIONS, MIRRORED, PLAIN
from stillroom.proofs.runner import run_arm, train_arm


@pytest.fixture(scope="module")
def bench() -> TilesBench:
    return TilesBench()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def caption(*words: str) -> Tensor:
    return torch.tensor([[kind.index(word) for kind, word in zip(KINDS, words, strict=True)]])


RED_TEE = ("red", "tee", "right", "top")


def red_tee() -> Tensor:
    """Drawn by hand: two full rows over two narrow ones, in the top right cell."""
    image = torch.zeros(1, 3, 8, 8)
    colour = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    image[0, :, 0:2, 4:8] = colour
    image[0, :, 2:4, 5:7] = colour
    return image


# --- the judge --------------------------------------------------------------------------------------------------------
def judged(bench: TilesBench, image: Tensor, *words: str) -> str:
    return " ".join(name for name, share in bench.judge(image, caption(*words)).items() if share == 1.0)


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (RED_TEE, "one obj lr ud all"),
        (("red", "cup", "right", "top"), "one lr ud"),
        (("yellow", "tee", "right", "top"), "one lr ud"),
        (("red", "tee", "left", "top"), "one obj ud"),
        (("red", "tee", "right", "bottom"), "one obj lr"),
        (("blue", "ring", "left", "bottom"), "one"),
    ],
)
def test_the_judge_names_what_is_wrong(bench: TilesBench, words: tuple[str, ...], right: str) -> None:
    assert judged(bench, red_tee(), *words) == right


def test_a_second_thing_costs_one_and_all_but_not_the_rest(bench: TilesBench) -> None:
    image = red_tee()
    image[0, 2, 4:8, 0:4] = 0.8  # a blurred blue block, less marked than the tee
    image[0, :2, 4:8, 0:4] = -0.8
    image[0, :, 4:8, 0:4] *= 0.9
    assert judged(bench, image, *RED_TEE) == "obj lr ud"


def test_an_empty_or_faint_picture_has_nothing_right(bench: TilesBench) -> None:
    assert judged(bench, torch.zeros(1, 3, 8, 8), *RED_TEE) == ""
    assert judged(bench, 0.4 * red_tee(), *RED_TEE) == ""
    assert judged(bench, 0.6 * red_tee(), *RED_TEE) == "one obj lr ud all"


def test_scores_are_shares(bench: TilesBench) -> None:
    images = torch.cat([red_tee(), red_tee(), red_tee().flip(-1), torch.zeros(1, 3, 8, 8)])
    scores = bench.judge(images, caption(*RED_TEE).expand(4, -1))
    assert scores == {"one": 0.75, "obj": 0.75, "lr": 0.5, "ud": 0.75, "all": 0.5}


# --- the renderer -----------------------------------------------------------------------------------------------------
def test_the_renderer_draws_what_a_hand_draws_plus_noise(bench: TilesBench) -> None:
    images = bench.render(caption(*RED_TEE).expand(500, -1), seeded(0))
    torch.testing.assert_close(images.mean(0, keepdim=True), red_tee(), atol=0.012, rtol=0)
    assert float((images - red_tee()).std()) == pytest.approx(0.05, rel=0.02)


def test_the_renderer_is_deterministic(bench: TilesBench) -> None:
    first, again = (TilesBench().data(24, 100, mirror=True, pairs=10) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != bench.data(24, 100, mirror=True, pairs=10, seed=1).fingerprint
    asked = bench.asked(48)
    assert torch.equal(bench.render(asked, seeded(3)), bench.render(asked, seeded(3)))


def test_every_caption_is_drawn_to_the_judges_satisfaction(bench: TilesBench) -> None:
    every = torch.cat([bench.train, bench.held_out])
    assert bench.judge(bench.render(every, seeded(1)), every) == dict.fromkeys(("one", "obj", "lr", "ud", "all"), 1.0)
    assert bench.floor_of(48)["all"] == 1.0


def test_a_mirrored_picture_shows_the_same_thing_on_the_other_side(bench: TilesBench) -> None:
    every = torch.cat([bench.train, bench.held_out])
    other = every.clone()
    other[:, 2] = 1 - other[:, 2]
    mirrored = bench.render(every, seeded(1)).flip(-1)
    assert bench.judge(mirrored, other)["all"] == 1.0
    assert bench.judge(mirrored, every)["lr"] == 0.0


# --- captions and data ------------------------------------------------------------------------------------------------
def test_held_out_captions_never_train_and_every_word_does(bench: TilesBench) -> None:
    train, held_out = bench.say(bench.train), bench.say(bench.held_out)
    assert len(train) == 96
    assert len(held_out) == 24
    assert len({*train, *held_out}) == 120
    for count in (12, 24, 48, 96):
        data = bench.data(count, 8 * count, pairs=96)
        assert set(data.captions) | set(data.parts["pairs"].captions) <= set(train)
        assert {word for text in data.captions for word in text.split()} == set(WORDS)
    assert set(bench.say(bench.asked(480))) == set(held_out)


def test_pictures_lie_under_their_captions(bench: TilesBench) -> None:
    data = bench.data(24, 100, mirror=True, pairs=30)
    rows = bench.train[data.which]
    assert bench.say(rows) == [data.caption_of(i) for i in range(100)]
    assert bench.judge(data.mean, rows)["all"] == 1.0
    assert data.mirrored is not None
    assert torch.equal(data.mirrored, data.mean.flip(-1))
    pairs = data.parts["pairs"]
    assert pairs.mirrored is None
    assert bench.judge(pairs.mean, bench.train[pairs.which])["all"] == 1.0
    assert not torch.equal(pairs.mean[0], data.mean[0])


def test_shuffled_captions_are_those_of_other_pictures(bench: TilesBench) -> None:
    data = bench.data(48, 960, pairs=96)
    wrong = mismatched(data)
    assert torch.equal(wrong.mean, data.mean)
    assert torch.equal(wrong.which.bincount(), data.which.bincount())
    for mixed in (wrong, wrong.parts["pairs"]):
        assert bench.judge(mixed.mean, bench.train[mixed.which])["all"] < 0.1
    assert bench.judge(data.mean, bench.train[data.which])["all"] == 1.0


def test_unknown_amounts_are_refused(bench: TilesBench) -> None:
    with pytest.raises(UserError, match="96 training captions, not 97"):
        bench.data(97)


def test_words_are_told_apart_and_bad_captions_refused() -> None:
    text = TileText()
    states = text.encode(["red ring left top", ""])["encoder_hidden_states"]
    assert states.shape == (2, 4, text.width)
    assert states[0].argmax(1).tolist() == [WORDS.index(word) for word in ("red", "ring", "left", "top")]
    assert not states[1].any()
    for bad, why in (("red rings left top", "did you mean 'ring'"), ("red ring left", "not complete")):
        with pytest.raises(UserError, match=why):
            text.check(bad)
    with pytest.raises(UserError, match="not complete"):
        text.check("ring red left top")


def test_pixels_pass_the_codec_unchanged() -> None:
    codec, images = TileCodec(), 1.3 * torch.randn(2, 3, 8, 8, generator=seeded(0))
    mean, std = codec.moments(images)
    assert torch.equal(codec.decode(mean), images)
    assert not std.any()


# --- arms -------------------------------------------------------------------------------------------------------------
def short(arm: Arm, **changes: Any) -> Arm:
    return arm.with_(arm.name, options={"head_steps": 2}, engine={"steps": 2, "batch": 8}, **changes)


def test_an_arm_trains_and_is_scored() -> None:
    bench: Any = get_bench("tiles", 1)
    bench.n = 24
    result = run_arm(short(MANY_CAPTIONS), bench)
    assert set(result["scores"]) == {score.key for score in bench.scores}
    assert result["cost"]["steps"] == 2
    assert result["cost"]["nfe"] == 8


def test_shuffled_captions_change_what_is_learnt() -> None:
    arm, bench = short(MANY_CAPTIONS).with_("longer", engine={"steps": 4, "log_every": 1}), get_bench("tiles", 1)
    right, again, wrong = (
        torch.cat([value.flatten() for value in train_arm(one, bench)[0].state_dict().values()])
        for one in (arm, arm, arm.with_("wrong", teacher="shuffled"))
    )
    assert torch.equal(right, again)
    assert not torch.equal(right, wrong)


def test_preferences_start_from_the_mirrored_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path))
    mirrored = short(MIRRORED, after=short(PLAIN))
    arm = short(DPO, after=mirrored, data={"pairs": 8})
    still = arm.with_("still", engine={"optim": {"prefer": {"lr": 0.0, "weight_decay": 0.0}}})
    base = train_arm(mirrored, get_bench("tiles", 1))[0].state_dict()
    kept, _, facts = train_arm(still, get_bench("tiles", 1))
    assert all(torch.equal(value, base[name]) for name, value in kept.state_dict().items())
    assert "health/preference_accuracy" in facts["health"]
    moved = train_arm(arm, get_bench("tiles", 1))[0].state_dict()
    assert not all(torch.equal(value, base[name]) for name, value in moved.items())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # the student before mirroring, and after it


def test_a_diverged_student_has_nothing_right() -> None:
    broken = short(MANY_CAPTIONS).with_("broken", engine={"steps": 6, "optim": {"masked": {"lr": 1e12}}})
    result = run_arm(broken, get_bench("tiles"))
    assert "diverged" in result
    assert set(result["scores"].values()) == {0.0}
