"""Recognition of texts: a small encoder is trained on labelled texts, beside larger ones that teach it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.texts import LENGTH, NAMED, TextData, Texts, check_vocabularies, load_texts
from stillroom.diffusion.sampling import Sampler
from stillroom.draws import mix
from stillroom.errors import UserError, nearest
from stillroom.folders.text_networks import (
    ENCODERS,
    MINILM,
    load_text_network,
    load_tokenizer,
    make_encoder,
    minilm_folder,
)
from stillroom.folders.transformers_layout import check_pads, token_limit
from stillroom.networks.recognition import class_logits
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import making
from stillroom.surgery.text_reader import counted_from, positions, token_table
from stillroom.task import IN_MEMORY, NOTHING, Card, Model, Rows, find_model_class, model_home, task
from stillroom.tasks.classify_text.model import TextClassifier
from stillroom.tasks.networks import Recognition, split_rows
from stillroom.tasks.words import began, listed, made_from

EXAMPLES = 24
NETWORKS = (TextClassifier, nn.Module)


@task("classify-text")
class TextClassification(Recognition):
    """Labelled texts, and texts without labels as the part ``general``. Every fifth labelled text trains nothing: it is
    the part ``heldout``. The test split is used for scores only.

    ``student`` is an untrained encoder by name or a folder of transformers, ``teacher`` names folders, or ``minilm``.
    All read with one tokenizer: that of the folders, or the glosses' own where none is a folder.
    """

    model = TextClassifier
    data: TextData
    things = "texts"
    data_names = tuple(NAMED)
    objects = {"teacher": NETWORKS, "student": NETWORKS, "data": (Texts, TextData)}

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """A text classifier, or an encoder of texts that is given a head."""
        return find_model_class(folder) in (None, TextClassifier)

    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        source = given["data"] if "data" in given else load_texts(recipe.data, "train")
        if source.labels is None or len(source.classes) < 2:
            raise UserError(
                f"data {recipe.data!r} have no classes to tell apart", cure="give each text a label, of two at least"
            )
        source = self.by_network(source, recipe, given)
        self.origin = source.origin
        ready = source.tokenizer if isinstance(source, TextData) else None
        self._read_with(recipe, given, source.classes, ready)
        for name, network in self.everyone(recipe):
            self._check(name, network, source.classes)
        self.test = None
        training, held_out = split_rows(source.n, recipe.data, self.things)
        if isinstance(source, TextData):
            self.data, self.length = source.take(training), source.shape[0]
            self.data.parts = dict(source.parts)
            self.data.parts["heldout"] = source.take(held_out)
            self.align(recipe, given, self._logits)
            return
        limits = [limit for _, network in self.everyone(recipe) if (limit := positions(network))]
        self.length = min([token_limit(self.tokenizer, LENGTH), *limits])
        self.data = source.take(training).tokenised(self.tokenizer, self.length)
        self.data.parts["heldout"] = source.take(held_out).tokenised(self.tokenizer, self.length)
        self.align(recipe, given, self._logits)
        if recipe.data != IN_MEMORY:
            test: Texts = load_texts(recipe.data, "test", source.classes)
            self.test = test.tokenised(self.tokenizer, self.length)

    # --- networks -----------------------------------------------------------------------------------------------------
    def _logits(self, network: nn.Module) -> Tensor:
        """For some text."""
        ids = torch.arange(min(8, len(self.tokenizer)))[None]
        return class_logits(network, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def bare(self, given: Any) -> nn.Module:
        return given.network if isinstance(given, TextClassifier) else given

    def _read_with(self, recipe: Recipe, given: Mapping[str, Any], classes: list[str], ready: Any) -> None:
        """The networks, and the one tokenizer that all read with: that of those that have one. An encoder by name is
        made last, for its vocabulary is that of the tokenizer."""
        tokenizers: dict[str, Any] = {}
        self._classes = len(classes)
        self._found: dict[tuple[str, int], nn.Module] = {}
        if "teacher" in given:
            objects = given["teacher"]
            objects = list(objects) if isinstance(objects, list | tuple) else [objects]
            tokenizers = {
                f"teacher {i}": one.tokenizer for i, one in enumerate(objects, 1) if isinstance(one, TextClassifier)
            }
        places = [] if "teacher" in given else list(enumerate(listed(recipe.teacher), start=1))
        if isinstance(begun := given.get("student"), TextClassifier):
            tokenizers["the student"] = begun.tokenizer
        elif recipe.student and begun is None:
            places = [(0, recipe.student), *places]
        for place, name in places:
            folder = minilm_folder() if name == MINILM else Path(name).expanduser()
            if folder.is_dir():
                with torch.random.fork_rng():
                    torch.manual_seed(mix("network", recipe.engine.seed, place))
                    home = folder if name == MINILM else model_home(name)
                    self._found[name, place], tokenizer = load_text_network(home, self._classes)
                if tokenizer is not None:
                    check_pads(tokenizer, str(home))
                    tokenizers[name] = tokenizer
        self.tokenizer = self._one_tokenizer(tokenizers, ready)
        self.read_networks(recipe, given)
        del self._found

    def read(self, name: str, place: int, recipe: Recipe) -> nn.Module:
        if (name, place) in self._found:
            return self._found[name, place]
        if place and (name in ENCODERS or name.endswith(".json")):
            raise UserError(f"teacher {name!r} is an untrained network", cure=f"it can be the student: student={name}")
        if place:
            raise UserError(
                f"no text encoder {name!r}{nearest(name, (MINILM,))}", cure=f"give a trained one's folder, or {MINILM}"
            )
        with making():
            return make_encoder(name, len(self.tokenizer), self._classes)

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

    # --- the result ---------------------------------------------------------------------------------------------------
    def student(self, network: nn.Module, sampler: Sampler) -> TextClassifier:
        return TextClassifier(network, self.tokenizer, self.data.classes, self.length, sampler)

    def rows(self, model: Model, seed: int, most: int = 80) -> Rows:
        """Texts have no pictures."""
        return Rows()

    def ask(self, classifier: Any, data: TextData, rows: slice) -> Tensor:
        return classifier.probabilities(data.texts[rows])

    def call(self, model: Any, batch: int) -> Tensor:
        return model.probabilities([self.data.texts[0]] * batch)

    def facts(self, recipe: Recipe, student: Model) -> dict[str, Any]:
        """``examples``: held-out texts, their class, and what each network calls them."""
        held_out: Any = self.data.parts["heldout"]
        chosen = torch.randperm(held_out.n, generator=torch.Generator().manual_seed(recipe.evaluate.seed))[:EXAMPLES]
        texts = [held_out.texts[i] for i in chosen.tolist()]
        everyone: dict[str, Any] = {"student": student, **self.teachers()}
        answers = {who: classifier.classify(texts) for who, classifier in everyone.items()}
        examples = [
            {"text": text, "class": self.data.classes[int(held_out.labels[i])]}
            | {who: answer[place] for who, answer in answers.items()}
            for place, (i, text) in enumerate(zip(chosen.tolist(), texts))
        ]
        return {"examples": examples}

    @classmethod
    def card(cls, recipe: Recipe, result: Mapping[str, Any]) -> Card:
        taught = made_from(recipe.teacher)
        makes = f"A classifier of texts {began(recipe, ENCODERS)}" + (f", taught by {taught}" if taught else "")
        use = "names = student.classify(texts)  # a list of strings"
        return Card(makes, [use], hub_library="transformers", tag="text-classification")
