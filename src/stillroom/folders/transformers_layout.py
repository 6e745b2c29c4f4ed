"""Folders of transformers, which may come from anywhere: read without code, pickles or other folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillroom.errors import UserError, reading
from stillroom.files import stay_inside
from stillroom.parsing import read_json

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
PLAIN: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every ``from_pretrained`` of an Auto class. Code in a folder is never run."""


@contextmanager
def without_bar() -> Iterator[None]:
    """While it lasts transformers draws no bar of the weights it reads or writes; a little folder needs none."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder of transformers. Raises UserError, naming the file, for one that is missing or
    damaged, and where reading the model would fetch something from elsewhere: an adapter's base model, an attention
    kernel, a library for quantized weights. And for files that lead out of the folder."""
    config = read_json(folder / CONFIG)
    stay_inside(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, no whole model", cure="merge it into its base model first")
    return check_entries(config, folder / CONFIG)


def check_entries(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The same config. Raises UserError as :func:`check_config` does."""
    if config.get("quantization_config"):
        raise UserError(f"{file} describes quantized weights", cure="give the weights as they were before")
    for key, value in _entries(config):
        if key in _KERNEL_KEYS and value is not None and (not isinstance(value, str) or "/" in value):
            raise UserError(f"{file} asks for code from elsewhere: {key} {value!r}", cure="remove that line")
    return config


def _entries(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Keys and values of all mappings in a tree."""
    if isinstance(tree, dict):
        yield from tree.items()
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _entries(inner)


def auto_config(folder: Path) -> Any:
    """The config of a folder, an object of transformers. Raises UserError as :func:`check_config` does, and for a kind
    of model that transformers does not know by itself."""
    from transformers import AutoConfig

    check_config(folder)
    with reading(folder / CONFIG):
        return AutoConfig.from_pretrained(folder, **PLAIN)


def config_from_file(file: Path, **changes: Any) -> Any:
    """A config from a JSON file alone, for an untrained network. changes: entries for this data, which go before those
    of the file. Raises UserError as :func:`check_config` does."""
    from transformers import AutoConfig

    tree = check_entries(read_json(file), file) | changes
    for key in ("id2label", "label2id", "dtype", "torch_dtype", "architectures"):  # those of another network's weights
        tree.pop(key, None)
    with reading(file):
        kind = tree.pop("model_type", None)
        if not isinstance(kind, str):
            raise UserError(f"{file} has no model_type", cure="give the config.json of a model of transformers")
        return AutoConfig.for_model(kind, **tree)


def check_pads(tokenizer: Any, who: str) -> None:
    """Raises UserError for a tokenizer that cannot put texts of several lengths into one batch."""
    if tokenizer.pad_token is None:
        raise UserError(
            f"the tokenizer of {who} has no padding token, without which texts of several lengths make no batch",
            cure=f'name one in {TOKENIZER_CONFIG}, for example "pad_token": "[PAD]"',
        )


def token_limit(tokenizer: Any, otherwise: int) -> int:
    """The longest text in tokens that a tokenizer says its network reads, at most ``otherwise``; many say nothing, as
    a number like 1e30."""
    limit = tokenizer.model_max_length
    return int(min(limit, otherwise)) if limit and limit > 0 else otherwise


def auto_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Raises UserError for one that is missing, damaged, or made by code in the folder."""
    from transformers import AutoTokenizer

    stay_inside(folder)
    if (folder / TOKENIZER_CONFIG).is_file():
        read_json(folder / TOKENIZER_CONFIG)
    try:
        return AutoTokenizer.from_pretrained(folder, **PLAIN)
    except Exception as problem:  # tokenizers raises Exception itself
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({str(problem)[:200]})", cure="copy the whole folder again"
        ) from None
