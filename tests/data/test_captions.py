"""The language of the scenes world: what it can say, what it keeps back, and what a picture must hold to obey."""

from __future__ import annotations

import itertools

import pytest
import torch

from stillroom.data.scenes.captions import (
    CATEGORIES,
    COLOURS,
    DIGIT_WORDS,
    HELD_COLOURS,
    HELD_COUNTS,
    HELD_PAIRS,
    Caption,
    Scene,
    Thing,
    Want,
    all_captions,
    categories,
    distinct_captions,
    draw_scene,
    draw_scenes,
    mirror_breaks,
    parse_caption,
    sample_captions,
    satisfied,
    vocabulary,
)
from stillroom.data.scenes.pictures import mirrored
from stillroom.errors import UserError

RED, GREEN, BLUE, *_ = range(len(COLOURS))
EVERY = [(c, s) for s in ("train", "heldout") for c in categories(s)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(*things: tuple[int, int, int]) -> Scene:
    """``(cell, digit, colour)`` each."""
    return Scene(tuple(Thing(*thing) for thing in things))


def named_together(caption: Caption) -> tuple[set[frozenset[int]], set[tuple[int, int]], set[tuple[int, int]]]:
    """Pairs of digits, (digit, colour) and (count, digit) of a caption, found from its words alone."""
    words = caption.text.replace("an eight", "a eight").split()
    digits = [DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS]
    colours = [COLOURS.index(word) for word in words if word in COLOURS]
    if caption.category == "counting":
        plurals = [word + ("es" if word == "six" else "s") for word in DIGIT_WORDS]
        (kind,) = (plurals.index(word) for word in words if word in plurals)
        return set(), set(), {(digits[0], kind)}
    pairs = {frozenset(pair) for pair in itertools.combinations(digits, 2)}
    return pairs, set(zip(digits, colours)) if colours else set(), set()


# --- grammar ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "category", "wants", "relation"),
    [
        ("a photo of a seven", "single", (Want(7),), ""),
        ("a seven and a three", "two", (Want(7), Want(3)), ""),
        ("three fives", "counting", (Want(5), Want(5), Want(5)), ""),
        ("exactly two twos", "counting", (Want(2), Want(2)), ""),
        ("a red four", "colours", (Want(4, RED),), ""),
        ("a three to the left of a seven", "position", (Want(3), Want(7)), "left"),
        ("below an eight is a one", "position", (Want(1), Want(8)), "below"),
        ("a two at the top and an eight at the bottom", "position", (Want(2), Want(8)), "above"),
        ("a red three and a blue seven", "attribution", (Want(3, RED), Want(7, BLUE)), ""),
        ("an eight in green and a one in red", "attribution", (Want(8, GREEN), Want(1, RED)), ""),
    ],
)
def test_captions_mean_what_they_say(text: str, category: str, wants: tuple[Want, ...], relation: str) -> None:
    assert parse_caption(text) == Caption(text, category, wants, relation)


def test_parsing_inverts_the_whole_grammar() -> None:
    captions = [caption for category, split in EVERY for caption in all_captions(category, split)]
    assert len({caption.text for caption in captions}) == len(captions) > 7000
    assert all(parse_caption(caption.text) == caption for caption in captions)
    assert parse_caption("  A red  Three and a BLUE seven ").text == "a red three and a blue seven"


