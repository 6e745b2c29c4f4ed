"""An image encoder for other runtimes: one part, images to patch tokens and their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stillroom.data.source import load_data
from stillroom.evaluation.probes import linear_probe, nearest_neighbours
from stillroom.networks.mae import encode
from stillroom.networks.vit import encoder_of
from stillroom.task import FileJudge, Part, Runner
from stillroom.tasks.parts import ROWS, answers, only_drawings_are_whole, pixels, share_right

if TYPE_CHECKING:
    from stillroom.tasks.encode.model import ImageEncoder

PROBE = 3000
"""Labelled training rows that a probe learns from."""


class Features(nn.Module):
    """Images ``[B, C, H, W]`` in [-1, 1] to patch tokens ``[B, patches, D]`` and their mean."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = encoder_of(network)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = encode(self.network, images)[:, 1:].float()
        return tokens, tokens.mean(1)


def parts(model: ImageEncoder, whole: bool) -> dict[str, Part]:
    """``model``."""
    only_drawings_are_whole(whole)
    config: Any = encoder_of(model.network).config
    inputs = pixels((config.num_channels, config.image_size, config.image_size))
    return {"model": Part(Features(model.network), ("images",), ("tokens", "features"), inputs)}


def judge(data: str, test: Any) -> FileJudge:
    """A linear probe of the mean tokens, and their neighbours, on the test rows."""
    rows, train = slice(min(ROWS, test.n)), load_data(data, "train", test.shape)
    asked, labels = (test.images(rows),), test.labels[rows]
    seen, known = (train.images(slice(PROBE)),), train.labels[:PROBE]

    def probe(runner: Runner) -> dict[str, float]:
        learned, features = answers(runner, seen, 1), answers(runner, asked, 1)
        (found,) = linear_probe(learned, known, features)
        near = nearest_neighbours(learned, known, features)
        return {"probe": share_right(found, labels), "knn": share_right(near, labels), "n": len(labels)}

    return probe
