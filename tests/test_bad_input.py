"""Bad input: one line that names the place and the cure, exit code 2, and not one new or changed file."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from stillroom import cli
from stillroom.errors import UserError
from stillroom.tasks.class_images.model import ImageGenerator
from tiny import FAST, SIZE, make_data, make_teacher

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    make_teacher(folder / "teacher")
    make_teacher(folder / "rgb-teacher", in_channels=3, out_channels=3)
    make_teacher(folder / "wide-teacher", sample_size=16)
    make_data(folder / "data")
    make_data(folder / "rgb-data", channels=3)
    make_data(folder / "wide-data", size=12)
    make_data(folder / "five-classes", classes=5)
    make_data(folder / "two-classes", classes=2)
    for name in map(str, range(4)):
        (folder / "four-numbers" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(folder / "four-numbers" / name / f"{i}.png")
    (folder / "empty").mkdir()
    for name in ("first", "second"):
        (folder / "mixed-sizes" / name).mkdir(parents=True)
    for i, size in enumerate((SIZE, SIZE, SIZE + 1)):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(folder / "mixed-sizes" / "first" / f"{i}.png")
    shutil.copytree(folder / "mixed-sizes", folder / "broken-image")
    (folder / "broken-image" / "first" / "2.png").write_bytes(b"\x89PNG not a picture")
    shutil.copytree(folder / "mixed-sizes", folder / "empty-class")
    (folder / "empty-class" / "first" / "2.png").unlink()
    shutil.copytree(folder / "data", folder / "truncated-data")
    damage(folder / "truncated-data" / "train.npz")
    return folder


@pytest.fixture
def place(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(store, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()} | {
        str(p): (0, 0) for p in folder.rglob("*") if p.is_dir()
    }


def refused(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; its one line."""
    capsys.readouterr()
    before = contents(place)
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    assert code == 2, captured
    assert contents(place) == before
    lines = captured.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("stillroom: ")
    assert "Traceback" not in lines[0]
    assert captured.out == ""
    return lines[0]


