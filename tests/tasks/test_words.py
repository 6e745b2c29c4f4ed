"""Words of the model cards: what a student began as is said only where it did."""

from __future__ import annotations

import pytest

from stillroom.folders.image_networks import ARCHITECTURES
from stillroom.recipe import Recipe
from stillroom.tasks.words import began


@pytest.mark.parametrize(
    ("method", "student", "teacher", "options", "words"),
    [
        ("meal-v2", "", "a,b", [], "that began as its teacher `a`"),
        ("meal-v2", "resnet-small", "a", [], "of the form `resnet-small`, trained from new weights"),
        ("meal-v2", "runs/x", "a", [], "that began as `runs/x`"),
        ("gt-self-distill", "runs/x", "", [], "of the form `runs/x`, trained from new weights"),
        ("gt-self-distill", "runs/x", "", ["options.start=given"], "that began as `runs/x`"),
        ("ernie-tiny", "own.json", "big,tuned", [], "of the form `own.json`, trained from new weights"),
        ("ernie-tiny", "own.json", "big", ["options.start=teacher"],
         "of the form `own.json`, that began with layers of `big`"),
    ],
)  # fmt: skip
def test_a_student_is_said_to_have_begun_as_what_it_did(
    method: str, student: str, teacher: str, options: list[str], words: str
) -> None:
    assert began(Recipe.load(method, options, student=student, teacher=teacher), ARCHITECTURES) == words
