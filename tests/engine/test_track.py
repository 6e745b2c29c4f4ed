"""Trackers get the rows of metrics.jsonl, each once, from the first process alone."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom import cli
from stillroom.engine import track
from stillroom.errors import UserError
from stillroom.recipe import Recipe
from tiny import FAST, make_data, make_teacher
from workers.toy import fitted, trainer


def train(folder: Path, *names: str, stop: int = 0, resume: bool = False) -> Any:
    run = trainer(folder, resume)
    run.track = list(names)
    return fitted(run, stop)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- TensorBoard ------------------------------------------------------------------------------------------------------
def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.parametrize("stop", [0, 3, 11])
def test_tensorboard_shows_the_rows_of_the_log_once_each_also_after_a_resume(tmp_path: Path, stop: int) -> None:
    """After step 3 there is no checkpoint yet; after step 11, row 10 is later than the checkpoint of step 8."""
    pytest.importorskip("tensorboard")
    if stop:
        train(tmp_path, "tensorboard", stop=stop)
    train(tmp_path, "tensorboard", resume=bool(stop))
    written, found = rows(tmp_path), scalars(tmp_path)
    keys = {key for row in written for key, value in row.items() if key != "step" and not isinstance(value, str)}
    assert found.keys() == keys
    assert "loss/generator/match" in keys
    for key in keys:
        expected = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in written if key in row]
        assert found[key] == expected


# --- trackio and Weights & Biases -------------------------------------------------------------------------------------
class Recorder(SimpleNamespace):
    """Stands for the module of a service: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(starts=[], rows=[], ends=0, __spec__=ModuleSpec("recorder", None))

    def init(self, **settings: Any) -> None:
        self.starts.append(settings)

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append({"step": step, **row})

    def finish(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("name", ["trackio", "wandb"])
@pytest.mark.parametrize("stop", [3, 9, 11])
def test_a_service_gets_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stop: int) -> None:
    module = Recorder()
    monkeypatch.setitem(sys.modules, name, module)
    train(tmp_path, name, stop=stop)
    train(tmp_path, name, resume=True)

    def timeless(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != "seconds"}

    assert [timeless(row) for row in module.rows] == [timeless(row) for row in rows(tmp_path)]
    assert (len(module.starts), module.ends) == (2, 2)
    first, second = module.starts
    assert first["project"] == second["project"] == "stillroom"
    assert first["name"] == second["name"] == tmp_path.name


def test_wandb_is_offline_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(tmp_path, "wandb", stop=5)
    monkeypatch.setenv("WANDB_MODE", "online")
    train(tmp_path, "wandb", resume=True)
    assert [(start["mode"], start["resume"]) for start in module.starts] == [("offline", None), ("online", "allow")]
    assert module.starts[0]["id"] == module.starts[1]["id"]
    assert module.starts[0]["dir"] == str(tmp_path)


def test_several_trackers_get_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: Recorder() for name in ("trackio", "wandb")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    train(tmp_path, "trackio", "wandb")
    assert modules["trackio"].rows == modules["wandb"].rows == rows(tmp_path)


def test_other_processes_track_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", module)
    run = trainer(tmp_path)
    run.track = ["trackio"]
    monkeypatch.setattr(type(run.world), "first", property(lambda _: False))
    run.fit()
    assert len(run.history) == 4
    assert (module.starts, module.rows) == ([], [])
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_the_real_trackio_holds_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
    train(tmp_path / "run", "trackio", stop=11)
    train(tmp_path / "run", "trackio", resume=True)
    (file,) = (tmp_path / "store").glob("*.db")
    with sqlite3.connect(file) as store:
        steps = [step for (step,) in store.execute("select step from metrics order by id")]
    assert steps == [row["step"] for row in rows(tmp_path / "run")]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_the_real_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, "wandb")
    import wandb

    wandb.teardown()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss/generator/match" in file.read_bytes()


# --- recipes ----------------------------------------------------------------------------------------------------------
def test_a_run_is_tracked_by_its_recipe_which_keeps_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", module)
    make_teacher(tmp_path / "teacher")
    make_data(tmp_path / "data")
    asked = ["run", "dmd2", "--teacher", "teacher", "--data", "data", "--steps", "2", *FAST]
    assert cli.main([*asked, "track=trackio"]) == 0
    assert module.rows == rows(tmp_path / "runs" / "dmd2")
    assert Recipe.load("runs/dmd2").track == "trackio"
    assert Recipe.load("dmd2").hash() == Recipe.load("dmd2", ["track=trackio, tensorboard"]).hash()


def test_unknown_and_repeated_trackers_are_refused() -> None:
    with pytest.raises(UserError, match=r"recipe key 'track': no tracker 'wanbd' \(did you mean 'wandb'\?\); known"):
        Recipe.load("dmd2", track="tensorboard, wanbd")
    with pytest.raises(UserError, match="names one tracker twice"):
        Recipe.load("dmd2", track="wandb,wandb")
    assert track.names_of("") == []


def test_a_missing_package_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else usual(name))
    assert cli.main(["run", "dmd2", "--steps", "1", "evaluate.n=0", "track=wandb"]) == 2
    said = "stillroom: tracking by wandb needs the package wandb; pip install 'stillroom[track]'\n"
    assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []
