"""The end of a run: its steps are each done once, whatever stops it; it is tried before the training; it is bounded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom import cli, ending
from stillroom import run as run_module
from stillroom.engine.progress import PATIENCE, Parts, showing
from stillroom.errors import UserError
from stillroom.evaluation import cost
from stillroom.recipe import Recipe
from stillroom.report.log import is_finished
from stillroom.run import run
from stillroom.task import Task, sheet
from stillroom.tasks.class_images.model import ImageGenerator
from tiny import FAST, make_data, make_teacher


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    make_data(tmp_path / "data")
    return tmp_path


def recipe(*changes: str, steps: int = 2) -> Recipe:
    settings = [*FAST, "options.gan_weight=0", *changes]
    return Recipe.load("dmd2", settings, teacher="teacher", data="data", **{"engine.steps": steps})


# --- steps ------------------------------------------------------------------------------------------------------------
def test_a_run_stopped_after_any_step_of_its_end_goes_on_with_the_next(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each of its steps in turn, with what it then writes cut off, a run ends as the straight one did."""
    changes = ("evaluate.n=4", "evaluate.samples=6")
    straight = run(recipe(*changes), place / "straight")
    drawn: list[str] = []
    monkeypatch.setattr(Task, "scores", lambda *_: drawn.append("scores") or {})
    rows = Task.rows
    monkeypatch.setattr(ending, "_sheet", _counted(ending._sheet, drawn))

    def stopped_after(step: str) -> Any:
        def once(self: ending.Ending, name: str, act: Any) -> Any:
            found = real(self, name, act)
            if name == step:
                raise KeyboardInterrupt
            return found

        real = ending.Ending.once
        return once

    steps = ["student", "sheet of teacher", "sheet of student", "cost of student", "cost of teacher", "facts", "scores"]
    for number, step in enumerate(steps):
        with monkeypatch.context() as patch:
            patch.setattr(ending.Ending, "once", stopped_after(step))
            with pytest.raises(KeyboardInterrupt):
                run(recipe(*changes), place / "cut", resume=number > 0)
        assert not is_finished(place / "cut")
    for name in ("model_card", "write_report"):  # each is looked up where it is defined
        module = "stillroom.report.card" if name == "model_card" else "stillroom.report"
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{name}", _stop)
            with pytest.raises(KeyboardInterrupt):
                run(recipe(*changes), place / "cut", resume=True)
        assert (place / "cut/result.json").is_file()
        assert not is_finished(place / "cut")
    assert run(recipe(*changes), place / "cut", resume=True).report == place / "cut/report.html"
    assert is_finished(place / "cut")
    assert drawn == ["teacher", "student", "scores"]
    assert rows is Task.rows
    weights = "student/transformer/diffusion_pytorch_model.safetensors"
    for file in (weights, "samples/student.png", "samples/teacher.png"):
        assert (place / "cut" / file).read_bytes() == (place / "straight" / file).read_bytes()
    assert straight.report is not None
    with pytest.raises(UserError, match="already finished"):
        run(recipe(*changes), place / "cut", resume=True)


def _counted(make: Any, seen: list[str]) -> Any:
    def counting(recipe: Recipe, run_dir: Path, task: Task, who: str, model: Any) -> Any:
        draw = make(recipe, run_dir, task, who, model)
        return lambda: seen.append(who) or draw()

    return counting


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_without_its_report_is_finished_by_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recipe(), place / "runs/a")
    (place / "runs/a/report.html").unlink()
    assert cli.main(["run", "--resume", "a"]) == 0
    assert (place / "runs/a/report.html").is_file()
    assert cli.main(["run", "--resume", "a"]) == 2
    assert "already finished" in capsys.readouterr().err


# --- bounds -----------------------------------------------------------------------------------------------------------
def test_no_samples_is_legal_and_draws_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageGenerator, "sample", _stop)
    run(recipe("evaluate.samples=0"), place / "run")
    assert not list((place / "run/samples").iterdir())
    assert is_finished(place / "run")


def test_a_sheet_has_at_most_so_many_pictures() -> None:
    assert sheet(10, 8, 80) == (10, 8)
    assert sheet(10, 8, 35) == (10, 3)
    assert sheet(10, 8, 7) == (7, 1)
    assert sheet(4, 4, 1) == (1, 1)
    assert all(rows * columns <= most for most in range(1, 90) for rows, columns in [sheet(10, 8, most)])


