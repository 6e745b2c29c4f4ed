"""Captioned images as a text-to-image model sees them: latents and text features, addressed by (seed, step)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stillroom.data.source import ArrayData
from stillroom.errors import UserError
from stillroom.files import digest, write
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.parsing import parse_json

if TYPE_CHECKING:
    from stillroom.networks.text_image_space import TextImageSpace
from stillroom.data.store import FORMAT, OnCorrupt, Samples, _read, check_store, encode_json

_LATENTS = ("mean", "std", "mirrored", "mirrored_std")


class CaptionedData:
    """Latents with captions, held in memory.

    mean, std: of each image's posterior, ``[N, C, h, w]`` (kept in float16; std may be left out). mirrored,
    mirrored_std: the same of the image with left and right swapped. captions: the M distinct captions; which ``[N]``:
    the row of each image's caption. text: name -> ``[M, ...]``, what :meth:`TextEncoder.encode` said about them.
    parts: other data of the same kind, for the stages that read them. origin: where the images came from, in words.
    """

    def __init__(
        self,
        mean: Tensor,
        captions: Sequence[str],
        which: Tensor,
        text: Mapping[str, Tensor],
        std: Tensor | None = None,
        mirrored: Tensor | None = None,
        mirrored_std: Tensor | None = None,
        parts: Mapping[str, CaptionedData] | None = None,
        name: str = "captioned",
        origin: str = "",
    ) -> None:
        given = dict(zip(_LATENTS, (mean, std, mirrored, mirrored_std), strict=True))
        kept = {key: value.half() for key, value in given.items() if value is not None}
        rows = {key: value for key, value in kept.items() if key != "mean"} | {"which": which.long()}
        for key, value in kept.items():
            if value.shape[1:] != mean.shape[1:]:
                raise UserError(
                    f"data {name!r} has {key} of shape {list(value.shape[1:])} but mean of {list(mean.shape[1:])}",
                    cure="encode both with one autoencoder",
                )
        self._rows = ArrayData(kept["mean"], rows, name=name)  # checks the lengths
        self.captions, self.text = list(captions), {key: _small(value) for key, value in text.items()}
        self.parts: dict[str, CaptionedData] = dict(parts or {})
        self.name, self.origin = name, origin or f"{name}: {len(mean):,} captioned images in memory"
        for key, value in self.text.items():
            if len(value) != len(self.captions):
                raise UserError(
                    f"data {name!r} has {len(self.captions)} captions but {len(value)} rows of {key!r}",
                    cure="give one row of features per caption",
                )
        if int(which.min()) < 0 or int(which.max()) >= len(self.captions):
            raise UserError(
                f"data {name!r} points at caption {int(which.max())} of {len(self.captions)}",
                cure=f"numbers must lie in 0..{len(self.captions) - 1}",
            )

    @property
    def n(self) -> int:
        return self._rows.n

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row of latents: ``(C, h, w)``."""
        return self._rows.shape

    @property
    def mean(self) -> Tensor:
        return self._rows.array

    @property
    def std(self) -> Tensor | None:
        return self._rows.cond.get("std")

    @property
    def mirrored(self) -> Tensor | None:
        return self._rows.cond.get("mirrored")

    @property
    def mirrored_std(self) -> Tensor | None:
        return self._rows.cond.get("mirrored_std")

    @property
    def which(self) -> Tensor:
        """``[N]`` int64: the caption of each image, as a row of ``captions``."""
        return self._rows.cond["which"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over latents, captions and text features, and over the parts."""
        digest = hashlib.sha256(self._rows.fingerprint.encode())
        digest.update(json.dumps(self.captions).encode())
        for key in sorted(self.text):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(self.text[key].numpy()).data)
        for key in sorted(self.parts):
            digest.update(f"{key} {self.parts[key].fingerprint}".encode())
        return digest.hexdigest()

    def caption_of(self, index: int) -> str:
        """The caption of image ``index``."""
        return self.captions[int(self.which[index])]

    def take(self, index: Tensor, origin: str = "") -> CaptionedData:
        """The chosen images as data of their own, without parts and with the captions that they use."""
        used, which = torch.unique(self.which[index], return_inverse=True)
        chosen = {key: value[index] for key in _LATENTS if (value := getattr(self, key)) is not None}
        return CaptionedData(
            captions=[self.captions[i] for i in used.tolist()],
            which=which,
            text={key: value[used] for key, value in self.text.items()},
            name=self.name,
            origin=origin or f"{len(index):,} of {self.origin}",
            **chosen,
        )

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> dict[str, Any]:
        """``rows`` of the global batch of ``step``: ``x`` (the mean) and, where there are such, ``std``,
        ``mirrored``, ``mirrored_std``, all float32 ``[rows, C, h, w]``; ``index`` int64 ``[rows]``, the numbers of the
        images; ``cond``: name -> ``[rows, ...]``."""
        index = self._rows.indices(seed, step, size)[rows if rows is not None else slice(None)]
        found: dict[str, Any] = {"x": self.mean[index].float(), "index": index}
        for key in _LATENTS[1:]:
            if (values := getattr(self, key)) is not None:
                found[key] = values[index].float()
        which = self.which[index]
        found["cond"] = {key: _large(value[which]) for key, value in self.text.items()}
        return found

    # --- on disk --------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """One safetensors file, without the parts; features and latents in float16."""
        from safetensors.torch import save_file

        tensors = {key: value for key in _LATENTS if (value := getattr(self, key)) is not None}
        tensors |= {"which": self.which} | {f"text/{key}": value for key, value in self.text.items()}
        about = {"name": self.name, "origin": self.origin, "captions": json.dumps(self.captions)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> CaptionedData:
        """Read what :meth:`save` wrote. Raises UserError for a missing or damaged file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            text = {key[5:]: tensors.pop(key) for key in list(tensors) if key.startswith("text/")}
            captions = parse_json(about["captions"])
            return cls(captions=captions, text=text, name=about["name"], origin=about["origin"], **tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
            raise UserError(
                f"{path} holds no captioned data ({problem})", cure="delete it and encode the images again"
            ) from None


def encode_images(
    images: Tensor,
    captions: Sequence[str],
    space: TextImageSpace,
    mirror: bool = False,
    name: str = "captioned",
    origin: str = "",
    batch: int = 250,
) -> CaptionedData:
    """Latents and text features of ``images``, uint8 ``[N, 3, H, W]``, each with its caption.

    mirror: encode each image with left and right swapped too (LightGen's augmentation; the captions do not change).
    Raises UserError for other images, a wrong number of captions, sizes that the codec's factor does not divide, and
    captions that the text encoder refuses.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f"images are {images.dtype} {list(images.shape)}", cure="give uint8 images [N, 3, H, W]")
    if len(captions) != len(images):
        raise UserError(f"{len(images)} images have {len(captions)} captions", cure="give one caption per image")
    rows: dict[str, int] = {}
    which = torch.tensor([rows.setdefault(caption, len(rows)) for caption in captions], dtype=torch.int64)
    for caption in rows:
        space.text.check(caption)
    latents: dict[str, list[Tensor]] = {key: [] for key in (_LATENTS if mirror else _LATENTS[:2])}
    for part in images.split(batch):
        scaled = part.float().div_(127.5).sub_(1.0)
        found = [*space.codec.moments(scaled)]
        if mirror:
            found += space.codec.moments(scaled.flip(-1))
        for key, value in zip(latents, found, strict=True):
            latents[key].append(value.half().cpu())
    text = {key: value.cpu() for key, value in space.text.encode(list(rows)).items()}
    tensors: Any = {key: torch.cat(values) for key, values in latents.items()}
    return CaptionedData(captions=list(rows), which=which, text=text, name=name, origin=origin, **tensors)


def _small(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _large(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def store_data(
    folder: str | Path,
    space: TextImageSpace,
    *,
    sizes: Mapping[str, int] | int | None = None,
    mirror: bool = False,
    cache: bool | str | Path = True,
    on_corrupt: OnCorrupt = "refuse",
    report: Callable[[str], None] = print,
) -> CaptionedData:
    """A store as a text-to-image model of ``space`` sees it: latents and text features, encoded once.

    sizes: name -> pixels of lower-resolution versions, which become ``data.parts[name]``; a number alone is the part
    ``small``. mirror: the left-right swapped images too. on_corrupt: see :func:`read_store`.
    cache: keep what was encoded in the folder ``cache`` of the store (True) or in another one; it is found again by the
    hashes of the shards, of the space's text encoder and autoencoder, and by the settings here. Where nothing can be
    written ``report`` is told, and the next call encodes again.
    """
    folder = Path(folder)
    parts = {"small": sizes} if isinstance(sizes, int) else dict(sizes or {})
    for name, size in parts.items():
        space.codec.grid((size, size))
        if not name:
            raise UserError("a part of the data has no name", cure="write sizes={'small': 16} or the like")
    manifest, good = check_store(folder, on_corrupt, report)
    shelf = (folder / "cache" if cache is True else Path(cache)) if cache else None
    images: list[Samples] = []  # read when the first thing is not cached

    def encoded(size: int) -> CaptionedData:

        about = [
            FORMAT,
            [manifest["shards"][name]["sha256"] for name in good],
            space.name,
            space.text.length,
            mirror,
            size,
        ]
        key = hashlib.sha256(encode_json(about)).hexdigest()[:16]
        if shelf is not None and (known := _cached(shelf / f"{key}.safetensors")) is not None:
            return known
        if not images:
            images.append(_read(folder, manifest, good))
        pixels, captions, _ = images[0]
        if size:
            from stillroom.data.captioned_folders import centre_square

            scaled = (part.float().div(127.5).sub(1.0) for part in pixels.split(1000))
            pixels = torch.cat([((centre_square(part, size) + 1) * 127.5).round().to(torch.uint8) for part in scaled])
        lost = manifest["count"] - len(captions)
        origin = f"{folder.name}: {len(captions):,} images" + (f" ({lost:,} more in bad shards)" if lost else "")
        origin += f", {size}x{size}" if size else ""
        data = encode_images(pixels, captions, space, mirror, name=folder.name, origin=origin)
        if shelf is not None:
            _keep(data, shelf / f"{key}.safetensors", report)
        return data

    data = encoded(0)
    data.parts = {name: encoded(size) for name, size in parts.items()}
    return data


def _cached(path: Path) -> CaptionedData | None:
    """What :func:`_keep` wrote, if it is there and still what was written."""

    try:
        if path.with_suffix(".sha256").read_text() != digest(path):
            return None
        return CaptionedData.load(path)
    except (OSError, UserError):
        return None


def _keep(data: CaptionedData, path: Path, report: Callable[[str], None]) -> None:
    def saved(aside: Path) -> None:
        data.save(aside)
        write(path.with_suffix(".sha256"), digest(aside))

    try:
        write(path, saved)
    except (OSError, UserError) as error:
        report(f"the cache {path.parent} cannot be written ({error}): the store will be encoded again next time")
