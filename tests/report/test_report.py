"""The report and the doctor: what they read, what they say, and that the page stands alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finished import RESULT, SCORES, STEPS
from stillroom.cli import _show as show
from stillroom.errors import UserError
from stillroom.method import get_method
from stillroom.recipe import Recipe
from stillroom.report import write_report
from stillroom.report.card import model_card
from stillroom.report.doctor import examine
from stillroom.report.images import CELL, GAP, save_grid
from stillroom.report.log import read_metrics, series
from stillroom.report.plots import curve, smooth
from stillroom.report.rows import amount, duration, facts, in_one_line, milliseconds, number
from stillroom.run import run

Curve = Callable[[float], float]
HEALTHY: dict[str, Curve] = {
    "loss/generator/dm": lambda p: 0.1 + 0.01 * math.sin(90 * p),
    "loss/critic/denoise": lambda p: 0.2 + math.exp(-9 * p),
    "grad_norm/generator": lambda p: 0.5 + 0.1 * math.sin(70 * p),
    "health/fake_error": lambda p: 0.2 + math.exp(-9 * p),
    "health/sample_std": lambda p: 0.6 + 0.02 * math.sin(50 * p),
    "health/real_logit": lambda p: 1.0,
    "health/fake_logit": lambda p: -1.0,
}


def make_run(folder: Path, result: dict[str, Any] | None = RESULT, engine: dict | None = None, **curves: Curve) -> Path:
    folder.mkdir()
    settings = {"steps": STEPS, "batch": 64, "log_every": 20, "ema": []} | (engine or {})
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"method": "dmd2", "teacher": "t", "data": "d", "options": {}, "engine": settings})
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(20, STEPS + 1, 20):
            row = {key: function(step / STEPS) for key, function in (HEALTHY | curves).items()}
            file.write(json.dumps({"step": step, "images": 64 * step, "seconds": step / 20} | row) + "\n")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


# --- reading ----------------------------------------------------------------------------------------------------------
def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/a/b": 2}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x/a": 1}\n{"step": 2, "x/a": 2}\n{"step": 1, "x/a": 3}\n')
    assert series(read_metrics(tmp_path), "x/") == {"a": ([1, 2], [3, 2])}


# --- the doctor -------------------------------------------------------------------------------------------------------
def test_a_healthy_run_is_called_well(tmp_path: Path) -> None:
    findings = examine(make_run(tmp_path / "a"))
    assert [finding.level for finding in findings] == ["well"]


@pytest.mark.parametrize(
    ("curves", "level", "words"),
    [
        ({"health/fake_error": lambda p: 0.1 + p * p}, "wrong", "fake score falls behind"),
        ({"health/sample_std": lambda p: 0.6 * math.exp(-4 * p)}, "wrong", "collapse"),
        ({"health/sample_std": lambda p: 0.6 * math.exp(2 * p)}, "wrong", "explode"),
        ({"health/sample_std": lambda p: 0.6 + 0.4 * math.sin(60 * p)}, "doubtful", "swings"),
        ({"loss/critic/denoise": lambda p: 50.0 if p == 0.5 else 0.2}, "doubtful", "at step 1000 to 250 times"),
        ({"loss/generator/dm": lambda p: math.nan if p > 0.9 else 0.1}, "wrong", "not a number at step 1820"),
        ({"health/grad_ratio": lambda p: 1000.0}, "doubtful", "drowns"),
        ({"health/real_logit": lambda p: 10.0}, "doubtful", "discriminator always wins"),
        ({"health/winner_drift": lambda p: 0.1 * p}, "wrong", "preference learning damages"),
    ],
)
def test_a_sick_curve_is_found(tmp_path: Path, curves: dict[str, Curve], level: str, words: str) -> None:
    found = [f for f in examine(make_run(tmp_path / "a", **curves)) if words in f.what]
    assert [finding.level for finding in found] == [level]
    assert found[0].advice


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"ema": [{"name": "e", "decay": 0.9999}]}, "'e' lags"),
        ({"ema": [{"name": "e", "half_life": 100_000}]}, "'e' lags"),
        ({"warmup": 1500}, "warm-up"),
        ({"steps": 100}, "only 100 steps"),
    ],
)
def test_a_doubtful_setting_is_found(tmp_path: Path, engine: dict[str, Any], words: str) -> None:
    assert any(words in finding.what for finding in examine(make_run(tmp_path / "a", engine=engine)))


def test_bad_scores_are_found(tmp_path: Path) -> None:
    scores = RESULT["scores"] | {"student": SCORES | {"fd": 30.0, "coverage": 0.2}}
    said = " ".join(f.what for f in examine(make_run(tmp_path / "a", RESULT | {"scores": scores})))
    assert "far from its teacher" in said
    assert "leaves out part of the data" in said


def test_a_run_outside_the_band_of_its_proof_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "dmd2.json").write_text(json.dumps({"health": {"sample_std": [0.9, 1.0]}}))
    assert any("between 0.9 and 1" in finding.what for finding in examine(make_run(tmp_path / "a")))


def test_an_unfinished_run_is_said_to_be_so(tmp_path: Path) -> None:
    findings = examine(make_run(tmp_path / "a", None, {"steps": 5000}))
    assert any("step 2000 of 5000" in finding.what for finding in findings)


# --- the page ---------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def with_samples(folder: Path) -> Path:
    (folder / "samples").mkdir()
    for who in ("teacher", "student"):
        save_grid(torch.zeros(2, 3, 1, 8, 8), folder / "samples" / f"{who}.png")
    return folder


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(with_samples(make_run(tmp_path / "a")))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    text = (tmp_path / "a" / "report.html").read_text()
    assert not re.search(r"@import|url\(\s*['\"]?http", text)


def test_the_page_shows_scores_beside_the_floor_and_all_curves(tmp_path: Path) -> None:
    page = page_of(with_samples(make_run(tmp_path / "a")))
    for words in ("x@12345678, N=5000", "50×", "fake error", "critic · denoise", "test split", "bar"):
        assert words in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == len(HEALTHY)


TWO_TEACHERS = RESULT | {
    "teachers": ["one", "two"], "rows": ["a red three", "a two"],
    "metrics": [
        {"key": "sceneeval", "name": "SceneEval", "label": "SceneEval", "alarm": 0.6,
         "says": "the student often misses the caption"},
        *RESULT["metrics"],  # type: ignore[misc]
    ],
    "one": {"nfe": 19, "latency_ms": {"1": 90.0}}, "two": {"nfe": 40, "latency_ms": {"1": 150.0}},
    "scores": {
        "student": {"sceneeval": 0.8, "fd": 2.0}, "one": {"sceneeval": 0.91, "fd": 1.5},
        "two": {"sceneeval": 0.87, "fd": 1.8}, "floor": {"sceneeval": 0.99, "fd": 0.1},
    },
}  # fmt: skip


def test_several_teachers_stand_side_by_side(tmp_path: Path) -> None:
    page = page_of(with_samples(make_run(tmp_path / "a", TWO_TEACHERS)))
    heads = [words for words in ("one", "two", "floor") if words in page.text]
    assert heads == ["one", "two", "floor"]
    for words in ("SceneEval", "0.91", "0.87", "30×", "faster than one", "a red three"):
        assert words in page.text, words


# --- the first line ---------------------------------------------------------------------------------------------------
def line_of(params: float, ms: float, fd: float | None) -> str:
    """Of a student so much larger, slower and farther off than its teacher."""
    teacher = {"params": 1000, "latency_ms": {"1": 10.0, "32": 100.0}}
    student = {"params": round(1000 * params), "latency_ms": {"1": 10 * ms, "32": 100.0}}
    scores = {"student": {"fd": None if fd is None else 2 * fd}, "teacher": {"fd": 2.0}}
    return in_one_line(RESULT | {"teacher": teacher, "student": student, "scores": scores})


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        (
            (0.5, 0.25, 1.03),
            "is smaller (0.5 times the parameters), faster at batch 1 (4 times the speed) and as good "
            "(Fréchet distance 2.06 against 2); it is not faster at batch 32 (1 times the speed).",
        ),
        (
            (2.07, 1.3, 1.5),
            "is not smaller (2.07 times the parameters), not faster at batch 1 (0.769 times the speed), not faster at "
            "batch 32 (1 times the speed) and not as good (Fréchet distance 3 against 2).",
        ),
        (
            (1.0, 0.97, 0.5),
            "is better (Fréchet distance 1 against 2); it is not smaller (as many parameters), not faster at batch 1 "
            "(1.03 times the speed) and not faster at batch 32 (1 times the speed).",
        ),
        (
            (1.0, 0.05, None),
            "is faster at batch 1 (20 times the speed); it is not smaller (as many parameters), not faster at batch 32 "
            "(1 times the speed) and not as good (Fréchet distance – against 2).",
        ),
    ],
)
def test_the_first_line_says_what_is_so_and_what_is_not(measured: tuple[float, float, float | None], line: str) -> None:
    assert line_of(*measured) == f"Beside its teacher the student {line}"


def test_the_first_line_measures_by_the_best_of_several_teachers() -> None:
    assert in_one_line(TWO_TEACHERS) == (
        "Beside one, the better of its teachers, the student is faster at batch 1 (30 times the speed); it is not as "
        "good (SceneEval 0.8 against 0.91) and not as good (Fréchet distance 2 against 1.5)."
    )
    unscored = {key: value for key, value in TWO_TEACHERS.items() if key != "scores"}
    assert in_one_line(unscored) == (
        "Beside one, the first of its teachers, the student is faster at batch 1 (30 times the speed)."
    )


def test_without_measurements_there_is_no_first_line(tmp_path: Path) -> None:
    bare = {key: value for key, value in RESULT.items() if key not in ("student", "scores")}
    assert in_one_line(bare) == ""
    assert "Beside" not in page_of(make_run(tmp_path / "a", bare)).text


def test_report_card_and_terminal_begin_with_the_same_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, line = make_run(tmp_path / "a"), in_one_line(RESULT)
    (head,) = re.findall(r"<header>(.*?)</header>", write_report(folder).read_text(), re.DOTALL)
    assert [words for words in map(str.strip, Page(head).text.splitlines()) if words][2] == line
    card = model_card(Recipe.load("dmd2"), RESULT, get_method("dmd2").paper)
    assert card.split("\n# a\n\n")[1].splitlines()[0] == line
    show(folder)
    assert " ".join(capsys.readouterr().out.split()).startswith(line)


def test_a_student_that_misses_its_captions_is_found(tmp_path: Path) -> None:
    scores = TWO_TEACHERS["scores"] | {"student": {"sceneeval": 0.3, "fd": 2.0}}
    said = " ".join(f.what for f in examine(make_run(tmp_path / "a", TWO_TEACHERS | {"scores": scores})))
    assert "often misses the caption: SceneEval 0.3, its teacher 0.91" in said


def test_a_name_cannot_inject_markup(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", RESULT | {"name": "<script>alert(1)</script>"}))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("what", ["unfinished", "no log"])
def test_a_run_without_everything_still_has_a_report(tmp_path: Path, what: str) -> None:
    folder = make_run(tmp_path / "a", None)
    if what == "no log":
        (folder / "metrics.jsonl").unlink()
    assert "not finished" in page_of(folder).text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_curves_take_their_colours_from_the_page() -> None:
    svg = curve(list(range(100)), [math.sin(i) for i in range(100)], (0.0, 0.5))
    assert "var(--accent)" in svg
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", svg)


def test_a_curve_survives_gaps_and_constants() -> None:
    for values in ([1.0, math.nan, 2.0, math.inf], [0.0] * 50, [1e-9, 1.0, 1e9]):
        assert curve(list(range(len(values))), values).startswith("<svg")


def test_smoothing_keeps_constants_and_does_not_lag() -> None:
    assert smooth([3.0] * 20, 0.9) == pytest.approx([3.0] * 20)
    line = [float(i) for i in range(101)]
    assert smooth(line, 0.8)[50] == pytest.approx(50.0, abs=1e-6)
    assert smooth([1.0, math.nan, 1.0], 0.5) == pytest.approx([1.0] * 3)


def test_a_grid_has_a_cell_for_every_image(tmp_path: Path) -> None:
    from PIL import Image

    images = torch.full((2, 3, 3, 28, 28), -1.0)
    images[1, 2, 0] = 1.0
    save_grid(images, tmp_path / "grid.png")
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (3 * (CELL + GAP) - GAP, 2 * (CELL + GAP) - GAP)
    assert sheet.getpixel((2 * (CELL + GAP) + 5, CELL + GAP + 5)) == (255, 0, 0, 255)
    assert sheet.getpixel((5, 5)) == (0, 0, 0, 255)
    assert sheet.getpixel((CELL + 1, 5))[3] == 0


def test_comparison_facts_hold_quality_speed_and_cost(tmp_path: Path) -> None:
    rows = facts(make_run(tmp_path / "a"))["rows"]
    assert rows["quality", "FD-x@12345678, N=5000 ↓"] == "3  (teacher 2, floor 0.5)"
    assert rows["speed", "Latency, batch 1 (median)"] == "3 ms  (teacher 150 ms)"
    assert rows["training", "Training time"] == "1 min 40 s"


def test_an_unfinished_run_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume"):
        facts(make_run(tmp_path / "a", None))


def test_numbers_read_well() -> None:
    assert [number(x) for x in (None, 1234, 1234.5, 0.00123456, 12.345)] == ["–", "1,234", "1,234", "0.00123", "12.3"]
    assert [amount(x) for x in (None, 12, 1_234_567, 2.5e9)] == ["–", "12", "1.23 M", "2.5 G"]
    assert [milliseconds(x) for x in (3.214, 2345.0)] == ["3.21 ms", "2.35 s"]
    assert [duration(x) for x in (59.4, 281.2, 3660)] == ["59 s", "4 min 41 s", "1 h 01 min"]


def test_a_run_without_steps_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").symlink_to("/usr/bin/env")  # as in a virtual environment: no student is named, nor looked at
    recipe = Recipe.load("dmd2", ["engine.steps=0", "evaluate.n=0"])
    result = run(recipe, tmp_path / "run")
    assert result.cost == {"step": 0, "images": 0, "seconds": 0.0}
    assert [finding.level for finding in examine(tmp_path / "run")] == ["well"]
    assert "No step was trained" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_stopped_between_its_samples_and_its_result_has_a_report(tmp_path: Path) -> None:
    page_of(with_samples(make_run(tmp_path / "a", None)))
    text = (tmp_path / "a" / "report.html").read_text()
    assert 'alt="Samples of the student, one class per row"' in text
    assert "not finished" in text
