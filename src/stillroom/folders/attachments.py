"""What is attached to a network, in a folder of its own: a config and safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import stillroom.networks.extra_inputs
import stillroom.networks.guidance_adapters
import stillroom.networks.parallel_heads  # noqa: F401 - makes the classes known
from stillroom.diffusion.denoiser import Denoiser
from stillroom.errors import UserError, nearest, reading
from stillroom.folders.weights import load_weights, save_tensors
from stillroom.parsing import read_json
from stillroom.surgery.attached import AttachedDenoiser, Attachment
from stillroom.surgery.skeleton import making, unread

ATTACHED = "attached"
"""The sub-folder of a model that holds what is attached to its network."""
CONFIG = "config.json"
WEIGHTS = "attachment.safetensors"


def save_attachment(denoiser: AttachedDenoiser, folder: str | Path) -> None:
    """Write the attachment alone; the network's weights are not in it."""
    folder, attachment = Path(folder), denoiser.attachment
    folder.mkdir(parents=True, exist_ok=True)
    about = {"_class_name": type(attachment).__name__, "alone": denoiser.alone, **attachment.config}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    tensors = {name: value.detach().cpu().contiguous() for name, value in attachment.state_dict().items()}
    save_tensors(tensors, folder / WEIGHTS)


def attach(denoiser: Denoiser, folder: str | Path) -> AttachedDenoiser:
    """``denoiser`` with the attachment that :func:`save_attachment` wrote. Its network is used as it is, and answers as
    before where it is asked without. Raises UserError for files that are missing or damaged, and for a network that has
    no modules of these names."""
    folder = Path(folder)
    about = read_json(folder / CONFIG)
    name, alone = about.pop("_class_name", ""), bool(about.pop("alone", True))
    known = Attachment.ATTACHMENTS
    if name not in known:
        raise UserError(
            f"{folder / CONFIG} names no attachment that is known ({name!r}{nearest(name, known)})",
            cure=f"known: {', '.join(known)}",
        )
    with reading(folder / CONFIG), making():
        attachment = known[name](**about)
    if not unread():
        load_weights(attachment, folder / WEIGHTS)
    for path in attachment.paths:
        try:
            denoiser.network.get_submodule(path)
        except AttributeError:
            raise UserError(
                f"{folder} is for a network with a module {path!r}, which {type(denoiser.network).__name__} lacks",
                cure="give the network that it was trained on, or one of the same layout",
            ) from None
    return AttachedDenoiser(denoiser, attachment.eval(), alone).eval()
