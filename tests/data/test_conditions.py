"""Labels without pictures: what methods that need no images are trained on, and how the others are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.data.conditions import LabelsAlone, NoPictures
from stillroom.errors import UserError
from stillroom.planning import plan
from stillroom.recipe import Recipe
from stillroom.run import run
from tiny import FAST, make_teacher

SHORT: dict[str, list[str]] = {
    "boot": ["options.held_out=2", "options.held_out_steps=2"],
    "kd": ["options.paths=8", "options.path_steps=2"],
    "agd": ["options.paths=8", "options.path_steps=2", "options.steps=2", "options.width=2"],
    "sid-lsg": [],
    "swiftbrush": [],
}


def test_every_class_comes_equally_often_and_a_picture_is_refused() -> None:
    data = LabelsAlone(3, ["bar", "cross", "dot"], (1, 8, 8))
    batch = data.batch(0, 0, 300)
    assert torch.equal(batch["cond"]["label"].bincount(), torch.tensor([100, 100, 100]))
    assert data.shape == (1, 8, 8)
    for ask in (lambda: batch["x"], lambda: data.images(), lambda: data.take(torch.tensor([0])).images()):
        with pytest.raises(UserError, match="labels alone"):
            ask()
    with pytest.raises(KeyError):
        NoPictures()["other"]
    assert LabelsAlone(0, [], (2,)).batch(0, 0, 4)["cond"] == {}


@pytest.mark.parametrize("method", SHORT)
def test_a_run_reads_labels_alone(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the recipe on: no data set is opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stillroom.tasks.class_images.task.load_data", no_pictures)
    make_teacher(tmp_path / "teacher")
    changes = [*FAST, "engine.steps=2", "evaluate.samples=2", *SHORT[method]]
    result = run(Recipe.load(method, changes, teacher="teacher", data="labels"), tmp_path / "run")
    assert result.student is not None
    assert "3 labels, no images" in (tmp_path / "run" / "result.json").read_text()


def no_pictures(*_: Any) -> Any:
    raise AssertionError("a data set was read")


def test_who_needs_pictures_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    with pytest.raises(UserError, match="labels alone"):
        run(Recipe.load("ect", [*FAST, "engine.steps=2"], teacher="teacher", data="labels"), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # the next try may have the name
    with pytest.raises(UserError, match="no images to compare with"):
        plan(Recipe.load("boot", teacher="teacher", data="labels"))
    assert plan(Recipe.load("boot", ["evaluate.n=0"], teacher="teacher", data="labels")).turns
