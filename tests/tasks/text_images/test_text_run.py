"""A text-to-image run from its stores to its report, with models so small that it takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stillroom as sr
from stillroom import cli
from stillroom.data.scenes.captions import vocabulary
from stillroom.data.store import read_store
from stillroom.diffusion.sampling import ODESampler
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.synthesis import synthesize
from stillroom.tasks.text_images.model import TextImageGenerator
from tiny_text_images import pixart, sd3, tiny_codec, tiny_text

CAPTIONS = ["a red three", "two fours", "a seven", "a one above a two", "a blue six", "a nine"] * 2
SMALL = (
    "options.network={patch: 2, width: 16, heads: 2, encoder_blocks: 1, decoder_blocks: 1, cross_blocks: 1, "
    "aligner_blocks: 1, head_width: 16, head_blocks: 1}"
)
FAST = [
    SMALL, "options.pretrain_share=3", "options.dpo_share=1", "engine.batch=4", "engine.log_every=1",
    "engine.checkpoint_every=2", "evaluate.n=0", "options.steps=2",
    "options.head_steps=3",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two teachers of one space, and stores of their images: ``data`` and, inside it, ``pairs``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    space = TextImageSpace(tiny_text(length=16, words=vocabulary()), tiny_codec(), (8, 8))
    teachers = {"one": TextImageGenerator(sd3(), ODESampler("euler", 2, 2.0), space)}
    teachers["two"] = TextImageGenerator(pixart(), ODESampler("euler", 2), space)
    for name, teacher in teachers.items():
        teacher.save(tmp_path / name)
    for folder, seed in (("data", 0), ("data/pairs", 1)):
        synthesize(teachers, list(dict.fromkeys(CAPTIONS)), tmp_path / folder, seeds=(seed,), progress=False)
    return tmp_path


def distil(*more: str, name: str = "a", data: str = "./data") -> int:
    return cli.main(["run", "lightgen", "--teacher", "./one,./two", "--data", data, "--name", name, *FAST, *more])


def test_a_run_goes_through_its_stages_and_leaves_a_complete_folder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distil("--steps", "10", "options.synthesis.small=4") == 0
    folder = place / "runs/a"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["pretrain", "adapt", "dpo"]
    result = json.loads((folder / "result.json").read_text())
    assert result["teachers"] == ["one", "two"]
    assert result["one"]["nfe"] == 4
    assert "a red three" in result["rows"]
    assert {path.name for path in (folder / "samples").iterdir()} == {"one.png", "two.png", "student.png"}
    page = (folder / "report.html").read_text()
    assert "<th>one</th><th>two</th>" in page
    assert "A student of `./one` and `./two`" in (folder / "student/README.md").read_text()


def test_the_student_draws_captions_and_is_sampled_by_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--steps", "5", "options.dpo_share=0") == 0
    student = sr.load("runs/a")
    assert student.sample(["a red three", "two fours"], seed=1).shape == (2, 3, 8, 8)
    capsys.readouterr()
    assert cli.main(["sample", "a", "--captions", "a blue six", "--n", "3", "--out", "six.png"]) == 0
    assert capsys.readouterr().out == "six.png\n  a blue six\n"
    assert cli.main(["sample", "a", "--labels", "0"]) == 2
    assert "draws captions, not classes" in capsys.readouterr().err
    assert cli.main(["sample", "a", "--captions", "a blue sevn"]) == 2
    assert "'seven'" in capsys.readouterr().err


def test_a_run_makes_its_own_images_once(place: Path) -> None:
    more = ("--steps", "2", "options.dpo_share=0", "options.synthesis.images=6", "options.synthesis.seed=3")
    (place / "captions.txt").write_text("\n".join(CAPTIONS[:6]) + "\n")
    assert distil(*more, data="captions.txt") == 0
    (store,) = (place / "cache/synthetic").iterdir()
    made = read_store(store)
    assert sorted(made.captions) == sorted(CAPTIONS[:6])
    assert {record["teacher"] for record in made.records} == {"one", "two"}
    before = (store / "manifest.json").stat().st_mtime_ns
    assert distil(*more, name="again", data="captions.txt") == 0
    assert (store / "manifest.json").stat().st_mtime_ns == before


def test_a_run_that_is_cut_in_its_last_stage_ends_as_the_straight_one(place: Path) -> None:
    import shutil

    assert distil("--steps", "10", "options.dpo_share=4", name="straight") == 0
    shutil.copytree(place / "runs/straight", place / "runs/cut")
    for path in ("result.json", "report.html"):
        (place / "runs/cut" / path).unlink()
    for done in (place / "runs/cut/checkpoints").glob("*10"):
        shutil.rmtree(done)
    assert cli.main(["run", "--resume", "runs/cut"]) == 0
    weights = "student/network/diffusion_pytorch_model.safetensors"
    assert (place / "runs/cut" / weights).read_bytes() == (place / "runs/straight" / weights).read_bytes()


def test_a_run_goes_on_from_a_finished_student(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ("options.pretrain_share=1", "options.adapt_share=0", "options.dpo_share=0")
    still = ("--steps", "1", "engine.optim={masked: {lr: 0.0}}", *alone)
    assert distil("--steps", "3", *alone) == 0
    assert distil(*still, "student=runs/a/student", name="b") == 0
    first, second = (sr.load(f"runs/{name}").sample(CAPTIONS[:2], seed=4) for name in ("a", "b"))
    assert torch.equal(first, second)
    assert distil(*still, "student=runs/a/student", "options.network.width=32", name="c") == 2
    assert "has other sizes than options.network" in capsys.readouterr().err
    assert distil(*still, "student=runs/a/student", "options.network.prediction=eps", name="c") == 2
    assert "predicts v, that of options.network eps" in capsys.readouterr().err
    assert distil(*still, "student=scenes-sd3", name="c") == 2
    assert "has other sizes than options.network" in capsys.readouterr().err
    assert distil(*still, "student=scenes-sd", name="c") == 2
    assert "did you mean 'scenes-sd3'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--teacher", "./one,./one"), "names one twice"),
        (("--teacher", "./one,nowhere"), "no model 'nowhere'"),
        (("--data", "./one"), "no stored images"),
        (("--data", "./data/pairs"), "'pairs'"),
        (("options.synthesis.small=3",), "3"),
        (("options.network={width: 15}",), "15"),
        (("options.synthesis.filtres=[a]",), "did you mean 'options.synthesis.filters'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    capsys.readouterr()
    assert cli.main(["run", "lightgen", "--teacher", "./one,./two", "--data", "./data", *FAST, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert not (place / "runs").exists()


def test_teachers_of_different_spaces_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    other = TextImageSpace(tiny_text(length=16, words=vocabulary()), tiny_codec(), (8, 8))
    TextImageGenerator(pixart(), ODESampler("euler", 2), other).save(place / "two")
    assert distil("--steps", "2") == 2
    assert "has another text encoder or codec" in capsys.readouterr().err


def test_a_damaged_shard_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((place / "data").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-600] + b"x" * 600)
    assert distil("--steps", "2") == 2
    assert shard.name in capsys.readouterr().err
