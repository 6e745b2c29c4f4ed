"""A teacher's outputs, computed once and kept: top-k logits with the mass of the rest, and features, keyed by image and
augmented view (after FKD, arXiv 2112.01528).

``outputs-00000.safetensors`` holds one row for each (image id, view); ``outputs.json`` holds the SHA-256 of every shard
and what the store was made from: teacher, data, augmentation. A view's numbers follow from its key
(:func:`~stillroom.augment.images.numbered_views`), so pixels are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stillroom.augment.images import Augmentation, numbered_views
from stillroom.data.rows import RowStore
from stillroom.data.source import ArrayData
from stillroom.errors import UserError

OUTPUTS = RowStore("outputs")
LOGITS = "logits"
"""The output that is kept by its largest entries; any other is kept whole."""
Precision = Literal["float16", "float32"]
Outputs = Mapping[str, Tensor]


class Views(NamedTuple):
    """Each image in ``count`` augmented views, numbered from 0."""

    augment: Augmentation
    count: int
    seed: int = 0

    def of(self, images: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
        """View ``numbers[b]`` of image ``ids[b]`` (int64 ``[B]``), whose pixels are ``images [B, C, H, W]``."""
        return self.augment(images, numbered_views(ids, numbers, self.seed))


# --- logits -----------------------------------------------------------------------------------------------------------
def shorten(logits: Tensor, keep: int, precision: Precision = "float16") -> dict[str, Tensor]:
    """The ``keep`` largest of logits ``[..., C]`` (0: all): ``values``, ``index``, ``base`` (what the values are
    counted from, float32: in half precision the largest logit, so that the error lies where probabilities are small)
    and ``rest``, the logarithm of the summed exponentials of all others."""
    logits, classes = logits.detach().float().cpu(), logits.shape[-1]
    keep = classes if keep <= 0 else min(keep, classes)
    values, index = logits.topk(keep, dim=-1)
    base = values[..., :1].clone() if precision == "float16" else torch.zeros_like(values[..., :1])
    small = torch.int16 if classes <= 2**15 else torch.int32
    found = {"values": (values - base).to(getattr(torch, precision)), "index": index.to(small), "base": base}
    if keep < classes:
        others = logits.scatter(-1, index, -torch.inf)
        found["rest"] = others.logsumexp(-1, keepdim=True)
    return found


def lengthen(short: Mapping[str, Tensor], classes: int) -> Tensor:
    """Logits ``[..., C]`` float32 from :func:`shorten`: what was left out is spread evenly over its classes. Exact
    where all were kept in float32."""
    values, index = short["values"].float() + short["base"], short["index"].long()
    filled = torch.empty(*values.shape[:-1], classes)
    if "rest" in short:
        filled[:] = short["rest"] - torch.log(torch.tensor(float(classes - values.shape[-1])))
    return filled.scatter(-1, index, values)


# --- writing ----------------------------------------------------------------------------------------------------------
def write_outputs(
    folder: str | Path,
    teacher: Callable[[Tensor], Outputs],
    data: ArrayData,
    views: Views,
    *,
    name: str,
    keep: int = 0,
    precision: Precision = "float16",
    batch: int = 64,
    shard: int = 8192,
) -> None:
    """Ask ``teacher`` (images ``[B, C, H, W]`` to outputs ``[B, ...]``, ``logits [B, ..., C]`` among them) for every
    view of every image. What is already there and whole is not computed again; under several processes each writes its
    part.

    name: of the teacher, by which the store knows it again: a hash of its weights. keep: logits that are kept, 0: all.
    batch: images that are asked at once. shard: rows of a file. Raises UserError where the folder holds the outputs of
    another teacher, data, augmentation or precision, and for a disk that cannot be written.
    """
    about = described(data, views, name) | {"keep": keep, "precision": precision, "shard": shard}

    def made(rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = _asked(teacher, data, views, rows, keep, precision, batch)
        return tensors, {"classes": int(tensors.pop("classes"))}

    OUTPUTS.write(folder, about, data.n * views.count, made, shard)


def _asked(
    teacher: Callable[[Tensor], Outputs],
    data: ArrayData,
    views: Views,
    rows: Tensor,
    keep: int,
    precision: Precision,
    batch: int,
) -> dict[str, Tensor]:
    """Row r is view ``r mod count`` of the data's image ``r div count``."""
    parts: list[dict[str, Tensor]] = []
    classes = 0
    for chosen in rows.split(batch):
        where, number = chosen // views.count, chosen % views.count
        ids = data.ids[where]
        with torch.no_grad():
            outputs = dict(teacher(views.of(data.images(where), ids, number)))
        logits = outputs.pop(LOGITS)
        classes = logits.shape[-1]
        part = {f"{LOGITS}.{key}": value for key, value in shorten(logits, keep, precision).items()}
        part |= {key: value.cpu().to(getattr(torch, precision)) for key, value in outputs.items()}
        parts.append(part | {"id": ids, "view": number})
    joined = {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}
    return joined | {"classes": torch.tensor(classes)}


