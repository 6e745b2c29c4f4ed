"""Stand-ins for public data: rows of the right shape and classes that take no memory."""

from __future__ import annotations

import torch

from stillroom.data.blank import BlankImages, blank
from stillroom.folders.public import DATA


def test_blank_images_are_rows_without_memory() -> None:
    data = blank(DATA["imagenet"])
    assert isinstance(data, BlankImages)
    assert (data.shape, data.n, len(data.classes)) == ((3, 224, 224), 50_000, 1000)
    assert data.array.untyped_storage().nbytes() == 3 * 224 * 224
    taken = data.take(torch.arange(5, 2005))
    assert taken.array.untyped_storage().nbytes() == 3 * 224 * 224
    assert taken.labels[:3].tolist() == [5, 6, 7]
    assert taken.images(slice(7)).shape == (7, 3, 224, 224)
    assert data.batch(0, 0, 8)["x"].shape == (8, 3, 224, 224)
    assert all((data.labels == label).sum() == 50 for label in (0, 999))
