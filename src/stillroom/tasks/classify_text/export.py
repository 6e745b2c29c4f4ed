"""A text classifier for other runtimes: one part, ids and mask of texts of any length to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stillroom.task import FileJudge, Part
from stillroom.tasks.parts import ROWS, Logits, accuracy_of, only_drawings_are_whole, token_ids

if TYPE_CHECKING:
    from stillroom.tasks.classify_text.model import TextClassifier

TOKENS = 12
"""Length of the random texts that a file is made, compared and timed with."""


def parts(model: TextClassifier, whole: bool) -> dict[str, Part]:
    """``model``."""
    only_drawings_are_whole(whole)
    names = ("input_ids", "attention_mask")
    axes = {name: {1: "length"} for name in names}
    example = token_ids(model.tokenizer, min(TOKENS, model.length))
    return {"model": Part(Logits(model.network, model.sampler, names), names, ("logits",), example, axes)}


def judge(model: TextClassifier, test: Any) -> FileJudge:
    rows = slice(min(ROWS, test.n))
    read = test.tokenised(model.tokenizer, model.length)
    return accuracy_of((read.array[rows], read.mask[rows].long()), test.labels[rows])
