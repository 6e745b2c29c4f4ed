"""Recognition of texts: a small encoder is trained on labelled texts, beside larger ones that teach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.texts import NAMED, TextData, Texts, check_vocabularies, load_texts
from stillroom.diffusion.sampling import Sampler
from stillroom.engine.trainer import mix
from stillroom.errors import UserError
from stillroom.folders.text_networks import MINILM, load_text_network, load_tokenizer, make_encoder, minilm_folder
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import making
from stillroom.surgery.text_reader import token_table
from stillroom.tasks.base import IN_MEMORY
from stillroom.tasks.classify_text.model import TextClassifier
from stillroom.tasks.recognition import Recognition, split_rows

EXAMPLES = 24


class TextClassification(Recognition):
    """Labelled texts, and texts without labels as the part ``general``. Every fifth labelled text trains nothing: it is
    the part ``heldout``. The test split is used for scores only.

    ``teacher`` names the student's network and then the teachers': untrained encoders by name, ``minilm``, or folders
    of transformers. All read with one tokenizer: that of the folders, or the glosses' own where none is a folder.
    """

    data: TextData
    things, kind = "texts", "classify-text"

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        source = load_texts(recipe.data, "train") if data is None else data
        if source.labels is None or len(source.classes) < 2:
            raise UserError(
                f"data {recipe.data!r} have no classes to tell apart", cure="give each text a label, of two at least"
            )
        self.origin = source.origin
        ready = source.tokenizer if isinstance(source, TextData) else None
        self._networks, tokenizers = self._find(recipe, teacher, len(source.classes), ready)
        self.tokenizer = self._one_tokenizer(tokenizers, ready)
        for name, network in zip(self.names, self._networks, strict=True):
            self._check(name, network, source.classes)
        self.test = None
        training, held_out = split_rows(source.n)
        if isinstance(source, TextData):
            self.data, self.length = source.take(training), source.shape[0]
            self.data.parts = dict(source.parts)
            self.data.parts["heldout"] = source.take(held_out)
            return
        self.length = min([64, *(limit for n in self._networks if (limit := positions(n)))])
        self.data = source.take(training).tokenised(self.tokenizer, self.length)
        self.data.parts["heldout"] = source.take(held_out).tokenised(self.tokenizer, self.length)
        if recipe.data != IN_MEMORY:
            test: Texts = load_texts(recipe.data, "test", source.classes)
            self.test = test.tokenised(self.tokenizer, self.length)

    # --- networks -----------------------------------------------------------------------------------------------------
    def _find(self, recipe: Recipe, teacher: Any, classes: int, ready: Any) -> tuple[tuple[nn.Module, ...], dict]:
        """The networks, and the tokenizers of those that have one, by name. Encoders by name are made last, for their
        vocabulary is that of the tokenizer."""
        if teacher is not None:
            given = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
            self.names = [f"network {i}" for i in range(len(given))]
            found = [n.network if isinstance(n, TextClassifier) else n for n in given]
            own = {name: n.tokenizer for name, n in zip(self.names, given) if isinstance(n, TextClassifier)}
            return tuple(found), own
        self.names = [name.strip() for name in recipe.teacher.split(",")]
        networks: dict[int, nn.Module] = {}
        tokenizers: dict[str, Any] = {}
        for place, name in enumerate(self.names):
            folder = minilm_folder() if name == MINILM else Path(name).expanduser()
            if folder.is_dir():
                with torch.random.fork_rng():
                    torch.manual_seed(mix("network", recipe.engine.seed, place))
                    networks[place], tokenizer = load_text_network(folder, classes)
                if tokenizer is not None:
                    tokenizers[name] = tokenizer
        vocabulary = len(self._one_tokenizer(tokenizers, ready))
        for place, name in enumerate(self.names):
            if place not in networks:
                with torch.random.fork_rng(), making():
                    torch.manual_seed(mix("network", recipe.engine.seed, place))
                    networks[place] = make_encoder(name, vocabulary, classes)
        return tuple(networks[place] for place in range(len(self.names))), tokenizers

    def _one_tokenizer(self, tokenizers: dict[str, Any], ready: Any) -> Any:
        """Raises UserError for two vocabularies: positions and tokens of student and teacher would not pair."""
        known = {"the data": ready, **tokenizers} if ready is not None else dict(tokenizers)
        if not known:
            return load_tokenizer(NAMED["glosses"])
        check_vocabularies(known)
        return next(iter(known.values()))

    def _check(self, name: str, network: nn.Module, classes: list[str]) -> None:
        """Raises UserError for a network that does not fit the tokenizer or the data."""
        rows = token_table(network).num_embeddings
        if rows < len(self.tokenizer):
            raise UserError(
                f"network {name!r} has embeddings for {rows:,} tokens, the tokenizer knows {len(self.tokenizer):,}",
                cure="use the network's own tokenizer",
            )
        padding = counted_from(network)
        if padding is not None and padding != self.tokenizer.pad_token_id:
            raise UserError(
                f"network {name!r} counts places from token {padding}, its padding, but the tokenizer pads with "
                f"{self.tokenizer.pad_token_id}",
                cure="use the network's own tokenizer",
            )
        config: Any = getattr(network, "config", None)
        found = getattr(config, "num_labels", len(classes))
        if found != len(classes):
            raise UserError(
                f"network {name!r} has {found} classes, data {self.origin!r} {len(classes)}",
                cure=f"choose a network with {len(classes)} classes",
            )
        named = getattr(config, "id2label", None) or {}
        self.check_names(name, [str(label) for _, label in sorted(named.items())], classes)

    # --- the result ---------------------------------------------------------------------------------------------------
    def student(self, network: nn.Module, sampler: Sampler) -> TextClassifier:
        return TextClassifier(network, self.tokenizer, self.data.classes, self.length, sampler)

    def rows(self, generator: TextClassifier, seed: int) -> tuple[list[str], None]:
        """Texts have no pictures."""
        return [], None

    def ask(self, classifier: TextClassifier, data: TextData, rows: slice) -> Tensor:
        return classifier.probabilities(data.texts[rows])

    def copies(self, classifier: TextClassifier, batch: int) -> Tensor:
        return classifier.probabilities([self.data.texts[0]] * batch)

    def measure(self, recipe: Recipe, student: TextClassifier) -> dict[str, Any]:
        """With ``examples``: held-out texts, their class, and what each network calls them."""
        facts = super().measure(recipe, student)
        held_out: Any = self.data.parts["heldout"]
        chosen = torch.randperm(held_out.n, generator=torch.Generator().manual_seed(recipe.evaluate.seed))[:EXAMPLES]
        texts = [held_out.texts[i] for i in chosen.tolist()]
        answers = {who: c.classify(texts) for who, c in {"student": student, **self.teachers()}.items()}
        facts["examples"] = [
            {"text": text, "class": self.data.classes[int(held_out.labels[i])]}
            | {who: answer[place] for who, answer in answers.items()}
            for place, (i, text) in enumerate(zip(chosen.tolist(), texts))
        ]
        return facts


def positions(network: nn.Module) -> int:
    """The longest text that a network reads; 0 where it does not say. RoBERTa and its like count places from that of
    the padding on."""
    limit = getattr(getattr(network, "config", None), "max_position_embeddings", 0)
    if not isinstance(limit, int):
        return 0
    return limit - (1 + padding if (padding := counted_from(network)) is not None else 0)


def counted_from(network: nn.Module) -> int | None:
    """The padding token by which a network counts places, if it does."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.padding_idx
    return None