def test_the_language_is_small() -> None:
    assert len(vocabulary()) < 90
    assert all(word.isalpha() and word.islower() for word in vocabulary())
    assert max(len(c.text.split()) for category, split in EVERY for c in all_captions(category, split)) <= 15
    assert "a eight" not in {c.text for c in all_captions("single")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a photo of a sevn", "did you mean 'seven'"),
        ("a seven and a and a three", "does not say it so"),
        ("five fives", "does not say it so"),
        ("a seven and a seven", "does not say it so"),
        ("   ", "empty"),
    ],
)
def test_what_is_outside_the_grammar_is_refused_with_a_cure(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_caption(text)


def test_unknown_categories_and_splits_are_refused() -> None:
    with pytest.raises(UserError, match="'position'"):
        all_captions("positions")
    with pytest.raises(UserError, match="heldout"):
        all_captions("two", "test")


# --- splits -----------------------------------------------------------------------------------------------------------
def test_no_held_out_combination_is_ever_drawn_in_training() -> None:
    for caption in sample_captions(20_000, generator()):
        pairs, coloured, counts = named_together(caption)
        assert not pairs & HELD_PAIRS, caption.text
        assert not coloured & HELD_COLOURS, caption.text
        assert not counts & HELD_COUNTS, caption.text


@pytest.mark.parametrize("category", categories("heldout"))
def test_held_out_captions_hold_nothing_else(category: str) -> None:
    for caption in all_captions(category, "heldout"):
        pairs, coloured, counts = named_together(caption)
        assert pairs | coloured | counts, caption.text
        assert pairs <= HELD_PAIRS, caption.text
        assert coloured <= HELD_COLOURS, caption.text
        assert counts <= HELD_COUNTS, caption.text


def test_every_word_occurs_in_training() -> None:
    seen = {word for category in CATEGORIES for c in all_captions(category) for word in c.text.split()}
    assert seen == set(vocabulary())


def test_training_pictures_hold_no_held_out_colour() -> None:
    captions = sample_captions(5_000, generator())
    things = {(t.digit, t.colour) for s in draw_scenes(captions, generator(1)) for t in s.things}
    assert not things & HELD_COLOURS
    assert len(things) == 60 - len(HELD_COLOURS)


def test_every_digit_and_colour_has_training_partners() -> None:
    for digit in range(10):
        assert sum(digit in pair for pair in HELD_PAIRS) == 2
        assert 1 <= sum(held == digit for held, _ in HELD_COLOURS) <= 2
    assert {sum(c == held for _, held in HELD_COLOURS) for c in range(len(COLOURS))} == {2}


# --- sampling ---------------------------------------------------------------------------------------------------------
def test_sampling_is_by_category_and_repeatable() -> None:
    captions = sample_captions(6_000, generator(3))
    counts = [sum(c.category == category for c in captions) for category in CATEGORIES]
    assert all(abs(count - 1000) < 120 for count in counts)  # 4 standard deviations
    assert sample_captions(50, generator(3)) == captions[:50]
    assert sample_captions(50, generator(4)) != captions[:50]
    assert {c.category for c in sample_captions(500, generator(), "heldout")} == set(CATEGORIES) - {"single"}


def test_distinct_captions_are_nested_spread_and_distinct() -> None:
    large = distinct_captions(600, seed=5)
    assert distinct_captions(24, seed=5) == large[:24]
    assert distinct_captions(24, seed=6) != large[:24]
    assert [c.category for c in large[:12]] == [*CATEGORIES, *CATEGORIES]
    assert len({c.text for c in large}) == 600
    total = sum(len(all_captions(category)) for category in CATEGORIES)
    assert len({c.text for c in distinct_captions(total)}) == total
    with pytest.raises(UserError, match="fewer"):
        distinct_captions(total + 1)


# --- judging ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "things", "obeys"),
    [
        ("a seven", [(3, 7, RED)], True),
        ("a seven", [(3, 1, RED)], False),
        ("a seven", [], False),
        ("a seven", [(3, 7, RED), (0, 1, RED)], False),
        ("a seven", [(3, 7, RED), (0, 7, RED)], False),
        ("a seven and a three", [(0, 3, RED), (1, 7, RED)], True),
        ("a seven and a three", [(0, 7, RED), (1, 7, RED)], False),
        ("a seven and a three", [(0, 7, RED), (1, 3, RED), (2, 3, RED)], False),
        ("three fives", [(0, 5, RED), (1, 5, BLUE), (3, 5, RED)], True),
        ("three fives", [(0, 5, RED), (1, 5, BLUE)], False),
        ("three fives", [(0, 5, RED), (1, 5, BLUE), (2, 5, RED), (3, 5, RED)], False),
        ("three fives", [(0, 5, RED), (1, 5, BLUE), (2, 6, RED)], False),
        ("a red four", [(2, 4, RED)], True),
        ("a red four", [(2, 4, BLUE)], False),
        ("a three to the left of a seven", [(0, 3, RED), (1, 7, RED)], True),
        ("a three to the left of a seven", [(0, 3, RED), (3, 7, RED)], True),
        ("a three to the left of a seven", [(1, 3, RED), (0, 7, RED)], False),
        ("a three to the left of a seven", [(0, 3, RED), (2, 7, RED)], False),
        ("a three to the right of a seven", [(3, 3, RED), (0, 7, RED)], True),
        ("a three above a seven", [(1, 3, RED), (2, 7, RED)], True),
        ("a three above a seven", [(0, 3, RED), (1, 7, RED)], False),
        ("a three below a seven", [(1, 3, RED), (2, 7, RED)], False),
        ("a three above a seven", [(0, 3, RED), (2, 7, RED), (1, 1, RED)], False),
        ("a red three and a blue seven", [(3, 7, BLUE), (1, 3, RED)], True),
        ("a red three and a blue seven", [(3, 7, RED), (1, 3, BLUE)], False),
        ("a red three and a blue seven", [(3, 7, BLUE), (1, 3, RED), (0, 0, RED)], False),
    ],
)
def test_satisfied_by_hand(text: str, things: list[tuple[int, int, int]], obeys: bool) -> None:
    assert satisfied(parse_caption(text), scene(*things)) is obeys


