"""More inputs for a denoiser that has none of them: a second time, a guidance scale, the sign of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.errors import UserError, nearest
from stillroom.networks.scalars import ScalarEncoder, zeroed
from stillroom.surgery.attached import AttachedDenoiser, Attachment, time_paths, widths_at

SCALE = "guidance_scale"
INPUTS = {
    "r": "the time that an average velocity leads to, as a share of t_max",
    SCALE: "w, as everywhere; 1 is none",
    "sign": "of the time: -1 or 1",
}
"""Conditions ``[B]`` by name."""


class ExtraInputs(Attachment):
    """Adds ``W_path sum_i E_i(input_i)`` to what each embedding of the time says; ``W`` is 0 at the start, so that the
    network answers as it did, whatever these inputs are.

    widths: of those embeddings' outputs, by module path. inputs: names, of those in ``INPUTS``.
    """

    reads = tuple(INPUTS)

    def __init__(self, widths: Mapping[str, int], inputs: Sequence[str], width: int = 64) -> None:
        super().__init__(list(widths), {"widths": dict(widths), "inputs": list(inputs), "width": width})
        for name in inputs:
            if name not in INPUTS:
                raise UserError(f"no input {name!r}{nearest(name, INPUTS)}", cure=f"known: {', '.join(INPUTS)}")
        self.encoders = nn.ModuleDict({name: ScalarEncoder(width) for name in inputs})
        self.out = nn.ModuleList(zeroed(nn.Linear(width, size)) for size in widths.values())

    def answer(self, path: str, inputs: Mapping[Any, Any], output: Any) -> Any:
        told = self.told or {}
        if "code" not in told:  # the same for all embeddings of a pass
            known = [self.encoders[name](value.float()) for name, value in told.items() if name in self.encoders]
            told["code"] = torch.stack(known).sum(0) if known else None
        if told["code"] is None:
            return None
        added: Tensor = self.out[self.paths.index(path)](self.of_rows(told["code"])).to(output)
        if len(output) > len(added):  # Qwen-Image 2.1 embeds a time of 0 beside those of the samples
            added = nn.functional.pad(added, (0, 0, 0, len(output) - len(added)))
        return output + added.reshape(len(added), *(1,) * (output.ndim - 2), added.shape[-1])


def with_inputs(denoiser: Denoiser, *inputs: str, width: int = 64) -> AttachedDenoiser:
    """``denoiser`` with more ``inputs``, read from conditions of these names; the same function until it is trained.
    One that has them already is given back. Raises UserError for a network whose embedding of the time is not known,
    and for one that has something else attached, which would fall silent."""
    if isinstance(denoiser, AttachedDenoiser):
        had = denoiser.attachment.config.get("inputs", ())
        if set(inputs) <= set(had):
            return denoiser
        raise UserError(
            f"this network has {', '.join(had) or type(denoiser.attachment).__name__} attached, and is to have "
            f"{', '.join(inputs)}",
            cure="begin with a student of the same method, or with one that has nothing attached",
        )
    widths = {path: found.output for path, found in widths_at(denoiser, time_paths(denoiser.network)).items()}
    return AttachedDenoiser(denoiser, ExtraInputs(widths, inputs, width), alone=False)
