"""Benches by name: each says what it measures, runs find theirs, and one in another package needs no edit here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stillroom import bench as registry
from stillroom import tasks
from stillroom.bench import bench_card, benches, find_bench, get_bench, trained_teacher
from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.bench.fashion_encoders.bench import ImageEncodersBench
from stillroom.bench.scenes.bench import ScenesBench
from stillroom.bench.teach import recipe_file, teacher_bench
from stillroom.data.source import LABELS, ArrayData
from stillroom.errors import UserError
from stillroom.proofs.runner import prove
from stillroom.task import IN_MEMORY

RESULTS = Path(__file__).parents[2] / "results"
FACTS = {"n", "extractor"}
"""What a floor says beside scores."""


@pytest.mark.parametrize("name", sorted(benches()))
def test_every_bench_has_scores_and_a_task_that_exists(name: str) -> None:
    cls = benches()[name]
    keys = [score.key for score in cls.scores]
    assert cls.name == name
    assert len(keys) == len(set(keys)) > 0
    assert (Path(tasks.__file__).parent / cls.task.replace("-", "_")).is_dir()
    assert all(score.name and not score.name.endswith(".") for score in cls.scores)
    assert sum(bool(score.label) for score in cls.scores) <= 2  # tiles at the top of a report


@pytest.mark.parametrize("name", ["ring", "pair", "tiles", "digits"])
def test_a_floor_is_made_of_the_scores_of_its_bench(name: str) -> None:
    made = get_bench(name)
    assert set(made.floor()) - FACTS == {score.key for score in made.scores}


def test_recorded_floors_and_arms_have_the_scores_of_their_bench() -> None:
    floors = [json.loads(path.read_text())["floor"] for path in RESULTS.glob("*.json")]
    for name, floor in (item for found in floors for item in found.items()):
        keys = {score.key for score in benches()[name].scores}
        said = {key.removeprefix("teacher_") for key in floor if not key.endswith(" teacher")} - FACTS
        assert said - {"kid_sd"} <= keys | {"precision", "recall", "density", "coverage"}, name
    for path in RESULTS.glob("arms/*/*.json"):
        run = json.loads(path.read_text())
        assert {score.key for score in benches()[run["world"]].scores} - set(run["scores"]) == set(), path


def test_an_unknown_bench_is_named_with_the_nearest() -> None:
    for ask in (get_bench, bench_card):
        with pytest.raises(UserError, match=r"unknown bench 'fashon' .did you mean 'fashion'"):
            ask("fashon")
    with pytest.raises(UserError, match=r"no teacher recipe 'rings' .did you mean 'ring'"):
        teacher_bench("rings")


def test_every_teacher_recipe_lies_in_the_room_that_teaches_it() -> None:
    taught = {name for cls in benches().values() for name in cls.teaches}
    rooms = Path(registry.__file__).parent
    recipes = {path.stem: path for path in rooms.glob("*/*.yaml")}
    assert set(recipes) == taught - {"scenes-parser"}
    assert all(recipe_file(name) == path for name, path in recipes.items())


# --- for runs ---------------------------------------------------------------------------------------------------------
def images(*shape: int, classes: int = 3) -> ArrayData:
    array = torch.zeros(6, *shape, dtype=torch.uint8)
    return ArrayData(array, {LABELS: torch.arange(6) % max(classes, 1)}, [str(c) for c in range(classes)], "some")


def test_runs_find_the_bench_that_can_judge_them() -> None:
    grey, colour = images(1, 28, 28), images(3, 32, 32)
    found = find_bench("class-images", "some/folder", grey)
    assert isinstance(found, ClassImagesBench)
    assert found.source == "some/folder"
    assert found.train is grey
    assert find_bench("class-images", "some/folder", colour) is None
    assert find_bench("class-images", "some/folder", images(1, 28, 28, classes=1)) is None
    assert find_bench("class-images", IN_MEMORY, grey) is None
    assert find_bench("classify", "fashion", grey) is None  # judged by its task, on its own test split
    spoken, other = (SimpleNamespace(captions=[text]) for text in ("a red three", "a red cat"))
    for task in ("text-images", "pipelines"):
        assert isinstance(find_bench(task, "some/store", spoken), ScenesBench)
        assert find_bench(task, "some/store", other) is None
    assert isinstance(find_bench("encode", "fashion", get_bench("fashion").data()), ImageEncodersBench)
    assert find_bench("encode", "some/folder", images(1, 28, 28, classes=0)) is None


def test_scenes_of_another_size_are_not_judged() -> None:
    assert get_bench("scenes").compare({"student": SimpleNamespace(size=(64, 64))}, 6, 0) == {}


def test_a_teacher_of_a_bench_by_name_knows_its_own_data_alone() -> None:
    assert trained_teacher("resnet-small", "fashion") is None
    with pytest.raises(UserError, match="knows 'fashion' alone"):
        trained_teacher("fashion-mae", "mnist")


# --- of another package -----------------------------------------------------------------------------------------------
PACKAGE = """
from stillroom.bench import bench
from stillroom.bench.ring.bench import RingBench
from stillroom.proofs.base import Arm, Claim, Proof


@bench("toy")
class ToyBench(RingBench):
    n = 200


ARMS = (
    Arm("short", "swiftbrush", engine={"steps": 2, "batch": 16}),
    Arm("teacher", sampler={"name": "ode", "solver": "euler", "steps": 8}),
)
PROOFS = (Proof("toy-method", "mechanism", "toy", ARMS, (Claim("c", "", "", "ced", "teacher", "<=", right="short"),)),)
"""


def test_a_bench_of_another_package_is_proven_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_package.py").write_text(PACKAGE)
    facts = tmp_path / "toy_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    points = "[stillroom.benches]\ntoy = toy_package\n[stillroom.proofs]\ntoy-method = toy_package:PROOFS\n"
    (facts / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry._BENCHES, "found", dict(registry._BENCHES.found))
    try:
        (result,) = prove(["toy-method"], seeds=[0], jobs=1, results=tmp_path / "results", report=lambda line: None)
    finally:
        sys.modules.pop("toy_package", None)
    assert result["bench"] == ["toy"]
    assert result["claims"][0]["verdict"] == "holds"
    assert set(result["floor"]["toy"]) == {score.key for score in benches()["ring"].scores}
