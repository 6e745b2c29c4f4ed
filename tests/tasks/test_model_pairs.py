"""The tables of methods and families of transformers in docs/models.md say what happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_pairs import METHODS, STEPS, try_pair
from tiny_models import SAVE

RECORD = Path(__file__).resolve().parents[2] / "results" / "models" / "pairs.json"


def test_the_record_is_of_all_families_and_methods() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["steps"] == STEPS
    assert list(record["kinds"]) == list(SAVE)
    for kind, (families, _) in SAVE.items():
        assert {name: entry["class"] for name, entry in record["kinds"][kind].items()} == {
            name: family.cls for name, family in families.items()
        }
        assert all(list(entry["methods"]) == list(METHODS[kind]) for entry in record["kinds"][kind].values())


# Of each table one column and one row; the others are marked slow.
FIRST = {"classifiers": ("meal-v2", "vit"), "encoders": ("hybrid-distill", "vit_mae"), "texts": ("ernie-tiny", "bert")}
PAIRS = [
    pytest.param(kind, family, method, marks=() if {method, family} & set(FIRST[kind]) else pytest.mark.slow)
    for kind, (families, _) in SAVE.items()
    for family in families
    for method in METHODS[kind]
]


@pytest.mark.parametrize(("kind", "family", "method"), PAIRS)
def test_a_pair_does_what_the_table_says(kind: str, family: str, method: str) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert try_pair(kind, family, method) == record["kinds"][kind][family]["methods"][method]
