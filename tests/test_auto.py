"""AutoDistiller: features of data, the resumable search, importances, and the recommender on a made-up world."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.auto import (
    DISTILLER,
    Recommender,
    Result,
    data_features,
    importances,
    options_of,
    results,
    run_pipeline,
    search,
)  # fmt: skip
from stillroom.data.texts import Texts
from stillroom.errors import TrainingDiverged, UserError
from stillroom.method import get_method
from stillroom.recipe import Recipe
from stillroom.tasks.classify_text.model import TextClassifier
from tiny_text import CLASSES, data, encoder, texts, tokenizer

SPACE = {"intermediate": ["none", "mse", "mi-0.5"], "layer_map": ["skip", "last"], "prediction": ["ce", "mse"]}
WORTH = {"none": 0.0, "mse": 0.1, "mi-0.5": 0.3}


def score(pipeline: dict[str, Any]) -> float:
    """What the intermediate loss is worth, and a little for the layer map."""
    return 0.5 + WORTH[pipeline["intermediate"]] + 0.02 * (pipeline["layer_map"] == "last")


def test_features_by_hand() -> None:
    found = data_features(Texts(["a b", "a c d e", "a b", "f"], torch.tensor([0, 0, 0, 1]), ["x", "y"]))
    assert found["log_texts"] == pytest.approx(math.log(4))
    assert found["classes"] == 2
    assert found["label_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert found["mean_words"] == pytest.approx(9 / 4)
    assert found["sd_words"] == pytest.approx(math.sqrt((4 + 16 + 4 + 1) / 4 - (9 / 4) ** 2))
    assert found["words_once"] == pytest.approx(4 / 6)
    assert data_features(data()) == data_features(texts(30))


def test_every_pipeline_of_the_space_is_one_of_the_methods() -> None:
    options = get_method("distiller").Options
    for key, values in DISTILLER.items():
        for value in values:
            recipe = Recipe.load("distiller", **{f"options.{k}": v for k, v in options_of({key: value}).items()})
            assert isinstance(recipe.method_options(), options)
    assert options_of({"intermediate": "mi-0.9", "prediction": "ce"}) == {
        "intermediate": "mi", "alpha": 0.9, "prediction": "ce"
    }  # fmt: skip


def test_a_search_goes_on_where_it_was_killed_and_knows_what_matters(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    tried: list[dict[str, Any]] = []

    def killed(pipeline: dict[str, Any]) -> float:
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append(pipeline)
        return score(pipeline)

    file = tmp_path / "studies" / "auto.db"
    with pytest.raises(KeyboardInterrupt):
        search(killed, file, 16, space=SPACE, features={"classes": 3.0})
    assert len(tried) == 5
    study = search(lambda p: tried.append(p) or score(p), file, 16, space=SPACE)
    assert len(tried) == 16  # the five are not tried again
    assert study.best_params["intermediate"] == "mi-0.5"
    assert study.best_value == pytest.approx(0.82)
    shares = importances(study)
    assert next(iter(shares)) == "intermediate"
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["intermediate"] > 0.8
    found = results(file)
    assert len(found) == 16
    assert {row.features["classes"] for row in found} == {3.0}
    assert all(row.score == pytest.approx(score(dict(row.pipeline))) for row in found)
    with pytest.raises(UserError, match="another space"):
        search(score, file, 30, space={"prediction": ["ce"]})
    with pytest.raises(UserError, match="did you mean 'random'"):
        search(score, file, 30, space=SPACE, sampler="randm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no study"):
        results(tmp_path / "none.db")


def test_a_pipeline_that_diverges_counts_as_failed(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    calls: list[int] = []

    def sometimes(pipeline: dict[str, Any]) -> float:
        calls.append(1)
        if len(calls) % 2:
            raise TrainingDiverged("training diverged")
        return score(pipeline)

    study = search(sometimes, tmp_path / "auto.db", 4, space=SPACE, sampler="random")
    assert len(calls) == 8
    assert len(results(tmp_path / "auto.db")) == 0  # this study does not know its data
    assert sum(trial.value is not None for trial in study.trials) == 4

    def never(pipeline: dict[str, Any]) -> float:
        raise TrainingDiverged("training diverged")

    with pytest.raises(UserError, match="ten pipelines in a row"):
        search(never, tmp_path / "other.db", 4, space=SPACE)


def test_the_recommender_learns_that_the_best_pipeline_depends_on_the_data() -> None:
    """Many texts: mutual information is best; few: the squared error. Three sizes of ten are never shown."""
    every = [
        {"intermediate": a, "layer_map": b, "prediction": c}
        for a in SPACE["intermediate"] for b in SPACE["layer_map"] for c in SPACE["prediction"]
    ]  # fmt: skip

    def truth(size: float, pipeline: dict[str, Any]) -> float:
        best = "mi-0.5" if size > 6 else "mse"
        return 0.5 + 0.3 * (pipeline["intermediate"] == best) + 0.02 * (pipeline["layer_map"] == "last")

    shown = [4.0, 4.5, 5.5, 6.5, 7.5, 8.0]
    rows = [Result({"log_texts": size}, p, truth(size, p)) for size in shown for p in every]
    recommender = Recommender(SPACE).fit(rows)
    for size, best in ((5.0, "mse"), (7.0, "mi-0.5"), (8.5, "mi-0.5")):
        first, second, third = recommender.recommend({"log_texts": size}, 3)
        assert (first["intermediate"], first["layer_map"]) == (best, "last")
        assert second["intermediate"] == best
        assert third["intermediate"] == best
        assert first != second
    with pytest.raises(UserError, match="too few"):
        Recommender(SPACE).fit(rows[:1])
    with pytest.raises(UserError, match="have the features classes, the results log_texts"):
        recommender.recommend({"classes": 3.0})
    with pytest.raises(UserError, match="intermediate is 'pkd'"):
        recommender.predict({"log_texts": 5.0}, [{**every[0], "intermediate": "pkd"}])
    with pytest.raises(UserError, match="call fit first"):
        Recommender(SPACE).recommend({"log_texts": 5.0})


def test_pipelines_are_run_and_scored_against_their_teacher(tmp_path: Path) -> None:
    lines = [f"{t},{CLASSES[i]}\n" for t, i in zip(texts(60).texts, texts(60).labels.tolist())]  # type: ignore
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    order = sorted(CLASSES)
    for name, layers, seed in (("small", 2, 0), ("big", 2, 1)):
        TextClassifier(encoder(layers, 8, seed=seed), tokenizer(), order, 12).save(tmp_path / name)
    recipe = Recipe.load(
        "distiller",
        [
            "engine.optim={distil: {lr: 0.001}}",
            "engine.steps=2",
            "engine.batch=6",
            "options.tune_share=0",
            "options.critic_width=8",
        ],
        student=str(tmp_path / "small"),
        teacher=str(tmp_path / "big"),
        data=str(tmp_path / "rows.csv"),
    )
    objective = run_pipeline(recipe, tmp_path / "runs")
    objective({"intermediate": "none", "layer_map": "skip"})  # it has no critics
    found = objective({"intermediate": "mi-0.9", "layer_map": "skip", "prediction": "mse", "augmentation": "edits"})
    assert math.isfinite(found)
    assert found >= 0
    used = Recipe.load(tmp_path / "runs" / "0001").options
    assert (used["intermediate"], used["alpha"], used["augmentation"]) == ("mi", 0.9, "edits")
