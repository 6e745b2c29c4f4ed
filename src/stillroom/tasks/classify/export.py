"""An image classifier for other runtimes: one part, images to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stillroom.errors import UserError
from stillroom.folders.image_networks import config_of
from stillroom.task import FileJudge, Part
from stillroom.tasks.parts import ROWS, Logits, accuracy_of, only_drawings_are_whole, pixels

if TYPE_CHECKING:
    from stillroom.tasks.classify.model import ImageClassifier


def parts(model: ImageClassifier, whole: bool, size: tuple[int, int] | None) -> dict[str, Part]:
    """``model``. Raises UserError where neither config nor ``size`` says how large images are."""
    only_drawings_are_whole(whole)
    config = config_of(model.network)
    own = getattr(config, "image_size", None)
    if own is not None:
        size = (own, own) if isinstance(own, int) else tuple(own)
    if size is None:
        raise UserError(
            "the classifier's config does not say how large its images are", cure="give --data, for example fashion"
        )
    inputs = pixels((config.num_channels, *size))
    return {"model": Part(Logits(model.network, model.sampler), ("images",), ("logits",), inputs)}


def judge(test: Any) -> FileJudge:
    rows = slice(min(ROWS, test.n))
    return accuracy_of((test.images(rows),), test.labels[rows])
