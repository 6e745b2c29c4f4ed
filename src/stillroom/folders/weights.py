"""Tensors from and into safetensors files, and never pickles."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillroom.errors import UserError, reading
from stillroom.folders.transformers_layout import without_bar
from stillroom.parsing import read_json

INDEX_ENDING = ".index.json"
_UNWRITTEN: ContextVar[bool] = ContextVar("unwritten", default=False)


@contextmanager
def weights_unwritten() -> Iterator[None]:
    """Inside, whatever writes a model folder leaves the weights out: to try whether it can be written."""
    token = _UNWRITTEN.set(True)
    try:
        yield
    finally:
        _UNWRITTEN.reset(token)


def unwritten() -> bool:
    """Whether weights are left out (:func:`weights_unwritten`)."""
    return _UNWRITTEN.get()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. A weight that stands under two names is written twice: the format knows no shares."""
    from safetensors.torch import save_file

    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in {} if unwritten() else tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    save_file(apart, path, metadata=metadata)


def save_pretrained(network: Any, folder: str | Path) -> None:
    """``network.save_pretrained`` of a class of diffusers or transformers, without its progress bar."""
    with without_bar():
        if not unwritten():
            network.save_pretrained(folder)
        elif hasattr(network, "save_config"):  # diffusers
            network.save_config(folder)
        else:
            network.config.architectures = [type(network).__name__]
            network.config.save_pretrained(folder)


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill ``network`` from a safetensors file. Raises UserError when it is missing, corrupt or of another shape."""
    try:
        network.load_state_dict(read_shards(path))
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"weights {path} do not fit their config.json: {detail}", cure="use the matching pair"
        ) from None


def read_shards(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the shards that diffusers splits a large one into, or of a variant that
    lies there alone."""
    index = path.with_name(f"{path.name}{INDEX_ENDING}")
    if not path.exists() and not index.exists():
        found = weight_files(path.parent)
        if found is not None and found.variant:
            return {key: value for file in found.files for key, value in read_tensors(file).items()}
    if path.exists() or not index.exists():
        return read_tensors(path)
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file beside it", cure="use the matching pair")
    return {key: value for name in names for key, value in read_tensors(path.with_name(name)).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise UserError(f"weights {path} are missing", cure="only safetensors files are read, never pickles")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"weights {path} cannot be read ({error})", cure="copy the file again; it is damaged") from None


# --- the files of a part ----------------------------------------------------------------------------------------------
_NAMED = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?(\.(?P<late>\w+))?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>diffusion_pytorch_model|model)\.safetensors\.index(\.(?P<variant>\w+))?\.json")
_PREFERRED = ("", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one part in the names of diffusers and transformers.

    variant: what stands in the names before ``.safetensors`` (``fp16``), or nothing. files: file -> its plain name.
    index: of shards, if there are any.
    """

    variant: str
    files: dict[Path, str]
    index: Path | None

    def keys(self) -> set[str]:
        """Names of the tensors. Raises UserError for a damaged file."""
        from safetensors import SafetensorError, safe_open

        found: set[str] = set()
        for file in self.files:
            try:
                with safe_open(file, "pt") as opened:
                    found |= set(opened.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"weights {file} cannot be read ({error})", cure="copy the file again") from None
        return found


def weight_files(folder: Path) -> WeightFiles | None:
    """The weights in a folder: those of plain names, else of one variant, the most precise first. None without any."""
    files: dict[str, dict[Path, str]] = {}
    indices: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if found := _NAMED.fullmatch(path.name):
            variant = found["variant"] or found["late"] or ""
            plain = f"{found['stem']}{found['shard'] or ''}.safetensors"
            files.setdefault(variant, {})[path] = plain
        elif found := _INDEX.fullmatch(path.name):
            indices[found["variant"] or ""] = path
    if not files:
        return None
    variant = min(files, key=lambda name: (_PREFERRED.index(name) if name in _PREFERRED else 9, name))
    index, chosen = indices.get(variant), files[variant]
    whole = {path: plain for path, plain in chosen.items() if "-of-" not in plain}
    if whole:  # one file goes before shards, as diffusers and transformers read them
        index, chosen = None, whole
    return WeightFiles(variant, chosen, index)


def copy_weights(source: Path, target: Path) -> None:
    """Copy a part's weights under their plain names, which are read without further words."""
    if unwritten() or (found := weight_files(source)) is None:
        return
    target.mkdir(parents=True, exist_ok=True)
    for path, plain in found.files.items():
        shutil.copyfile(path, target / plain)
    if found.index is not None:
        tree = read_json(found.index)
        names = {path.name: plain for path, plain in found.files.items()}
        with reading(found.index):
            tree["weight_map"] = {key: names[name] for key, name in tree["weight_map"].items()}
        stem = next(iter(names.values())).partition("-")[0]
        (target / f"{stem}.safetensors{INDEX_ENDING}").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def is_weight_file(name: str) -> bool:
    """Whether :func:`weight_files` looks at a file of this name."""
    return bool(_NAMED.fullmatch(name) or _INDEX.fullmatch(name))
