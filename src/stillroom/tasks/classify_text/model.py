"""Text classifiers as transformers keeps them: a network, its tokenizer and the names of its classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.texts import load_texts, tokens_of
from stillroom.diffusion.sampling import Sampler
from stillroom.engine.progress import Parts
from stillroom.errors import UserError
from stillroom.folders.denoisers import SIDE_FILE
from stillroom.folders.image_networks import architecture
from stillroom.folders.text_networks import load_text_network
from stillroom.folders.transformers_layout import check_pads, token_limit
from stillroom.folders.weights import save_pretrained
from stillroom.networks.recognition import ForwardPass
from stillroom.parsing import read_json
from stillroom.surgery.modules import device_of
from stillroom.surgery.text_reader import positions, token_table
from stillroom.task import FileJudge, Model, Part

LENGTH = 512
"""Tokens of a text where neither tokenizer nor network knows a shorter limit."""


class TextClassifier(Model):
    """A network that names the class of a text; what ``stillroom.load`` returns for one.

    classes: names in the order of the outputs. length: tokens of a text; longer ones are cut.
    """

    noun = "a text classifier"
    does, usage = "sorts texts, it draws nothing", "stillroom.load(DIR).classify(texts)"
    int8 = True

    def __init__(
        self, network: nn.Module, tokenizer: Any, classes: Sequence[str], length: int, sampler: Sampler | None = None
    ) -> None:
        self.network, self.tokenizer, self.classes = network.eval(), tokenizer, list(classes)
        self.length, self.sampler = int(length), sampler or ForwardPass()

    def probabilities(self, texts: Sequence[str], batch: int = 250) -> Tensor:
        """``[N, classes]`` float32, on the CPU. Raises UserError for what is no list of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("texts are a list of strings", cure="wrap a single text: [text]")
        parts = [self._ask(texts[start : start + batch]) for start in Parts(len(texts), batch)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.classes))

    def _ask(self, texts: Sequence[str]) -> Tensor:
        ids, mask = tokens_of(self.tokenizer, texts, self.length)
        device = device_of(self.network)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
        sample: Any = self.sampler.sample
        return sample(self.network, inputs).float().softmax(-1).cpu()

    def classify(self, texts: Sequence[str], batch: int = 250) -> list[str]:
        """The name of the most probable class of each text."""
        return [self.classes[i] for i in self.probabilities(texts, batch).argmax(-1).tolist()]

    # --- other runtimes -------------------------------------------------------------------------------------------
    def parts(self, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
        from stillroom.tasks.classify_text import export

        return export.parts(self, whole)

    def export_facts(self) -> dict[str, Any]:
        return {"classes": self.classes, "length": self.length}

    def test_data(self, name: str) -> Any:
        return load_texts(name, "test", self.classes)

    def judge(self, data: str, test: Any) -> FileJudge:
        from stillroom.tasks.classify_text import export

        return export.judge(self, test)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write network and tokenizer as ``save_pretrained`` does; ``extra`` entries go into ``stillroom.json``. Of a
        module that transformers does not know, the weights alone are written."""
        from safetensors.torch import save_model

        folder, network = Path(folder), self.network
        folder.mkdir(parents=True, exist_ok=True)
        if self.reloads:
            config: Any = network.config
            config.id2label = dict(enumerate(self.classes))
            config.label2id = {name: i for i, name in enumerate(self.classes)}
            save_pretrained(network, folder)
        else:
            save_model(network, str(folder / "model.safetensors"))
        self.tokenizer.save_pretrained(folder)
        side = {"sampler": self.sampler.to_dict(), "classes": self.classes, "length": self.length, **extra}
        (folder / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """A model of transformers for sequence classification."""
        return architecture(folder).endswith("ForSequenceClassification")

    @property
    def reloads(self) -> bool:
        """Not where a module that transformers does not know was given: its weights alone are written."""
        return hasattr(self.network, "save_pretrained")

    @classmethod
    def load(cls, folder: str | Path) -> TextClassifier:
        """Read a folder of transformers with a model for sequence classification and its tokenizer.

        Raises UserError for a missing, incomplete or damaged folder.
        """
        folder = Path(folder)
        network, tokenizer = load_text_network(folder, classes=1)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer", cure="copy the tokenizer's files beside the model")
        check_pads(tokenizer, str(folder))
        if (rows := token_table(network).num_embeddings) < len(tokenizer):
            raise UserError(
                f"the tokenizer of {folder} knows {len(tokenizer):,} tokens, its network {rows:,}",
                cure="use the network's own tokenizer, or resize the network's embeddings to it",
            )
        config: Any = network.config
        classes = [str(name) for _, name in sorted(config.id2label.items())]
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else {}
        limit = min(token_limit(tokenizer, LENGTH), positions(network) or LENGTH)
        return cls(network, tokenizer, classes, side.get("length", limit))
