"""Texts in memory, with or without labels: by name, from CSV, JSONL or text files, from folders, from WordNet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.data.labels import in_order, label_text, matched, places, without_points
from stillroom.data.listing import left_out, seen
from stillroom.data.source import HOLDOUT, LABELS, SPLITS, ArrayData
from stillroom.data.tables import KINDS, kind_of, lines, read_text, rows
from stillroom.data.wordnet import FILES, LEXICOGRAPHER_CLASSES, definitions, is_wordnet
from stillroom.errors import UserError, nearest, shortened
from stillroom.files import stay_inside
from stillroom.folders.shipped import ASSETS
from stillroom.folders.transformers_layout import check_pads

GENERAL = "general"
"""The part that holds texts without labels."""
LENGTH = 64
"""Tokens of a text where nobody asks for another limit."""
NAMED = {"glosses": ASSETS / "glosses"}
COLUMNS = ("text", "label")


@dataclass
class Texts:
    """Texts as they are read. labels: int64 ``[N]``, or None; classes: their names. general: texts without labels."""

    texts: list[str]
    labels: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    name: str = "texts"
    origin: str = ""
    general: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.texts:
            raise UserError(f"data {self.name!r} hold no texts", cure="give at least one")
        self.origin = self.origin or f"{self.name}: {len(self.texts):,} texts in memory"
        if self.labels is not None and len(self.labels) != len(self.texts):
            raise UserError(
                f"data {self.name!r} have {len(self.texts)} texts but {len(self.labels)} labels",
                cure="give one label per text",
            )

    @property
    def n(self) -> int:
        return len(self.texts)

    def take(self, index: Tensor, origin: str = "") -> Texts:
        """The chosen rows as data of their own, with all general texts."""
        texts = [self.texts[i] for i in index.tolist()]
        labels = self.labels[index] if self.labels is not None else None
        return Texts(texts, labels, self.classes, self.name, origin or f"{len(texts):,} of {self.origin}", self.general)

    def by_names(self, theirs: Sequence[str], whose: str) -> Texts:
        """With classes in the order of ``theirs``: see :meth:`ArrayData.by_names`."""
        order, names = matched(self.classes, theirs, whose)
        if self.labels is None or names == self.classes:
            return self
        return replace(self, labels=torch.tensor(order)[self.labels], classes=names)

    def tokenised(self, tokenizer: Any, length: int = LENGTH) -> TextData:
        """As token ids, cut after ``length`` tokens. Part ``general``: the general texts, or these, without labels."""
        (ids, mask), cond = tokens_of(tokenizer, self.texts, length), {}
        if self.labels is not None:
            cond[LABELS] = self.labels
        found = TextData(ids, cond, self.classes, self.name, self.origin, mask=mask, texts=self.texts,
                         tokenizer=tokenizer)  # fmt: skip
        general = self.general or self.texts
        if self.general:
            ids, mask = tokens_of(tokenizer, general, length)
        found.parts[GENERAL] = TextData(
            ids, None, (), self.name, f"{self.name}: {len(general):,} texts without labels", mask=mask, texts=general,
            tokenizer=tokenizer,
        )  # fmt: skip
        return found


class TextData(ArrayData):
    """Token ids ``[N, L]`` (int64, padded at the end) beside the texts they were made of. mask: bool ``[N, L]``, True
    where a token counts; a padding token may be one that texts hold as well.

    A batch is ``{"input_ids": [B, l], "attention_mask": bool [B, l], "cond": {...}}``; ``l`` is the length of the
    longest row of the *global* batch, so that it does not depend on the number of processes.
    """

    def __init__(
        self,
        ids: Tensor,
        cond: Mapping[str, Tensor] | None = None,
        classes: Sequence[str] = (),
        name: str = "texts",
        origin: str = "",
        parts: Mapping[str, ArrayData] | None = None,
        *,
        mask: Tensor,
        texts: Sequence[str],
        tokenizer: Any,
    ) -> None:
        super().__init__(ids, cond, classes, name, origin, parts)
        self.texts, self.tokenizer = list(texts), tokenizer
        self.mask, self.lengths = mask, mask.sum(1)

    def take(self, index: Tensor, origin: str = "") -> TextData:
        kept = {key: value[index] for key, value in self.cond.items()}
        return TextData(
            self.array[index], kept, self.classes, self.name, origin or f"{len(index):,} of {self.origin}",
            mask=self.mask[index], texts=[self.texts[i] for i in index.tolist()], tokenizer=self.tokenizer,
        )  # fmt: skip

    def batch(self, seed: int, step: int, size: int, rows: slice | None = None) -> dict[str, Any]:
        index = self.indices(seed, step, size)
        longest = int(self.lengths[index].max())
        index = index[rows if rows is not None else slice(None)]
        cond = {key: value[index] for key, value in self.cond.items()}
        seen = {"input_ids": self.array[index, :longest], "attention_mask": self.mask[index, :longest]}
        return {**seen, "cond": cond, "index": index}

    @cached_property
    def vocabulary(self) -> str:
        return vocabulary_hash(self.tokenizer)


def tokens_of(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """int64 ids ``[N, l]``, l <= length, padded at the end, and the tokenizer's own mask, bool ``[N, l]``: True where a
    token counts. Raises UserError for a tokenizer that cannot pad, and for a text that it makes no token of."""
    check_pads(tokenizer, "these texts")
    try:
        found = tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, padding_side="right",
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
    except Exception as problem:  # tokenizers raises Exception itself
        raise UserError(
            f"the tokenizer cannot read these texts ({str(problem)[:200]})", cure="take another network's"
        ) from None
    ids, mask = found["input_ids"].long(), found["attention_mask"].bool()
    if not (full := mask.any(1)).all():
        empty = texts[int(full.int().argmin())]
        raise UserError(
            f"the tokenizer makes no token of the text {shortened(empty)}",
            cure="leave it out, or take another network",
        )
    return ids, mask


def vocabulary_hash(tokenizer: Any) -> str:
    """Eight hex digits of SHA-256 over the tokens in the order of their numbers: equal vocabularies, equal hashes."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:8]


