"""Models of transformers from their folders, weights in safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.errors import UserError
from stillroom.folders.transformers_layout import PLAIN, check_config, without_bar
from stillroom.folders.weights import WeightFiles, read_shards, weight_files
from stillroom.surgery.skeleton import from_config, unread

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PAIR = "use the matching pair"


def pretrained(cls: Any, folder: Path) -> nn.Module:
    """A model of a class of transformers from its folder, weights in safetensors only, in eval mode. Names of older
    versions of transformers are understood. Raises UserError for weights that are missing, damaged or of another
    shape."""
    check_config(folder)
    if unread():
        return from_config(cls, folder)
    try:
        with without_bar():
            network, report = cls.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **PLAIN, **in_float32(cls, weight_files(folder))
            )
    except Exception as error:  # of a config's nonsense anything may come
        read_shards(folder / WEIGHTS)  # what is missing or damaged is named here
        detail = str(error).strip().splitlines()[-1]
        raise UserError(f"weights {folder / WEIGHTS} do not fit their {CONFIG}: {detail}", cure=PAIR) from error
    wrong = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if wrong := wrong or [str(key) for key in report["mismatched_keys"]]:
        raise UserError(f"weights {folder / WEIGHTS} do not fit their {CONFIG}: {sorted(wrong)[0]}", cure=PAIR)
    return network.float().eval()


def in_float32(cls: Any, files: WeightFiles | None = None) -> dict[str, Any]:
    """Arguments with which ``cls.from_pretrained`` of diffusers or transformers reads these weights in float32,
    whatever their config says."""
    import diffusers
    from packaging.version import Version

    name = "dtype"
    if not cls.__module__.startswith("transformers") and Version(diffusers.__version__) < Version("0.42"):
        name = "torch_dtype"
    return {name: torch.float32} | ({"variant": files.variant} if files and files.variant else {})


def load_pretrained(cls: Any, folder: Path, may_lack: tuple[str, ...] = ()) -> nn.Module:
    """``cls.from_pretrained`` of a local folder of diffusers or transformers: safetensors only, complete, float32.

    may_lack: weights whose names begin so may be missing; they are drawn anew.

    Raises UserError naming the folder when weights are missing, damaged, or not those of its config.json.
    """
    check_config(folder)
    if unread():
        return from_config(cls, folder)
    if (files := weight_files(folder)) is None:
        raise UserError(f"{folder} holds no weights", cure="only safetensors files are read, never pickles")
    try:
        with without_bar():
            network, report = cls.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False,
                **({"trust_remote_code": False} if cls.__name__.startswith("Auto") else {}), **in_float32(cls, files),
            )  # fmt: skip
    except Exception as problem:  # of a config's nonsense anything may come
        raise UserError(
            f"the weights in {folder} cannot be read or do not fit their config.json ({str(problem)[:200]})",
            cure="copy the folder again",
        ) from None
    missing = [key for key in report["missing_keys"] if not key.startswith(may_lack)]
    odd = [*missing, *report["mismatched_keys"], *report.get("error_msgs", ())]
    if odd:
        raise UserError(f"the weights in {folder} do not fit their config.json: {odd[0]}", cure="use the matching pair")
    return network.float()