def described(data: ArrayData, views: Views, name: str) -> dict[str, Any]:
    """What the outputs depend on, as JSON has it."""
    a = views.augment
    augmentation = {"crop": a.crop, "shift": a.shift, "flip": a.flip, "views": views.count, "seed": views.seed}
    return {"teacher": name, "data": data.fingerprint, "augmentation": augmentation}


# --- reading ----------------------------------------------------------------------------------------------------------
class StoredOutputs:
    """Outputs in memory, asked by image id and view number. ``about``: what they were made from."""

    def __init__(self, about: dict[str, Any], classes: int, tensors: dict[str, Tensor]) -> None:
        self.about, self.classes, self.count = about, classes, int(about["augmentation"]["views"])
        self._ids, self._tensors = torch.unique(tensors.pop("id")), tensors
        tensors.pop("view")

    def read(self, ids: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """The outputs ``[B, ...]`` in float32 of view ``numbers[b]`` of image ``ids[b]``, int64 ``[B]``, on the CPU.
        Raises UserError for an image or a view that was not stored."""
        where = torch.searchsorted(self._ids, ids.cpu()).clamp(max=len(self._ids) - 1)
        if (self._ids[where] != ids.cpu()).any() or int(numbers.max()) >= self.count:
            raise UserError(
                "the stored outputs do not have all images and views that are asked for",
                cure="store them for these data, with as many views",
            )
        rows = where * self.count + numbers.cpu()
        found = {key: value[rows] for key, value in self._tensors.items()}
        short = {key.partition(".")[2]: found.pop(key) for key in list(found) if key.startswith(f"{LOGITS}.")}
        return {LOGITS: lengthen(short, self.classes), **{key: value.float() for key, value in found.items()}}


def read_outputs(folder: str | Path) -> StoredOutputs:
    """Read a finished store; every shard is checked against its SHA-256.

    Raises UserError for a folder without one, and naming the shard that is missing or damaged.
    """
    about, entries, tensors = OUTPUTS.read(folder)
    order = torch.argsort(tensors["id"] * int(about["augmentation"]["views"]) + tensors["view"])
    ordered = {key: value[order] for key, value in tensors.items()}
    return StoredOutputs(about, entries[0]["classes"], ordered)


def stored_outputs(
    folder: str | Path, teacher: Callable[[Tensor], Outputs], data: ArrayData, views: Views, **settings: Any
) -> StoredOutputs:
    """What is in ``folder``, after writing it where that is still to be done. Settings: see :func:`write_outputs`."""
    if not OUTPUTS.is_complete(folder):
        write_outputs(folder, teacher, data, views, **settings)
    store = read_outputs(folder)
    kept = {key: settings[key] for key in ("keep", "precision") if key in settings}
    OUTPUTS.check_same(store.about, described(data, views, settings["name"]) | kept, folder)
    return store
