"""Methods of denoisers on captions: from a store and a small teacher to samples and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import stillroom as sr
from stillroom import cli
from stillroom.data.scenes.captions import vocabulary
from stillroom.diffusion.sampling import ODESampler
from stillroom.errors import UserError
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.recipe import Recipe
from stillroom.synthesis import synthesize
from stillroom.task import make_task
from stillroom.tasks.text_images.model import TextImageGenerator
from tiny_text_images import pixart, sd3, tiny_codec, tiny_text

CAPTIONS = ["a red three", "two fours", "a seven", "a one above a two", "a blue six", "a nine"]
FAST = ["engine.batch=4", "engine.log_every=1", "engine.checkpoint_every=2", "evaluate.n=0", "evaluate.samples=6"]
OWN: dict[str, list[str]] = {
    "flash-dmd": [
        "options.student_steps=2", "engine.steps=8", "engine.warmup=0", "options.rl_share=0.5", "options.rl_turns=2",
        "options.reward_steps=2", "options.split=0.6",
    ],
    "decoupled-dmd": ["options.student_steps=2", "engine.steps=5", "engine.warmup=0"],
    "agd-scenes": ["options.paths=4", "options.path_steps=3", "options.steps=2", "options.width=8", "engine.steps=3"],
    "hyper-sd-scenes": [
        "options.segments=[2, 1]", "options.mse=[1, 1]", "options.adversarial=[0, 1]", "options.grids=[8, 4]",
        "options.reward_steps=2", "engine.steps=6", "engine.warmup=0", "options.feedback_share=0.5",
        "lora.student.targets=[to_q, to_k, to_v]", "options.feedback_targets=[to_q]",
    ],
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher, and a store of its pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    space = TextImageSpace(tiny_text(length=16, words=vocabulary()), tiny_codec(), (8, 8))
    teacher = TextImageGenerator(sd3(), ODESampler("euler", 2, 2.0), space)
    teacher.save(tmp_path / "one")
    synthesize({"one": teacher}, CAPTIONS, tmp_path / "data", seeds=(0,), progress=False)
    return tmp_path


@pytest.mark.parametrize("name", OWN)
def test_a_run_on_captions_goes_to_its_end(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", name, "--teacher", "./one", "--data", "./data", "--name", "a", *FAST, *OWN[name]]) == 0
    folder = place / "runs/a"
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "result.json").read_text())["task"] in ("text-images", "text-denoisers")
    student: Any = sr.load(folder / "student")
    images = student.sample(["a red three", "two fours"], seed=1)
    assert images.shape == (2, 3, 8, 8)
    assert bool(torch.isfinite(images).all())
    assert cli.main(["sample", str(folder), "--captions", "a red three", "--out", str(place / "p.png")]) == 0
    assert (place / "p.png").is_file()
    plain = sr.load(place / "one").sample(["a red three", "two fours"], seed=1)
    assert not torch.allclose(images, plain, atol=1e-4)


def test_the_task_follows_the_teacher(place: Path) -> None:
    assert make_task("class-images", "./one").name == "text-denoisers"
    assert make_task("class-images", "scenes-sd3").name == "text-denoisers"
    for other in ("fashion", "", "lightgen", "nowhere", "scenes-sd3,scenes-pixart"):
        assert make_task("class-images", other).name == "class-images", other
    with pytest.raises(UserError, match="no stored images"):
        make_task("class-images", "./one").load(Recipe.load("agd-scenes", teacher="./one", data="./one"))


# --- negative texts ---------------------------------------------------------------------------------------------------
SNOOPI = ["options.targets=[to_q, to_k, to_v]", "engine.steps=3", "options.negatives=[red, words.txt]"]


def test_a_student_that_heeds_negative_texts_is_trained_resumed_and_asked(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = TextImageSpace(tiny_text(length=16, words=vocabulary()), tiny_codec(), (8, 8))
    torch.manual_seed(1)
    TextImageGenerator(pixart(), ODESampler("euler", 2, 2.0), space).save(place / "crossed")
    (place / "words.txt").write_text("blue\na green four\n")
    named = ["run", "snoopi", "--teacher", "./crossed", "--data", "./data", *FAST, *SNOOPI]
    assert cli.main([*named, "--name", "a"]) == 0
    folder = place / "runs/a"
    assert (folder / "report.html").is_file()
    assert not (folder / "student/attached").exists()
    student: Any = sr.load(folder)
    assert student.sampler.negative_scale == 0.5
    asked = ["a red three", "two fours"]
    plain = student.sample(asked, seed=1)
    away = student.away("red").sample(asked, seed=1)
    assert not torch.equal(plain, away)
    assert torch.equal(student.away("red", 0.0).sample(asked, seed=1), plain)
    assert torch.equal(student.sample(asked, seed=1), plain)
    draw = ["sample", str(folder), "--captions", "a three", "--n", "2", "--out", "p.png"]
    assert cli.main([*draw, "--negative", "red"]) == 0
    one = (place / "p.png").read_bytes()
    assert cli.main([*draw, "--negative", "red", "--negative-scale", "0.5"]) == 0
    assert (place / "p.png").read_bytes() == one
    assert cli.main([*draw, "--negative", "red", "--negative-scale", "0"]) == 0
    assert (place / "p.png").read_bytes() != one
    assert cli.main(["plan", "snoopi", "--teacher", "./crossed", "--data", "./data", *FAST, *SNOOPI]) == 0


def test_what_cannot_be_steered_away_says_why_in_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert cli.main(["sample", *words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()][:1]
        return line

    assert "SD3Transformer2DModel attends to image and text jointly" in said("one", "--negative", "red")
    assert "draws classes" in said("fashion", "--negative", "red")
    assert "MAR cannot be steered" in said("lightgen", "--negative", "red")
    assert "no text to steer away from" in said("one", "--negative-scale", "0.5")
    assert "at least 0, got -1" in said("scenes-pixart", "--negative", "red", "--negative-scale", "-1")
    assert "'spoon'" in said("scenes-pixart", "--negative", "spoon")
    assert "the negative text is empty; say what must not be shown" in said("scenes-pixart", "--negative", " ")