def check_vocabularies(known: Mapping[str, Any]) -> None:
    """Raises UserError where tokenizers, given by the names of those who read with them, have other tokens than the
    first."""
    (first, chosen), *others = known.items()
    for name, other in others:
        if vocabulary_hash(other) != vocabulary_hash(chosen):
            raise UserError(
                f"{first!r} and {name!r} have different vocabularies ({len(chosen):,} tokens, "
                f"{vocabulary_hash(chosen)}, and {len(other):,}, {vocabulary_hash(other)})",
                cure="all networks read the same tokens: choose networks of one tokenizer",
            )


# --- by name, file or folder ------------------------------------------------------------------------------------------
def load_texts(source: str | Path, split: str = "train", classes: Sequence[str] = ()) -> Texts:
    """Labelled texts.

    source: ``glosses`` (shipped: WordNet's definitions in 45 classes); a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``
    file with the columns ``text`` and ``label`` (see :mod:`stillroom.data.tables`); a folder with such files named
    ``train`` and, if there is one, ``test``; a folder with one sub-folder of ``.txt`` files per class, directly or
    under ``train/`` and ``test/``; or the folder of WordNet's dictionary files.
    Beside the labelled texts a folder may hold ``general.txt``: texts without labels, one a line.
    split: ``train``, ``test`` or ``all``. A set without a test split holds out every fifth text of each class.
    classes: the names that labels may have, in order; empty: those that occur, numbers by value, others as texts. Files
    of the folder that are not read are counted in ``origin``.

    Raises UserError for anything missing, empty or malformed, naming file and line.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}", cure=f"use one of {', '.join(SPLITS)}")
    path = NAMED.get(str(source)) or Path(source).expanduser()
    name = str(source) if str(source) in NAMED else path.name.split(".")[0]
    if not path.exists():
        raise UserError(
            f"no texts at {str(source)!r}{nearest(str(source), NAMED)}",
            cure=f"give a CSV or JSONL file, a folder, or one of: {', '.join(NAMED)}",
        )
    stay_inside(path)
    read = [path]
    if path.is_file():
        parts = {"all": _table(path)}
    elif is_wordnet(path):
        parts = {"all": [(text, LEXICOGRAPHER_CLASSES[label]) for text, label in definitions(path)]}
        read = [path / file for file in FILES]
    else:
        parts, read = _folder(path)
    general_file = path / "general.txt"
    general = [line for line in lines(read_text(general_file)) if line.strip()] if general_file.is_file() else []
    if str(source) in NAMED or (path.is_dir() and is_wordnet(path)):
        classes = classes or LEXICOGRAPHER_CLASSES
    called = without_points({label for part in parts.values() for _, label in part})
    chosen = [(text, called[label]) for text, label in _chosen(parts, split, path)]
    names = list(classes) or in_order(called.values())
    number = {label: i for i, label in enumerate(names)}
    if not number.keys() >= {label for _, label in chosen}:
        own = in_order(called.values())
        number = dict(zip(own, places(own, names, f"the {len(names)} classes that are asked for in {path}")))
    labels = torch.tensor([number[label] for _, label in chosen])
    origin = f"{name}: {len(chosen):,} {split} texts"
    if path.is_dir() and str(source) not in NAMED:
        origin += left_out(path, [*read, general_file])
    return Texts([text for text, _ in chosen], labels, names, name, origin, general)


def _chosen(parts: dict[str, list[tuple[str, str]]], split: str, path: Path) -> list[tuple[str, str]]:
    if "test" in parts:
        return [*parts["train"], *parts["test"]] if split == "all" else parts[split]
    every = parts.get("all") or parts["train"]
    if split == "all":
        return every
    rank: dict[str, int] = {}
    chosen = []
    for text, label in every:
        held = rank.get(label, 0) % HOLDOUT == HOLDOUT - 1
        rank[label] = rank.get(label, 0) + 1
        if held == (split == "test"):
            chosen.append((text, label))
    if not chosen:
        raise UserError(f"{path}: {len(every)} texts are too few for a test split", cure="give 5 per class or more")
    return chosen


def _folder(path: Path) -> tuple[dict[str, list[tuple[str, str]]], list[Path]]:
    """Labelled texts by split, and the files that were read."""
    found: dict[str, list[tuple[str, str]]] = {}
    read: list[Path] = []
    for split in ("train", "test"):
        files = [f for kind in KINDS for f in (path / f"{split}{kind}", path / f"{split}{kind}.gz") if f.is_file()]
        if len(files) > 1:
            raise UserError(f"{path} has several {split} files", cure=f"keep one of {', '.join(f.name for f in files)}")
        if files:
            found[split] = _table(files[0])
        elif (path / split).is_dir():
            found[split], files = _class_folders(path / split)
        read += files
    if not found:
        found["all"], read = _class_folders(path)
    if "test" in found and "train" not in found:
        raise UserError(f"{path} has a test split only", cure="give train.csv as well")
    return found, read


def _class_folders(path: Path) -> tuple[list[tuple[str, str]], list[Path]]:
    homes = [home for home in seen(path) if home.is_dir()]
    folders = {home.name: [file for file in seen(home) if file.suffix.lower() == ".txt"] for home in homes}
    if sum(map(bool, folders.values())) < 2:
        raise UserError(
            f"{path} holds no labelled texts",
            cure="give train.csv (or .jsonl) with columns text and label, or one sub-folder of .txt files per class",
        )
    found, read = [], [file for files in folders.values() for file in files]
    for name, files in folders.items():
        for file in files:
            if not (text := " ".join(read_text(file).split())):
                raise UserError(f"{file} is empty", cure="write its text into it, or remove it")
            found.append((text, name))
    return found, read


def _table(file: Path) -> list[tuple[str, str]]:
    if not kind_of(file):
        raise UserError(f"{file} is no table of texts", cure=f"give one of {', '.join(KINDS)} (or .gz of it)")
    found = []
    for place, row in rows(file, COLUMNS, '{"text": "...", "label": "..."}'):
        if not row.keys() >= {*COLUMNS}:
            raise UserError(
                f"{place} has the columns {', '.join(map(repr, row)) or 'none'}, not text and label",
                cure="columns: text, label; none empty",
            )
        text, label = (row[key] for key in COLUMNS)
        if not isinstance(text, str) or not text.strip() or label is None or label == "":
            raise UserError(f"{place} has no text or no label", cure="columns: text, label; none empty")
        found.append((text, label_text(label, place)))
    if not found:
        raise UserError(f"{file} holds no rows", cure="columns: text, label")
    return found
