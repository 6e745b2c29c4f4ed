"""Prompts as a pipeline's network sees them: text features and latents, computed once, kept in shards, read by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stillroom.data.conditions import NoPictures
from stillroom.data.prompt_sources import PromptSource, fitted
from stillroom.data.source import ArrayData
from stillroom.errors import UserError
from stillroom.files import make_folder, write

SHARD = 64
"""Rows of a shard."""
_LARGEST = 6e4  # what float16 can hold, with a margin


class Encoder(Protocol):
    """What turns prompts and pictures into what a network sees, a pipeline's generator for one."""

    size: tuple[int, int]

    def conditions(self, prompts: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...
    def latents(self, images: Tensor) -> Tensor: ...


class PromptedData:
    """Shards of rows, addressed by (seed, step) like :class:`ArrayData`.

    shards: tensors by name, ``text/<condition>`` and, for pictures, ``latents``; all but the last hold ``SHARD`` rows.
    captions: one per row. null: the unconditional value of each condition.
    """

    def __init__(
        self, shards: list[Mapping[str, Tensor] | Path], captions: list[str], null: Mapping[str, Tensor], origin: str
    ) -> None:
        if not captions:
            raise UserError("the data hold no prompts", cure="give at least one")
        self.shards, self.captions, self.null, self.origin = shards, captions, dict(null), origin
        self.parts: dict[str, Any] = {}
        self._slices: dict[Path, dict[str, Any]] = {}  # of the shards on disk that have been opened
        self._order = ArrayData(torch.zeros(len(captions), 1), name="prompts")
        self.pictures = "latents" in self._rows(0, slice(0, 1))

    @property
    def n(self) -> int:
        return len(self.captions)

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> dict[str, Any]:
        """``rows`` of the global batch of ``step``: ``cond``: name -> ``[rows, ...]`` float32 and, where there are
        pictures, ``x``: their latents ``[rows, ...]``. Prompts alone have no ``x``; asking for it is a
        UserError."""
        found = self._found(self._order.indices(seed, step, size)[rows if rows is not None else slice(None)])
        batch: dict[str, Any] = NoPictures() if not self.pictures else {"x": found.pop("latents")}
        batch["cond"] = {key.removeprefix("text/"): value for key, value in found.items()}
        return batch

    def conditions(self, index: Tensor) -> dict[str, Tensor]:
        """Those of the prompts with these numbers, int64 ``[R]``: name -> ``[R, ...]`` float32."""
        found = self._found(index)
        return {key.removeprefix("text/"): value for key, value in found.items() if key != "latents"}

    def _found(self, index: Tensor) -> dict[str, Tensor]:
        numbers = index.tolist() if type(index) is Tensor else [0] * len(index)  # a plan's have no values
        parts = [self._rows(i // SHARD, slice(i % SHARD, i % SHARD + 1)) for i in numbers]
        found = {key: torch.cat([_padded(part[key], self._length(key)) for part in parts]) for key in parts[0]}
        return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}

    def _length(self, key: str) -> int | None:
        value = self.null.get(key.removeprefix("text/"))
        return value.shape[0] if value is not None and value.ndim else None

    def _rows(self, shard: int, rows: slice) -> dict[str, Tensor]:
        found = self.shards[shard]
        if not isinstance(found, Path):
            return {key: value[rows] for key, value in found.items()}
        from safetensors import SafetensorError

        try:
            if found not in self._slices:
                self._slices[found] = _opened(found)
            return {key: tensor[rows] for key, tensor in self._slices[found].items()}
        except (OSError, SafetensorError) as problem:
            raise UserError(f"{found} cannot be read ({problem})", cure="delete it; it is made again") from None

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens its shards itself."""
        return self.__dict__ | {"_slices": {}}


def encode_prompts(
    source: PromptSource, encoder: Encoder, cache: Path | None = None, report: Callable[[str], None] = print
) -> PromptedData:
    """Text features and latents of all prompts and pictures of ``source``, a shard at a time.

    cache: a folder for the shards; what it holds already is not computed again, also after an interruption. Without
    one everything stays in memory. Raises UserError for what the source refuses.
    """
    if cache is not None and (cache / "index.json").is_file():
        return _cached(cache)
    if cache is not None:
        make_folder(cache)
    shards: list[Mapping[str, Tensor] | Path] = []
    captions: list[str] = []
    null = encoder.conditions([])[1]
    for number, pairs in enumerate(_chunks(source, SHARD)):
        path = cache / f"{number:06d}.safetensors" if cache is not None else None
        captions += [caption for caption, _ in pairs]
        if path is None or not path.is_file():
            if number % 16 == 0:
                report(f"encoding prompts{' and images' if source.pictures else ''}: {len(captions):,} so far")
            tensors = _encoded(pairs, encoder)
            shards.append(tensors if path is None else _written(tensors, path))
        else:
            shards.append(path)
    null = _longest(null, shards)
    if cache is not None:
        _written({key: value.contiguous() for key, value in null.items()}, cache / "null.safetensors")
        index = {"captions": captions, "origin": source.origin, "shards": len(shards)}
        write(cache / "index.json", json.dumps(index))
    return PromptedData(shards, captions, null, source.origin)


def cache_key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _chunks(source: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for pair in source:
        chunk.append(pair)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _encoded(pairs: list[tuple[str, Tensor | None]], encoder: Encoder) -> dict[str, Tensor]:
    rows: dict[str, int] = {}
    which = torch.tensor([rows.setdefault(caption, len(rows)) for caption, _ in pairs])
    text, _ = encoder.conditions(list(rows))
    tensors = {f"text/{key}": _small(value)[which].contiguous() for key, value in text.items()}
    pictures = [fitted(image, encoder.size) for _, image in pairs if image is not None]
    if pictures:
        made = [encoder.latents(torch.stack(pictures[i : i + 8])).cpu() for i in range(0, len(pictures), 8)]
        tensors["latents"] = torch.cat(made).half().contiguous()
    return tensors


def _small(value: Tensor) -> Tensor:
    """In 16 bits: half precision, or bfloat16 where it would overflow."""
    if not value.is_floating_point():
        return value
    return value.half() if float(value.abs().max()) < _LARGEST else value.bfloat16()


def _padded(value: Tensor, length: int | None) -> Tensor:
    if length is None or value.ndim < 2 or value.shape[1] == length:
        return value
    return torch.cat([value, value.new_zeros(len(value), length - value.shape[1], *value.shape[2:])], 1)


def _longest(null: dict[str, Tensor], shards: list[Mapping[str, Tensor] | Path]) -> dict[str, Tensor]:
    """Unconditional values padded at the end to the longest text of all shards."""
    lengths: dict[str, int] = {}
    for shard in shards:
        for key, shape in _shapes(shard).items():
            if len(shape) > 1:
                lengths[key] = max(lengths.get(key, 0), shape[1])
    padded = {}
    for key, value in null.items():
        length = max(lengths.get(f"text/{key}", 0), value.shape[0]) if value.ndim else None
        padded[key] = _padded(value[None], length)[0]
    return padded


def _opened(shard: Path) -> dict[str, Any]:
    """What gives rows of each tensor of a shard. The file is mapped, not read, and needs no descriptor to stay so."""
    from safetensors import safe_open

    file = safe_open(shard, "pt").__enter__()
    return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping


def _shapes(shard: Mapping[str, Tensor] | Path) -> dict[str, tuple[int, ...]]:
    if not isinstance(shard, Path):
        return {key: tuple(value.shape) for key, value in shard.items()}
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping


def _written(tensors: dict[str, Tensor], path: Path) -> Path:
    from safetensors.torch import save_file

    write(path, lambda aside: save_file(tensors, aside))
    return path


def _cached(cache: Path) -> PromptedData:
    from safetensors.torch import load_file

    index = json.loads((cache / "index.json").read_text(encoding="utf-8"))
    shards: list[Mapping[str, Tensor] | Path] = [cache / f"{i:06d}.safetensors" for i in range(index["shards"])]
    return PromptedData(shards, index["captions"], load_file(cache / "null.safetensors"), index["origin"])
