"""The table of methods and families in docs/models.md says what happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline_pairs import METHODS, STEPS, try_pair
from stillroom.folders.pipeline_families import FAMILIES
from tiny_pipelines import PIPELINES, VARIANTS

RECORD = Path(__file__).resolve().parents[3] / "results" / "pipelines" / "pairs.json"


def test_the_record_is_of_all_families_and_methods() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["steps"] == STEPS
    assert list(record["families"]) == list(FAMILIES) == list(PIPELINES)
    for name, entry in record["families"].items():
        assert list(entry["methods"]) == list(METHODS)
        assert entry["pipelines"] == list(FAMILIES[name].pipelines)
        assert PIPELINES[name][0] in entry["pipelines"]


# One row of the table, and families whose loops are unlike others; the rest is marked slow.
UNLIKE = ("sd", "lcm", "flux", "sana-sprint", "lumina2", "wan")
PAIRS = [
    pytest.param(
        family,
        method,
        marks=() if family == "sd3" or (method == "dmd2" and family in UNLIKE) else pytest.mark.slow,
    )
    for family in PIPELINES
    for method in METHODS
]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_pair_does_what_the_table_says(family: str, method: str) -> None:
    if family == "kolors":
        pytest.importorskip("sentencepiece")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert try_pair(family, method) == record["families"][family]["methods"][method]


@pytest.mark.parametrize(
    "name", [name if name == "sd zero-snr v" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_schedules_and_inputs_of_other_kinds_are_trained_on(name: str) -> None:
    assert try_pair(name, "dmd2") == "runs"
