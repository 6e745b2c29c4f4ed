"""What benches of captions and pictures share."""

from __future__ import annotations

import torch

from stillroom.tasks.text_images.data import CaptionedData


def mismatched(data: CaptionedData) -> CaptionedData:
    """Every image of ``data`` and of its parts under the caption of an image picked at random."""
    order = torch.randperm(data.n, generator=torch.Generator().manual_seed(0))
    return CaptionedData(
        data.mean, data.captions, data.which[order], data.text, data.std, data.mirrored, data.mirrored_std,
        {name: mismatched(part) for name, part in data.parts.items()}, data.name, f"{data.origin}, captions shuffled",
    )  # fmt: skip
