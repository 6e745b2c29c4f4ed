"""Checkpoints: a resumed run is the run that was never interrupted, whatever interrupted it."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stillroom.engine import checkpoint
from stillroom.engine.checkpoint import Checkpoints
from stillroom.errors import UserError
from workers.toy import Stop, stop_after, trainer, weights

WORKERS = Path(__file__).parents[1] / "workers"
DROPOUT = {"dropout": 0.2}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def cut(folder: Path, step: int, **settings: Any) -> None:
    """Train and leave after ``step`` as a crash would."""
    run = trainer(folder, options=DROPOUT, **settings)
    run.callbacks.append(stop_after(step))
    with pytest.raises(Stop):
        run.fit()


def resumed(folder: Path, **settings: Any) -> dict[str, Tensor]:
    run = trainer(folder, resume=True, options=DROPOUT, **settings)
    run.fit()
    return weights(run)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("straight")
    run = trainer(folder, options=DROPOUT)
    run.fit()
    return weights(run), rows(folder)


@pytest.mark.parametrize("step", [1, 4, 7, 9, 11])
def test_resumed_run_has_the_weights_and_the_log_of_the_straight_one(tmp_path: Path, straight: Any, step: int) -> None:
    cut(tmp_path, step)
    assert same(resumed(tmp_path), straight[0])
    assert rows(tmp_path) == straight[1]


def test_a_log_line_cut_short_by_the_crash_is_dropped(tmp_path: Path, straight: Any) -> None:
    cut(tmp_path, 11)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')
    resumed(tmp_path)
    assert rows(tmp_path) == straight[1]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    cut(tmp_path, 11, checkpoint_every=2, keep=3)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [6, 8, 10]


def test_frozen_networks_are_not_stored(tmp_path: Path) -> None:
    cut(tmp_path, 5)
    names = Checkpoints(tmp_path / "checkpoints").manifest(4)["tensors"]
    assert any(name.startswith("weights/student.") for name in names)
    assert not any("teacher" in name for name in names)


def damage(folder: Path, how: str) -> None:
    target = folder / "weights.safetensors"
    if how == "flip":
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)
    elif how == "cut":
        os.truncate(target, target.stat().st_size // 2)
    elif how == "missing":
        target.unlink()
    else:
        (folder / "manifest.json").write_text('{"step": ')


@pytest.mark.parametrize("how", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word_about_it(
    tmp_path: Path, straight: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cut(tmp_path, 9)
    damage(tmp_path / "checkpoints" / "step-0000008", how)
    assert same(resumed(tmp_path), straight[0])
    assert "step-0000008 is damaged" in caplog.text
    assert rows(tmp_path) == straight[1]


def test_when_all_checkpoints_are_damaged_the_run_says_so(tmp_path: Path) -> None:
    cut(tmp_path, 9)
    for step in (4, 8):
        damage(tmp_path / "checkpoints" / f"step-{step:07d}", "flip")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(step 8: weights.safetensors"):
        resumed(tmp_path)


@pytest.mark.parametrize("where", ["tensors", "sync", "rename"])
def test_a_full_disk_is_an_error_with_the_last_good_checkpoint_intact(
    tmp_path: Path, straight: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    cut(tmp_path, 5)

    def full(*_: Any) -> None:
        if where == "tensors":  # the words of the safetensors library
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        target = {"tensors": "safetensors.torch.save_file", "sync": "os.fsync", "rename": "os.rename"}[where]
        patch.setattr(target, full)
        with pytest.raises(UserError, match="no space left on the disk while writing"):
            resumed(tmp_path)
    found = Checkpoints(tmp_path / "checkpoints")
    assert found.steps() == [4]
    assert found.manifest(4)["step"] == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert same(resumed(tmp_path), straight[0])


def test_a_checkpoint_of_another_recipe_is_refused_with_the_key_named(tmp_path: Path) -> None:
    cut(tmp_path, 5)
    with pytest.raises(UserError, match=r"was made with engine.seed=3, this run has 4"):
        resumed(tmp_path, seed=4)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(tmp_path, 5)
    monkeypatch.setattr("workers.toy.TOKENS", 4)
    with pytest.raises(UserError, match=r"weights/student.network.position has shape \[3, 6\] there and \[4, 6\] here"):
        resumed(tmp_path)


def test_reading_a_checkpoint_runs_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(tmp_path, 5)
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr("pickle.loads", None)
    monkeypatch.setattr("torch.load", None)
    resumed(tmp_path)


def test_checkpoint_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call the process dies in, what is on disk is the old checkpoint or the new one."""

    class Died(BaseException):
        pass

    store = Checkpoints(tmp_path, keep=1)
    store.save(1, {"weights": {"w": torch.ones(3)}}, {})
    rmtree = (checkpoint.shutil, "rmtree")
    for module, name in [(checkpoint, "sync"), (checkpoint, "digest"), (os, "fsync"), (os, "rename"), rmtree]:
        with monkeypatch.context() as patch:

            def die(*_: Any, **__: Any) -> None:
                raise Died

            patch.setattr(module, name, die)
            with pytest.raises(Died):
                store.save(2, {"weights": {"w": torch.zeros(3)}}, {})
        found = Checkpoints(tmp_path).newest()
        assert found is not None
        assert found["step"] in (1, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments_the_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    """kill -9, at least 20 times."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(folder: Path) -> subprocess.Popen:
        worker = subprocess.Popen([sys.executable, WORKERS / "steady.py", folder], stdout=subprocess.PIPE, env=env)
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"started\n"
        return worker

    began = time.monotonic()
    assert start(tmp_path / "straight").wait() == 0
    whole = load_file(tmp_path / "straight" / "weights.safetensors")

    moments, kills, folder = random.Random(0), 0, 0
    while kills < 20:
        run = tmp_path / f"killed-{folder}"
        folder += 1
        while True:
            worker = start(run)
            try:
                worker.wait(timeout=moments.uniform(0.0, 1.2))
            except subprocess.TimeoutExpired:
                worker.send_signal(signal.SIGKILL)
                kills += 1
            if worker.wait() == 0:
                break
            assert worker.returncode == -signal.SIGKILL
        assert same(load_file(run / "weights.safetensors"), whole)
        assert rows(run) == rows(tmp_path / "straight")
    print(f"{kills} kills in {folder} runs, {time.monotonic() - began:.0f} s")
