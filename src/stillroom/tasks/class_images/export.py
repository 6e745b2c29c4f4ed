"""A generator of classes for other runtimes: its network's call, and the whole of a one-step generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from stillroom.errors import UserError
from stillroom.task import Part
from stillroom.tasks.parts import Example, denoiser_facts, denoiser_parts, exported_denoiser

if TYPE_CHECKING:
    from stillroom.tasks.class_images.model import ImageGenerator


def parts(model: ImageGenerator, whole: bool) -> dict[str, Part]:
    """``model``, and ``generator`` for the ``whole``. Raises UserError for conditions that are no classes."""
    denoiser = exported_denoiser(model.denoiser)
    names = tuple(denoiser.null) or (("label",) if model.classes else ())
    return denoiser_parts(denoiser, model.sampler, names, labels(model, names), whole)


def facts(model: ImageGenerator) -> dict[str, Any]:
    named = {"classes": model.classes} if model.classes else {}
    return named | denoiser_facts(exported_denoiser(model.denoiser), model.sampler)


def labels(model: ImageGenerator, names: tuple[str, ...]) -> Example:
    """Random classes."""
    unknown = [name for name in names if name != "label"]
    if unknown:
        raise UserError(f"the network reads the condition {unknown[0]!r}", cure="export a model of classes or captions")
    classes = len(model.classes) or int(model.denoiser.null.get("label", 0)) or 1
    return lambda batch, generator: tuple(torch.randint(classes, (batch,), generator=generator) for _ in names)
