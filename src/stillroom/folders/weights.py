"""Tensors from safetensors files, and never from pickles."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from stillroom.errors import UserError, reading
from stillroom.parsing import read_json


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
    """All tensors of a safetensors file, or of the shards that diffusers splits a large one into."""
    index = path.with_name(f"{path.name}.index.json")
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
