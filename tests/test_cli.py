"""The command line, from arguments to files and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import stillroom as sr
from stillroom import cli
from stillroom import run as run_module
from stillroom.task import sample_rows
from tiny import CLASSES, FAST, SIZE, make_data, make_teacher


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    make_teacher(tmp_path / "teacher")
    make_data(tmp_path / "data")
    return tmp_path


def distil(*more: str, name: str = "a", method: str = "dmd2") -> int:
    return cli.main(["run", method, "--teacher", "teacher", "--data", "data", "--name", name, *FAST, *more])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_leaves_a_complete_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--steps", "6") == 0
    folder = place / "runs" / "a"
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "student", "samples", "result.json", "report.html"} <= names
    assert not [path for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]
    recipe, result = (
        yaml.safe_load((folder / "recipe.yaml").read_text()),
        json.loads((folder / "result.json").read_text()),
    )
    assert recipe["engine"]["steps"] == result["cost"]["step"] == 6
    assert result["student"]["nfe"] == 1
    card = (folder / "student" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers")
    assert result["recipe_hash"] in card
    assert "runs/a/report.html" in capsys.readouterr().out


def test_the_student_loads_in_stillroom_and_in_diffusers(place: Path) -> None:
    from diffusers import DiTTransformer2DModel

    assert distil("--steps", "3") == 0
    student = sr.load("runs/a")
    images = student.sample([0, 1, 2], seed=1)
    assert images.shape == (3, 1, SIZE, SIZE)
    assert student.classes == list(CLASSES)
    theirs = DiTTransformer2DModel.from_pretrained("runs/a/student", subfolder="transformer")
    mine = student.denoiser.network.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in theirs.state_dict().items())


def test_the_same_recipe_gives_the_same_student(place: Path) -> None:
    assert distil("--steps", "4", name="a") == 0
    assert cli.main(["run", "runs/a/recipe.yaml", "--name", "b"]) == 0
    assert sr.load("runs/a").sample([0, 1], seed=3).equal(sr.load("runs/b").sample([0, 1], seed=3))
    result = [json.loads((place / "runs" / name / "result.json").read_text()) for name in "ab"]
    assert result[0]["recipe_hash"] == result[1]["recipe_hash"]


def test_the_library_does_what_the_command_does(place: Path) -> None:
    assert distil("--steps", "4", "options.gan_weight=0") == 0
    recipe = yaml.safe_load((place / "runs/a/recipe.yaml").read_text())
    options = {key: value for key, value in recipe["options"].items() if key != "gan_weight"}
    (place / "mine.yaml").write_text(yaml.safe_dump(recipe | {"name": "mine", "options": options}))
    student = sr.distill("mine.yaml", teacher="teacher", data="data", steps=4, gan_weight=0)
    assert student.sample([2], seed=0).equal(sr.load("runs/a").sample([2], seed=0))
    assert (place / "runs/mine/report.html").is_file()


def test_a_run_interrupted_before_its_scores_is_finished_by_resume(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "finish", interrupt)
        assert distil("--steps", "4") == 130
    assert not (place / "runs/a/result.json").exists()
    assert distil("--steps", "4") == 2
    assert "--resume runs/a" in capsys.readouterr().err
    assert cli.main(["run", "--resume", "a"]) == 0
    assert distil("--steps", "4", name="b") == 0
    assert sr.load("runs/a").sample([0], seed=0).equal(sr.load("runs/b").sample([0], seed=0))


def test_the_default_run_may_be_typed_again_and_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import stillroom.recipe as recipes

    monkeypatch.setattr(recipes, "DEFAULT", str(place / "default.yaml"))
    assert distil("--steps", "4", name="d") == 0
    (place / "runs/d/recipe.yaml").rename(place / "default.yaml")
    shutil.rmtree(place / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "finish", interrupt)
        assert cli.main(["run"]) == 130
    assert cli.main(["run"]) == 0
    student = (place / "runs/d/student/transformer/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(["run"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert (place / "runs/d/student/transformer/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == student


def test_divergence_is_one_line_and_exit_code_1(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--steps", "4", "engine.loss_limit=1e-12") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stillroom:")]
    assert len(error) == 1
    assert "diverged" in error[0]


def test_overrides_may_stand_anywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stillroom.recipe as recipes

    monkeypatch.setattr(recipes, "DEFAULT", "dmd2")
    arguments = [
        "run",
        "options.gan_weight=0",
        "--teacher",
        "teacher",
        *FAST,
        "--data",
        "data",
        "--steps",
        "2",
        "name=x",
    ]
    assert cli.main(arguments) == 0
    recipe = yaml.safe_load((place / "runs/x/recipe.yaml").read_text())
    assert (recipe["method"], recipe["options"]["gan_weight"], recipe["engine"]["steps"]) == ("dmd2", 0, 2)


def test_sample_draws_the_labels_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    assert cli.main(["sample", "teacher", "--labels", "dot", "0", "--n", "5", "--out", "five.png"]) == 0
    assert capsys.readouterr().out == "five.png\n"
    width, height = Image.open("five.png").size
    assert width / height == pytest.approx(5 / 2, rel=0.05)
    found = sample_rows(sr.load("teacher"), ("dot", "0"), (), 5, seed=0)
    names, images = found.names, found.images
    assert images is not None
    assert (names, tuple(images.shape)) == (["dot", "bar"], (2, 5, 1, SIZE, SIZE))


def test_compare_puts_runs_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--steps", "2", name="short") == 0
    assert distil("--steps", "5", name="long") == 0
    capsys.readouterr()
    assert cli.main(["compare", "short", "runs/long"]) == 0
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if "short" in line)
    steps = next(line for line in out.splitlines() if "Steps" in line)
    assert head.index("short") < head.index("long")
    assert steps.index(" 2 ") < steps.index(" 5 ")


def test_report_is_written_anew(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--steps", "2") == 0
    (place / "runs/a/report.html").unlink()
    assert cli.main(["report", "a"]) == 0
    assert (place / "runs/a/report.html").stat().st_size > 5000


def test_doctor_says_what_is_wrong_and_exits_1(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--steps", "2", "engine.ema=[{name: ema, decay: 0.99999}]") == 0
    assert cli.main(["doctor", "a"]) == 1
    out = capsys.readouterr().out
    assert "the average 'ema' lags" in out
    assert "try:" in out


def test_methods_lists_all_and_explains_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    catalogue = yaml.safe_load((Path(cli.__file__).parent / "catalogue.yaml").read_text(encoding="utf-8"))
    assert all(entry["slug"] in out for entry in catalogue)
    assert cli.main(["methods", "dmd2"]) == 0
    out = capsys.readouterr().out
    assert all(f"options.{name}" in out for name in sr.methods()["dmd2"].Options.__dataclass_fields__)


def test_every_command_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command.__name__.lower(), "--help"])
        assert stop.value.code == 0
        assert (command.__doc__ or "")[:20] in capsys.readouterr().out


def test_a_run_is_resumed_planned_and_repeated_from_any_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "finish", interrupt)
        assert distil("--steps", "3") == 130
    assert yaml.safe_load((place / "runs/a/recipe.yaml").read_text())["folder"] == str(place)
    (place / "elsewhere").mkdir()
    make_data(place / "elsewhere" / "other", classes=5)
    monkeypatch.chdir(place / "elsewhere")
    assert cli.main(["run", "--resume", str(place / "runs/a")]) == 0
    assert Path.cwd() == place / "elsewhere"
    assert (place / "runs/a/student").is_dir()
    recipe = str(place / "runs/a/recipe.yaml")
    assert cli.main(["run", recipe, "--name", "b"]) == 0
    again = sr.load("runs/b")
    assert again.sample([0, 1], seed=3).equal(sr.load(place / "runs/a").sample([0, 1], seed=3))
    assert cli.main(["run", recipe, "--name", "c", "--data", "other"]) == 2
    assert "none of the classes of teacher" in capsys.readouterr().err  # what is named now is named from here
