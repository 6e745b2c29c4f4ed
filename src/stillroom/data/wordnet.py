"""WordNet's dictionary files: definitions of word senses, each under one of 45 lexicographer classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stillroom.errors import UserError

NOUNS = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
    "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
)  # fmt: skip
VERBS = (
    "body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation", "emotion",
    "motion", "perception", "possession", "social", "stative", "weather",
)  # fmt: skip
LEXICOGRAPHER_CLASSES = (
    "adj.all", "adj.pert", "adv.all", *(f"noun.{name}" for name in NOUNS), *(f"verb.{name}" for name in VERBS),
    "adj.ppl",
)  # fmt: skip
"""In the order of WordNet's own numbers (lexnames(5WN))."""
FILES = ("data.adj", "data.adv", "data.noun", "data.verb")


def is_wordnet(folder: Path) -> bool:
    """Whether a folder holds WordNet's dictionary files (Debian: ``wordnet-base``, /usr/share/wordnet)."""
    return all((folder / name).is_file() for name in FILES)


def definitions(folder: Path) -> Iterator[tuple[str, int]]:
    """Each distinct definition once, in file order, with its class number; examples in quotes are left out. A
    definition that stands under several classes counts for the first.

    Raises UserError for a line that is no synset (wndb(5WN)).
    """
    seen: set[str] = set()
    for name in FILES:
        for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("  "):  # the licence
                continue
            head, separator, gloss = line.partition(" | ")
            fields = head.split()
            if not separator or len(fields) < 2 or not fields[1].isdigit():
                raise UserError(
                    f"{folder / name}, line {number} is no synset", cure="the file is damaged: copy it again"
                )
            text = gloss.split('"')[0].strip().strip(";:").strip()
            if text and text not in seen:
                seen.add(text)
                yield text, int(fields[1])
