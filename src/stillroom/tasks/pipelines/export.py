"""A pipeline's network for other runtimes; the pipeline itself is what its folder is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stillroom.errors import UserError
from stillroom.task import Part
from stillroom.tasks.parts import denoiser_facts, denoiser_parts, exported_denoiser, text_features

if TYPE_CHECKING:
    from stillroom.tasks.pipelines.model import PipelineGenerator


def parts(model: PipelineGenerator, whole: bool) -> dict[str, Part]:
    """``model``, the network's call. Raises UserError where the ``whole`` is asked for."""
    if whole:
        raise UserError("a diffusers pipeline stays whole as its folder", cure="leave --whole out")
    given = model.conditions(["a red cat on a chair"])[0]
    return denoiser_parts(
        exported_denoiser(model.denoiser, folders=False), model.sampler, tuple(given), text_features(given)
    )


def facts(model: PipelineGenerator) -> dict[str, Any]:
    return denoiser_facts(exported_denoiser(model.denoiser, folders=False), model.sampler)