def run_arguments(*more: str, teacher: str = "teacher", data: str = "data", method: str = "dmd2") -> list[str]:
    return ["run", method, "--teacher", teacher, "--data", data, "--name", "a", "--steps", "2", *FAST, *more]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distil"], "unknown command 'distil'"),
        (["rum", "dmd2"], "did you mean 'run'"),
        (["run", "dmd3"], "did you mean 'dmd2'"),
        (["run", "dmd2", "--stpes", "3"], "did you mean '--steps'"),
        (["run", "dmd2", "--steps", "many"], "--steps: 'many'"),
        (["run", "dmd2", "extra"], "key=value"),
        (["run", "missing.yaml"], "missing.yaml does not exist"),
        (["run", "data/train.npz.yaml"], "does not exist"),
        (["run", "--resume", "nothing"], "there are no runs under runs/"),
        (["run", "dmd2", "--resume", "data"], "keeps its own recipe"),
        (["run", "dmd2", "--teacher", ""], "--teacher is empty"),
        (["plan", "dmd2", "--data", ""], "--data is empty"),
        (["run", "lightgen", "--student", "lightgem"], "(did you mean 'lightgen'?); give the folder of a run or of a"),
        (["run", "--resume", "data"], "no run folder"),
        (["prove"], "no method"),
        (["prove", "dmd3"], "did you mean 'dmd2'"),
        (["prove", "dmd2", "--jobs", "0"], "--jobs"),
        (["prove", "dmd2", "--seeds", "-1"], "--seeds"),
        (["prove", "dmd2", "--level", "pixel"], "--level"),
        (["compare"], "no runs"),
        (["compare", "nothing"], "run folder nothing does not exist"),
        (["compare", "data"], "no run folder"),
        (["export", "nothing", "--to", "foo"], "--to: 'foo' is none of 'onnx', 'openvino', 'torch'"),
        (["report", "nothing"], "run folder nothing does not exist"),
        (["report", "data"], "no run folder"),
        (["doctor", "data"], "no run folder"),
        (["methods", "dmd3"], "did you mean 'dmd2'"),
        (["teach", "fashon"], "did you mean 'fashion'"),
        (["bench", "fashon"], "did you mean 'fashion'"),
        (["sample", "teacher", "--labels", "crss"], "did you mean 'cross'"),
        (["sample", "teacher", "--labels", "3"], "no class '3'"),
        (["sample", "teacher", "--n", "0"], "--n must be at least 1"),
        (["sample", "teacher", "--seed", "-1"], "--seed"),
        (["sample", "teacher", "--out", "x.jpeg"], ".png"),
        (["sample", "teacher", "--out", "no/where.png"], "folder no does not exist"),
        (["sample", "nothing"], "no model 'nothing'"),
        (["sample", "data"], "no model"),
    ],
)
def test_a_wrong_command_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in refused(place, capsys, *arguments)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["engine.stepps=3"], "did you mean 'engine.steps'"),
        (["options.gan_wieght=3"], "did you mean 'options.gan_weight'"),
        (["options.renoise=new"], "one of fresh, fixed, ddim"),
        (["engine.steps=-1"], "engine.steps"),
        (["--steps", "-3"], "engine.steps"),
        (["engine.batch=0"], "engine.batch"),
        (["engine.batch=5", "engine.accumulate=2"], "engine.accumulate"),
        (["engine.optim.critic.name=adamm"], "adam"),
        (["engine.device=tpu"], "engine.device"),
        (["options.critic_turns=0"], "critic_turns"),
        (["options.student_steps=0"], "student_steps"),
        (["options.gan_block=transformer_blocks.99"], "transformer_blocks.99"),
        (["lora.fake.targets=[to_x]"], "to_x"),
        (["lora.fake.rang=8"], "rang"),
        (["lora.fke.rank=8"], "fke"),
    ],
)
def test_a_wrong_setting_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert words in refused(place, capsys, *run_arguments(*more))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nowhere", "no data at 'nowhere'"),
        ("fashon", "did you mean 'fashion'"),
        ("empty", "holds no images (PNG"),
        ("empty-class", "'second' holds no"),
        ("mixed-sizes", "second"),
        ("broken-image", "2.png"),
        ("truncated-data", "train.npz"),
        ("rgb-data", "3 channels"),
        ("wide-data", "12x12"),
        (
            "five-classes",
            "class 'class3' of the data is none of the classes of teacher 'teacher' (did you mean 'cross'?)",
        ),
        ("two-classes", "knows 3 classes, but data 'two-classes' has 2; give pictures of 'dot' as well"),
        ("four-numbers", "knows 3 classes, but data 'four-numbers' has 4; give pictures of each of its classes"),
    ],
)
def test_data_that_cannot_be_used_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], data: str, words: str
) -> None:
    if data in ("mixed-sizes", "broken-image"):
        shutil.copy(place / data / "first" / "0.png", place / data / "second" / "0.png")
        words = "2.png"
    assert words in refused(place, capsys, *run_arguments(data=data))


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("nowhere", "no model 'nowhere'"),
        ("fashon", "did you mean 'fashion'"),
        ("./nowhere", "nowhere does not exist; check the path"),
        ("empty", "no model"),
        ("data", "no model"),
        ("rgb-teacher", "3 channels"),
        ("wide-teacher", "16x16"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], teacher: str, words: str
) -> None:
    assert words in refused(place, capsys, *run_arguments(teacher=teacher))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (lambda t: damage(t / WEIGHTS), "cannot be read"),
    "weights gone": (lambda t: (t / WEIGHTS).unlink(), "are missing"),
    "weights of another network": (lambda t: edit(t / "transformer/config.json", num_layers=3), "do not fit"),
    "config cut short": (lambda t: damage(t / "transformer/config.json"), "config.json is not valid JSON"),
    "config gone": (lambda t: (t / "transformer/config.json").unlink(), "config.json is missing"),
    "unknown class": (lambda t: edit(t / "transformer/config.json", _class_name="Dit"), "'Dit'"),
    "scheduler gone": (lambda t: (t / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json is missing"),
    "unknown prediction kind": (
        lambda t: (
            (t / "stillroom.json").unlink(),
            edit(t / "scheduler/scheduler_config.json", _class_name="DDIMScheduler", prediction_type="score"),
        ),
        "'score'",
    ),
    "side file cut short": (lambda t: damage(t / "stillroom.json"), "stillroom.json is not valid JSON"),
    "latent space": (lambda t: (t / "vae").mkdir(), "latents"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_teacher_is_refused(place: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    harm, words = DAMAGES[what]
    harm(place / "teacher")
    assert words in refused(place, capsys, *run_arguments())


# --- the run folder ---------------------------------------------------------------------------------------------------
def test_a_finished_run_is_not_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(run_arguments()) == 0
    assert "already finished" in refused(place, capsys, *run_arguments())
    assert "already finished" in refused(place, capsys, "run", "--resume", "a")


def test_a_run_in_use_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs/a").mkdir(parents=True)
    (place / "runs/a/recipe.yaml").write_text("method: dmd2\n")
    with (place / "runs/a/.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "in use" in refused(place, capsys, *run_arguments())
        assert "in use" in refused(place, capsys, "run", "--resume", "a")


def test_a_folder_that_is_no_run_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs/a").mkdir(parents=True)
    (place / "runs/a/diary.txt").write_text("dear diary")
    assert "not empty" in refused(place, capsys, *run_arguments())


def test_a_file_in_the_place_of_the_run_folder_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs").mkdir()
    (place / "runs/a").write_text("")
    assert "is a file" in refused(place, capsys, *run_arguments())


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert cli.main(run_arguments()) == 0
    for name in ("result.json", "report.html"):
        (place / "runs/a" / name).unlink()
    for path in (place / "runs/a/checkpoints").glob("*/weights.safetensors"):
        damage(path)
    assert "damaged" in refused(place, capsys, "run", "--resume", "a")


def test_a_damaged_result_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(run_arguments()) == 0
    damage(place / "runs/a/result.json")
    for command in ("report", "doctor", "compare"):
        assert "result.json is damaged" in refused(place, capsys, command, "a")


# --- the disk ---------------------------------------------------------------------------------------------------------
def test_a_disk_too_full_for_the_checkpoints_is_noticed_at_once(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    assert "disk full" in refused(place, capsys, *run_arguments())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "teacher", "--out", "folder.png"], "--out: folder.png cannot be written"),
        (["sample", "teacher", "--out", "file/x.png"], "--out: folder file does not exist"),
        (["export", "teacher", "--out", "file/x"], "cannot write to file"),
        (["teach", "ring", "engine.steps=1", "--out", "file/x"], "cannot write"),
        (["synthesize", "--teachers", "scenes-sd3", "--captions", "scenes:1", "--out", "file/x"], "file"),
        (["prove", "dmd2"], "cannot write"),
        (["run", "dmd2"], "cannot write"),
    ],
)
def test_a_file_in_a_folders_place_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (place / "folder.png").mkdir()
    for name in ("file", "runs", "results"):
        (place / name).write_text("")
    if arguments[0] == "run":
        arguments = run_arguments()
    assert words in refused(place, capsys, *arguments)


def test_a_disk_that_is_read_only_in_the_midst_of_a_command_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "somewhere/report.html")

    monkeypatch.setattr(cli, "_run_folder", refuse)
    assert "cannot write somewhere/report.html: Read-only file system" in refused(place, capsys, "report", "data")


def test_a_cache_that_cannot_be_written_costs_time_or_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stillroom.cache import kept_json
    from stillroom.tasks.pipelines.data import encode_prompts

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "file" / "cache"))
    assert kept_json("numbers/one", lambda: 1) == 1
    with pytest.raises(UserError, match=r"cannot write .*file/cache"):
        encode_prompts(cast(Any, None), cast(Any, None), tmp_path / "file" / "cache")


def test_a_disk_that_fills_up_leaves_a_run_to_resume(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ImageGenerator, "save", full)
        assert cli.main(run_arguments()) == 2
    assert "no space left" in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "runs/a/student").exists()
    assert cli.main(["run", "--resume", "a"]) == 0
    assert (place / "runs/a/student").is_dir()