def test_a_teacher_at_real_size_is_left_out_unless_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending, "REAL_SIZE", 1.0)
    run(recipe("evaluate.n=4"), place / "bounded")
    assert "evaluate.teachers=always asks for it" in capsys.readouterr().err
    result = json.loads((place / "bounded/result.json").read_text())
    assert result["left_out"].keys() == {"teacher"}
    assert result["teacher"].keys() == {"nfe", "params"}
    assert "latency_ms" in result["student"]
    assert [path.name for path in (place / "bounded/samples").iterdir()] == ["student.png"]
    assert "evaluate.teachers" in (place / "bounded/report.html").read_text()
    run(recipe("evaluate.teachers=always"), place / "whole")
    assert len(list((place / "whole/samples").iterdir())) == 2
    assert recipe().hash() == recipe("evaluate.teachers=always", "evaluate.samples=3").hash()


def test_forward_flops_are_those_of_the_counter(place: Path) -> None:
    teacher = ImageGenerator.load(place / "teacher")
    null, x = {"label": torch.tensor([3])}, torch.zeros(1, *teacher.denoiser.shape)
    counted = 2 * cost.macs(lambda: teacher.denoiser(x, torch.full((1,), 0.5), null))
    assert cost.forward_flops(teacher.denoiser) == counted > 0
    assert teacher.flops >= counted * teacher.nfe  # small networks: an upper bound
    teacher.most_at_once = 10**12  # type: ignore[misc]
    teacher._evaluation = None
    assert teacher.flops == counted * teacher.nfe
    assert teacher.at_once == 10**12 // counted


def test_timing_ends_after_its_seconds() -> None:
    began = time.perf_counter()
    milliseconds, calls = cost.median_ms(lambda: time.sleep(0.02), seconds=0.1)
    assert milliseconds > 15
    assert 1 <= calls <= 5
    assert time.perf_counter() - began < 2
    assert cost.median_ms(lambda: time.sleep(0.02), seconds=0)[1] == 1


# --- told -------------------------------------------------------------------------------------------------------------
def test_what_takes_over_two_seconds_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def work(seconds: float) -> str:
        parts = Parts(20, 8)
        for _ in parts:
            clock[0] += seconds / 2
            parts.within(0.5)
            clock[0] += seconds / 2
        return capsys.readouterr().err

    with showing("drawing"):
        assert work(0.1) == ""
        lines = work(10 * PATIENCE).splitlines()
    assert lines[0] == "drawing 4/20  0:00:10 gone, 0:00:40 left"
    assert lines[-1].startswith("drawing 20/20")
    assert work(10 * PATIENCE) == ""  # nobody has asked to be told


# --- the trial --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["sample", "save", "load"])
def test_what_fails_at_the_end_fails_before_the_first_step(
    place: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 must have the same dtype\nmore")

    read = ImageGenerator.load
    failing = classmethod(lambda cls, folder: broken() if "trial" in str(folder) else read(folder))
    monkeypatch.setattr(ImageGenerator, verb, failing if verb == "load" else broken)
    arguments = ["run", "dmd2", "--teacher", "teacher", "--data", "data", "--name", "a", "--steps", "4", *FAST]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert "RuntimeError: mat1 and mat2 must have the same dtype" in said[-1]
    assert ("or switch off what fails (evaluate.samples=0)" in said[-1]) == (verb == "sample")  # FAST has evaluate.n=0
    assert not (place / "runs/a").exists()


@pytest.mark.parametrize("places", [ending.WIDE, 0])
def test_the_trial_draws_no_sheet_of_large_pictures(place: Path, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    real = ending.write_sheet
    monkeypatch.setattr(ending, "WIDE", places)

    def spy(folder: Path, *rest: Any) -> dict[str, Any]:
        drawn.append(folder.name)
        return real(folder, *rest)

    monkeypatch.setattr(ending, "write_sheet", spy)
    run(recipe(steps=1), place / "run")
    assert ("trial" in drawn) == (places > 0)


@pytest.mark.parametrize("large", [False, True])
def test_the_trial_leaves_nothing_and_changes_nothing(
    place: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "LARGE", 0 if large else ending.LARGE)
    run(recipe(steps=3), place / "tried")
    monkeypatch.setattr(run_module, "_can_be_tried", lambda trainer: False)
    run(recipe(steps=3), place / "untried")
    assert not (place / "tried/trial").exists()
    weights = "student/transformer/diffusion_pytorch_model.safetensors"
    assert (place / "tried" / weights).read_bytes() == (place / "untried" / weights).read_bytes()
    logs = [[json.loads(line) for line in (place / who / "metrics.jsonl").open()] for who in ("tried", "untried")]
    assert [{**row, "seconds": 0} for row in logs[0]] == [{**row, "seconds": 0} for row in logs[1]]
