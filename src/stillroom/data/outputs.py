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
from safetensors.torch import save
from torch import Tensor
from torch import distributed as dist

from stillroom.augment.images import Augmentation, numbered_views
from stillroom.data.source import ArrayData
from stillroom.data.store import encode_json
from stillroom.errors import UserError
from stillroom.files import digest, make_folder, stay_inside, write
from stillroom.parsing import parse_json, read_json

INDEX = "outputs.json"
FORMAT = 1
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
    folder = Path(folder)
    about = described(data, views, name) | {"keep": keep, "precision": precision, "shard": shard}
    plan = folder / "plan.json"
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0:
        make_folder(folder)
        check_same(read_json(plan) if plan.is_file() else about, about, folder)
        write(plan, encode_json(about))
    _wait(size)
    keys = data.n * views.count
    starts = range(0, keys, shard)
    for number in range(rank, len(starts), size):
        path = folder / f"outputs-{number:05d}.safetensors"
        entry = path.with_suffix(".json")
        if entry.is_file() and path.is_file() and read_json(entry).get("sha256") == digest(path):
            continue
        rows = torch.arange(starts[number], min(starts[number] + shard, keys))
        tensors = _asked(teacher, data, views, rows, keep, precision, batch)
        classes = tensors.pop("classes")
        write(path, save(tensors))
        write(entry, encode_json({"sha256": digest(path), "count": len(rows), "classes": int(classes)}))
    _wait(size)
    if rank == 0:
        entries = {f"outputs-{i:05d}.safetensors": folder / f"outputs-{i:05d}.json" for i in range(len(starts))}
        shards = {shard_name: read_json(path) for shard_name, path in entries.items()}
        write(folder / INDEX, encode_json({"format": FORMAT, "about": about, "shards": shards}))
        for path in (*entries.values(), plan):
            path.unlink()
    _wait(size)


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


def _wait(size: int) -> None:
    if size > 1:
        dist.barrier()


def described(data: ArrayData, views: Views, name: str) -> dict[str, Any]:
    """What the outputs depend on, as JSON has it."""
    a = views.augment
    augmentation = {"crop": a.crop, "shift": a.shift, "flip": a.flip, "views": views.count, "seed": views.seed}
    return {"teacher": name, "data": data.fingerprint, "augmentation": augmentation}


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError naming the first thing in which a store differs from what is wanted."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"the outputs in {folder} were stored for another {key}: {found.get(key)}, not {value}",
                cure="use the settings that they were made with, or choose another folder",
            )


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


def is_complete(folder: str | Path) -> bool:
    return (Path(folder) / INDEX).is_file()


def read_outputs(folder: str | Path) -> StoredOutputs:
    """Read a finished store; every shard is checked against its SHA-256.

    Raises UserError for a folder without one, and naming the shard that is missing or damaged.
    """
    from stillroom.folders.weights import read_tensors

    folder = Path(folder)
    if not is_complete(folder):
        unfinished = (folder / "plan.json").is_file()
        raise UserError(
            f"the outputs in {folder} are unfinished" if unfinished else f"{folder} holds no stored outputs",
            cure="write them with the same call again: what is there is kept",
        )
    try:
        index = parse_json((folder / INDEX).read_bytes())
        about, shards = index["about"], index["shards"]
        whole = index["format"] == FORMAT and len(shards) > 0
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is damaged", cure="restore it from a copy") from error
    if not whole:
        raise UserError(f"{folder / INDEX} has another format", cure="read it with the version that wrote it")
    parts = []
    stay_inside(folder)
    for name, entry in sorted(shards.items()):
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is no file of its own", cure="restore the index")
        if not (folder / name).is_file() or digest(folder / name) != entry["sha256"]:
            state = "does not match its checksum" if (folder / name).is_file() else "is missing"
            raise UserError(
                f"shard {folder / name} {state}",
                cure=f"restore it from a copy, or delete it and {INDEX} and store the outputs again",
            )
        parts.append(read_tensors(folder / name))
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = torch.argsort(tensors["id"] * int(about["augmentation"]["views"]) + tensors["view"])
    ordered = {key: value[order] for key, value in tensors.items()}
    return StoredOutputs(about, next(iter(shards.values()))["classes"], ordered)


def stored_outputs(
    folder: str | Path, teacher: Callable[[Tensor], Outputs], data: ArrayData, views: Views, **settings: Any
) -> StoredOutputs:
    """What is in ``folder``, after writing it where that is still to be done. Settings: see :func:`write_outputs`."""
    if not is_complete(folder):
        write_outputs(folder, teacher, data, views, **settings)
    store = read_outputs(folder)
    kept = {key: settings[key] for key in ("keep", "precision") if key in settings}
    check_same(store.about, described(data, views, settings["name"]) | kept, Path(folder))
    return store
