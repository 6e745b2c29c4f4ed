"""Model cards: their tables and their ``model-index`` hold what ``result.json`` measured, and nothing else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finished import RESULT
from stillroom.bench.scenes import bench as scenes
from stillroom.evaluation import cost
from stillroom.method import get_method
from stillroom.recipe import Recipe
from stillroom.report.card import model_card
from stillroom.report.rows import number
from stillroom.run import run
from stillroom.tasks.pipelines import model as pipeline
from stillroom.tasks.words import teacher_names
from tiny import FAST, make_data
from tiny_models import SAVE, SIDE
from tiny_pipelines import save_pipeline
from tiny_text import CLASSES as KINDS
from tiny_text import WORDS, encoder, tokenizer

BRIEF = [*FAST[:-1], "engine.steps=1", "engine.batch=4", "evaluate.seed=3"]


def class_images(place: Path) -> Recipe:
    return Recipe.load("dmd2", [*BRIEF, "evaluate.n=8"])


def classifier(place: Path) -> Recipe:
    changes = [*BRIEF, "evaluate.n=5", "options.rounds=2", "engine.steps=2"]
    return Recipe.load("gt-self-distill", changes, data=str(make_data(place / "data")))


def texts(place: Path) -> Recipe:
    encoder(2, 8).save_pretrained(place / "model")  # type: ignore[operator]
    tokenizer().save_pretrained(place / "model")
    rows = [f"{WORDS[i % 12]} {WORDS[i % 7]},{KINDS[i % 3]}" for i in range(30)]
    (place / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    changes = [*BRIEF, "evaluate.n=5", "options.layer_map=uniform"]
    return Recipe.load(
        "distiller", changes, student=f"{place}/model", teacher=f"{place}/model", data=f"{place}/texts.csv"
    )


def images(place: Path) -> Recipe:
    families, save = SAVE["encoders"]
    folder = save(families["vit_mae"], place / "student")
    data = make_data(place / "data", SIDE, 3)
    return Recipe.load("dmae", [*BRIEF, "evaluate.n=5"], student=str(folder), teacher=str(folder), data=str(data))


def prompts(place: Path) -> Recipe:
    folder = save_pipeline("sd3", place / "teacher")
    (place / "prompts.txt").write_text("a red three\ntwo fours\n")
    changes = [*BRIEF, "evaluate.n=6", "engine.batch=2", "options.t_init=1.0"]
    return Recipe.load("sid-lsg", changes, teacher=f"{folder}@32", data=f"{place}/prompts.txt")


RUNS: dict[str, tuple[Callable[[Path], Recipe], str, set[str]]] = {
    "class images": (class_images, "image-generation", {"fd", "class_agreement"}),
    "classifier": (classifier, "image-classification", {"accuracy", "nll", "ece"}),
    "texts": (texts, "text-classification", {"accuracy", "agreement", "kl"}),
    "encoder": (images, "image-feature-extraction", {"probe", "knn", "cka"}),
    "pipeline": (prompts, "text-to-image", {"sceneeval", "fd", "kid"}),
}


def hub_reads(card: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard.load(card)


def table(text: str, heading: str) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table under a heading."""
    body = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|.*\|$", body, re.MULTILINE)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return rows[0], rows[2:]


@pytest.mark.parametrize("kind", [pytest.param("class images", marks=pytest.mark.slow), *list(RUNS)[1:]])
def test_a_card_holds_the_scores_of_its_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "pipeline":
        monkeypatch.setattr(pipeline, "TEACHER_STEPS", 2)
        monkeypatch.setattr(scenes, "REFERENCE", 12)
        monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    make, task, expected = RUNS[kind]
    recipe = make(tmp_path)
    run(recipe, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    card = hub_reads(tmp_path / "run" / "student" / "README.md")
    found = {entry.metric_type: entry for entry in card.data.eval_results}
    scores = result["scores"]["student"]
    assert expected <= found.keys() <= scores.keys()
    assert {key: entry.metric_value for key, entry in found.items()} == {key: scores[key] for key in found}
    assert {entry.task_type for entry in found.values()} == {task}
    assert {entry.dataset_name for entry in found.values()} == {result["bench"]["reference"]}
    assert all(entry.metric_args == {"n": result["bench"]["n"], "seed": 3} for entry in found.values())
    assert card.data.model_name == "run"
    columns, rows = table(card.text, "Scores")
    who = [name.removesuffix(" (real images)") for name in columns[1:]]
    assert who[: 1 + len(result["teachers"])] == ["student", *result["teachers"]]
    shown = {row[0].split(" ")[0] for row in rows}
    assert len(shown) > 1
    cells = sorted(cell for row in rows for cell in row[1:] if cell != "–")
    measured = [number(result["scores"].get(name, {}).get(key)) for key in found for name in who]
    assert cells == sorted(value for value in measured if value != "–")
    assert f"n = {result['bench']['n']}, seed 3. Reference: {result['bench']['reference']}" in card.text
    columns, rows = table(card.text, "Cost of a sample")
    (latency,) = (row for row in rows if row[0] == "Latency, batch 1 (median)")
    assert all(re.fullmatch(r"[\d.]+ m?s", cell) for cell in latency[1:])


@pytest.mark.parametrize("kind", ["classifier", "pipeline"])
def test_a_run_without_evaluation_says_that_nothing_was_measured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "median_ms", None)  # not to be called
    monkeypatch.setattr(pipeline, "TEACHER_STEPS", 2)
    recipe = RUNS[kind][0](tmp_path)
    recipe = Recipe.from_dict(recipe.to_dict() | {"evaluate": {"n": 0, "seed": 0}})
    run(recipe, tmp_path / "run")
    card = hub_reads(tmp_path / "run" / "student" / "README.md")
    assert card.data.eval_results is None
    assert "model-index" not in card.content
    assert "Nothing was measured" in card.text
    assert "Latency" not in card.text


def card_of(**changes: Any) -> str:
    recipe = Recipe.load("dmd2", [f"evaluate.n={changes.pop('n', 5000)}"])
    return model_card(recipe, {**RESULT, **changes}, get_method("dmd2").paper)


def test_where_there_is_no_bench_the_card_says_so() -> None:
    card = card_of(scores={}, bench={})
    assert "No scores were measured: there is no bench for these data." in card
    assert "model-index" not in card


def test_what_is_no_number_is_in_no_index() -> None:
    scores = {"student": {"fd": math.nan, "kid": 0.5, "precision": None}, "teacher": {}, "floor": {}}
    front = yaml.safe_load(card_of(scores=scores).split("---\n")[1])
    (result,) = front["model-index"][0]["results"]
    assert [row["type"] for row in result["metrics"]] == ["kid"]


def test_scores_from_an_earlier_measurement_are_told_apart() -> None:
    bench: Any = RESULT["bench"]
    assert "measured before" not in card_of()
    card = card_of(bench=bench | {"earlier": ["teacher"]})
    assert "The scores of teacher were measured before this run" in card


def test_the_card_of_a_model_of_classes_asks_for_classes() -> None:
    assert "student.sample([0, 1, 2], seed=0)" in card_of(rows=["sneaker", "ankle boot"], task="class-images")
    assert "student.sample(['a red three', 'two fours'], seed=0)" in card_of(
        rows=["a red three", "two fours"], task="text-images"
    )


def test_no_teacher_takes_the_students_column() -> None:
    assert teacher_names(["scenes-sd3", "./b/one"]) == ["scenes-sd3", "one"]
    assert teacher_names(["runs/a/student", "x/model", "y/model"]) == ["teacher-1", "teacher-2", "teacher-3"]