@pytest.mark.parametrize(("category", "split"), EVERY)
def test_drawn_scenes_obey_their_caption_and_no_other_kind(category: str, split: str) -> None:
    captions = all_captions(category, split)[:300]
    scenes = draw_scenes(captions, generator())
    assert all(satisfied(c, s) for c, s in zip(captions, scenes))
    more = (Scene((*s.things, Thing(free_cell(s), 1, RED)), 0) for s in scenes if len(s.things) < 4)
    assert not any(satisfied(c, s) for c, s in zip([c for c in captions if len(c.wants) < 4], more))


def free_cell(found: Scene) -> int:
    return min(set(range(4)) - {thing.cell for thing in found.things})


def test_scenes_use_every_place_and_repeat_by_seed() -> None:
    caption = parse_caption("a three to the left of a seven")
    draws = generator()
    places = {tuple(t.cell for t in draw_scene(caption, draws).things) for _ in range(200)}
    assert places == {(0, 1), (0, 3), (2, 1), (2, 3)}
    captions = [caption] * 9
    assert draw_scenes(captions, generator(1)) == draw_scenes(captions * 2, generator(1))[:9]
    assert draw_scenes(captions, generator(1)) != draw_scenes(captions, generator(2))


def test_impossible_scenes_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="one cell"):
        scene((0, 1, RED), (0, 2, RED))
    with pytest.raises(ValueError, match="no such thing"):
        Thing(4, 1, RED)


# --- mirroring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("category", "split"), EVERY)
def test_mirroring_breaks_exactly_the_captions_it_is_said_to(category: str, split: str) -> None:
    captions = all_captions(category, split)
    for caption, drawn in zip(captions, draw_scenes(captions, generator())):
        assert satisfied(caption, mirrored(drawn)) is not mirror_breaks(caption), caption.text
        assert mirrored(mirrored(drawn)) == drawn


def test_mirror_breaks_left_and_right_only() -> None:
    assert mirror_breaks(parse_caption("a three on the left and a seven on the right"))
    assert not mirror_breaks(parse_caption("a three above a seven"))
    assert not mirror_breaks(parse_caption("a seven and a three"))
