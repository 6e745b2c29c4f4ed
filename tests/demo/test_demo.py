"""The demo: what its buttons do, without a page; then the page itself, in a headless browser, as a visitor uses it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from browser import CHROMIUM, Browser
from stillroom import cli
from stillroom.bench.scenes import bench as scenes
from stillroom.data.scenes.captions import vocabulary
from stillroom.data.scenes.pictures import scene_set
from stillroom.demo import server
from stillroom.demo.cards import Entry, duration, filled, picture_uri, sheet
from stillroom.demo.exhibits import (
    LONGEST_MESSAGE,
    Drawing,
    Exhibit,
    Judge,
    hole_from_brush,
    image_from_file,
    message,
)
from stillroom.demo.studio import SHELF, Shown, Studio
from stillroom.diffusion.masking import MaskedSampler
from stillroom.diffusion.sampling import ODESampler
from stillroom.errors import UserError
from stillroom.folders.image_networks import make_classifier
from stillroom.networks.text_image_space import TextImageSpace
from stillroom.pictures import PictureGenerator
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.classify.model import ImageClassifier
from stillroom.tasks.text_images.model import TextImageGenerator
from tiny import CLASSES, make_teacher
from tiny_pipelines import make_pipeline
from tiny_text_images import mar, noisy, sd3, tiny_codec, tiny_text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")

SIDE, CELL = 8, 4
"""Of the tiny student's pictures, and of what one of its tokens becomes: autoencoder 2, patch 2."""
CAPTION = "a red three"


def tiny_student(space: TextImageSpace) -> TextImageGenerator:
    return TextImageGenerator(noisy(mar()), MaskedSampler(steps=2, head_steps=3, guidance=2.0), space)


@pytest.fixture(scope="module")
def space() -> TextImageSpace:
    torch.manual_seed(0)
    return TextImageSpace(tiny_text(words=vocabulary(), length=16), tiny_codec(), (SIDE, SIDE))


@pytest.fixture(scope="module")
def generators(space: TextImageSpace) -> dict[str, TextImageGenerator]:
    torch.manual_seed(0)
    return {
        "little": tiny_student(space),
        "big": TextImageGenerator(sd3(), ODESampler("euler", 3, 2.0), space),
        "bigger": TextImageGenerator(sd3(), ODESampler("euler", 6, 2.0), space),
    }


@pytest.fixture
def studio(generators: dict[str, TextImageGenerator]) -> Studio:
    student, *teachers = (Exhibit(name, lambda g=g: g) for name, g in generators.items())
    return Studio(student, teachers)


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("demo") / "by-class")


class Painter(PictureGenerator):
    """A generator that takes its time: the first call longest, as caches fill."""

    asked_by = "captions"

    def __init__(self, first: float = 0.0, others: float = 0.0, fails: str = "") -> None:
        self.sampler, self.network = ODESampler("euler", 3), torch.nn.Linear(1, 1)
        self.first, self.others, self.fails, self.asked = first, others, fails, 0

    def draw(self, wish: str, n: int, seed: int, **changes: Any) -> Tensor:
        if self.fails:
            raise RuntimeError(self.fails)
        time.sleep(self.others if self.asked else self.first)
        self.asked += 1
        return torch.zeros(n, 3, SIDE, SIDE)


# --- drawing ----------------------------------------------------------------------------------------------------------
def test_a_model_draws_what_its_generator_samples(generators: dict[str, TextImageGenerator]) -> None:
    little = generators["little"]
    exhibit = Exhibit("little", lambda: little)
    drawing = exhibit.draw(CAPTION, 3, seed=5, guidance=3.0, steps=1, temperature=0.5)
    torch.testing.assert_close(
        drawing.images, little.sample([CAPTION] * 3, seed=5, guidance=3.0, steps=1, temperature=0.5)
    )
    assert not drawing.images.equal(exhibit.draw(CAPTION, 3, seed=5).images)
    assert drawing.verdicts == [None] * 3
    assert little.settings == {"guidance": 2.0, "steps": 2, "temperature": 1.0}
    assert (little.image_size, little.cell, little.fills, exhibit.by_class) == ((SIDE, SIDE), CELL, True, False)


def test_settings_that_a_sampler_lacks_are_left_out(generators: dict[str, TextImageGenerator]) -> None:
    big = generators["big"]
    exhibit = Exhibit("big", lambda: big)
    assert big.settings == {"guidance": 2.0, "steps": 3}
    assert not big.fills
    drawing = exhibit.draw(CAPTION, 2, seed=1, temperature=0.1, guidance=None)  # type: ignore[arg-type]
    torch.testing.assert_close(drawing.images, big.sample([CAPTION] * 2, seed=1))
    assert exhibit.facts(steps=7)[1:] == ("euler", "7 steps", "guidance 2")


def test_loading_and_the_first_call_are_not_in_the_time() -> None:
    loads: list[int] = []

    def load() -> Painter:
        loads.append(1)
        time.sleep(0.2)
        return Painter(first=0.3, others=0.01)

    exhibit = Exhibit("slow to start", load)
    assert loads == []
    drawing = exhibit.draw(CAPTION, 2, seed=0)
    assert 0.01 <= drawing.seconds < 0.1
    assert drawing.milliseconds == pytest.approx(500 * drawing.seconds)
    exhibit.draw(CAPTION, 2, seed=0)
    painter: Any = exhibit.model
    assert (loads, painter.asked) == ([1], 3)


def test_a_model_that_is_asked_by_class(class_folder: Path) -> None:
    generator = ImageGenerator.load(class_folder)
    exhibit = Exhibit("by class", lambda: generator)
    assert (exhibit.by_class, generator.image_size, generator.fills) == (True, (SIDE, SIDE), False)
    torch.testing.assert_close(exhibit.draw("dot", 2, seed=4).images, generator.sample([2, 2], seed=4))
    assert not exhibit.draw("dot", 2, seed=4, guidance=3.0).images.equal(generator.sample([2, 2], seed=4))
    assert generator.examples() == list(CLASSES)
    assert exhibit.surprise() in CLASSES
    for ask in (generator.check, lambda wish: generator.draw(wish, 1, 0)):
        with pytest.raises(UserError, match="no class 'cat'"):
            ask("cat")


def test_surprises_and_examples_hold_known_words_only(studio: Studio, generators: dict[str, Any]) -> None:
    assert len(studio.student.model.examples()) == 6
    for _ in range(20):
        studio.student.model.check(studio.student.surprise())
    few = TextImageSpace(
        tiny_text(words=("a", "red", "eight", "green", "one", "and", "purple", "six")), tiny_codec(), (8, 8)
    )
    narrow = Exhibit("narrow", lambda: tiny_student(few))
    assert narrow.model.examples() == ["a red eight", "a green one and a purple six"]
    for _ in range(20):
        narrow.model.check(narrow.surprise())
    mute = TextImageSpace(tiny_text(words=("nothing",)), tiny_codec(), (8, 8))
    assert Exhibit("mute", lambda: tiny_student(mute)).surprise() == ""


# --- the judge --------------------------------------------------------------------------------------------------------
def test_the_judge_tells_obedient_pictures_from_others() -> None:
    images, captions = scene_set(24, 3, "test")
    scaled, judge = images.float() / 127.5 - 1, Judge()
    own = [judge.verdicts(caption.text, image[None])[0] for caption, image in zip(captions, scaled, strict=True)]
    assert sum(map(bool, own)) >= 21
    pairs = [(a, image) for a, b, image in zip(captions, captions[1:], scaled[1:]) if a.wants != b.wants]
    assert sum(bool(judge.verdicts(caption.text, image[None])[0]) for caption, image in pairs) <= 3
    with_marks = f"  {captions[0].text.capitalize()}. "
    assert judge.verdicts(with_marks, scaled[:1]) == judge.verdicts(captions[0].text, scaled[:1]) == [True]


def test_the_judge_is_silent_where_it_cannot_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.zeros(2, 3, 32, 32)
    assert Judge().verdicts("seven is a purple number", images) == [None, None]
    assert Judge().verdicts(CAPTION, torch.zeros(1, 3, 16, 16)) == [None]
    assert Judge(()).verdicts(CAPTION, images) == [None, None]
    monkeypatch.setattr(scenes, "PARSER_DIR", tmp_path)
    lost = Judge()
    assert lost.verdicts(CAPTION, images) == lost.verdicts(CAPTION, images) == [None, None]
    assert capsys.readouterr().err.count("pictures are not judged") == 1


# --- holes and pictures -----------------------------------------------------------------------------------------------
def strokes(*pixels: tuple[int, int], height: int = SIDE, width: int = SIDE) -> str:
    marks = [["0"] * width for _ in range(height)]
    for row, column in pixels:
        marks[row][column] = "1"
    return "".join(map("".join, marks))


def test_a_touched_cell_becomes_a_hole_as_a_whole() -> None:
    hole = hole_from_brush(strokes((0, 5), (3, 4)), (SIDE, SIDE), CELL)
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[:4, 4:] = True
    assert hole.equal(expected)
    assert int(hole_from_brush(strokes((3, 3), (4, 4)), (SIDE, SIDE), CELL).sum()) == 32
    assert hole_from_brush(strokes((2, 6)), (SIDE, SIDE), 1).nonzero().tolist() == [[2, 6]]
    odd = hole_from_brush(strokes((4, 5), height=5, width=6), (5, 6), CELL)  # cells at the edge may be cut off
    assert odd.nonzero().tolist() == [[4, 4], [4, 5]]


@pytest.mark.parametrize(
    ("marks", "told"),
    [("0" * 64, "nothing is painted"), ("", "8x8"), ("1" * 63, "8x8"), ("2" * 64, "8x8")],
)
def test_strokes_that_make_no_hole(marks: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        hole_from_brush(marks, (SIDE, SIDE), CELL)


def test_an_enlarged_picture_comes_back_exactly(tmp_path: Path) -> None:
    pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8)
    small = Image.fromarray(pixels.numpy())
    small.resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / "big.png")
    read = image_from_file(tmp_path / "big.png", (SIDE, SIDE))
    torch.testing.assert_close((read + 1) * 127.5, pixels.permute(2, 0, 1).float())
    wide = Image.new("RGBA", (40, 16), "red")
    wide.paste(small.resize((16, 16), Image.Resampling.NEAREST), (12, 0))  # the middle is what is read
    wide.save(tmp_path / "wide.png")
    torch.testing.assert_close(image_from_file(tmp_path / "wide.png", (SIDE, SIDE)), read)
    Image.new("L", (3, 5), 255).save(tmp_path / "grey.jpg")
    assert image_from_file(tmp_path / "grey.jpg", (SIDE, SIDE)).min() > 0.95


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    for name in ("words.png", "cut.png"):
        with pytest.raises(UserError, match="no picture that can be read"):
            image_from_file(tmp_path / name, (SIDE, SIDE))


# --- buttons ----------------------------------------------------------------------------------------------------------
def test_drawing_shows_the_student_first_then_each_teacher(studio: Studio) -> None:
    shown = list(studio.draw(f"  {CAPTION} ", 7, 2, {"guidance": 3.0}, []))
    assert [step.cards.count("<img") for step in shown if step.cards] == [0, 2, 4, 6]
    assert [step.cards.count("sr-blank") for step in shown if step.cards] == [6, 4, 2, 0]
    assert [step.shelf is not None for step in shown] == [False, True, False, False]
    last = shown[-1].cards or ""
    assert re.findall(r"<h3>(\w+)</h3>", last) == ["little", "big", "bigger"]
    assert "guidance 3" in last  # the student's; teachers keep their own
    assert last.count("guidance 2") == 2
    assert f"<q>{CAPTION}</q>" in last
    assert len(re.findall(r"little is [\d.]+× (faster|slower)", last)) == 2
    shelf = shown[1].shelf or []
    torch.testing.assert_close(
        torch.stack([picture.image for picture in shelf]),
        studio.student.model.sample([CAPTION] * 2, seed=7, guidance=3.0),
    )
    assert shown[1].choose == shelf[0].id


@pytest.mark.parametrize(
    ("wish", "seed", "n", "told"),
    [
        ("", 0, 4, "the caption is empty"),
        (None, 0, 4, "the caption is empty"),
        ("a reed three", 0, 4, "did you mean &#x27;red&#x27;"),
        ("three " * 2000, 0, 4, "2,001 tokens"),
        ("x" * 10_000, 0, 4, "never shown"),
        (CAPTION, None, 4, "the seed must be a whole number"),
        (CAPTION, -1, 4, "got -1"),
        (CAPTION, 1.5, 4, "got 1.5"),
        (CAPTION, float("nan"), 4, "got nan"),
        (CAPTION, "x", 4, "the seed must be"),
        (CAPTION, 0, 0, "images must be a whole number from 1 to 8"),
        (CAPTION, 0, float("inf"), "got inf"),
    ],
)
def test_mistakes_are_one_message_and_change_nothing_else(
    studio: Studio, wish: Any, seed: Any, n: Any, told: str
) -> None:
    (shown,) = studio.draw(wish, seed, n, {}, [])
    assert told.lower() in shown.notice.lower()
    assert shown == Shown(shown.notice)
    assert len(shown.notice) < 2 * LONGEST_MESSAGE
    assert "Traceback" not in shown.notice


def test_one_failing_model_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def lost() -> Any:
        raise UserError("teacher folder x does not exist", cure="give another")

    loads = {"ill": lambda: Painter(fails="<b>broken</b>"), "lost": lost, "also well": Painter}
    teachers = [Exhibit(name, load) for name, load in loads.items()]
    last = list(Studio(Exhibit("well", Painter), teachers).draw("x", 0, 1, {}, []))[-1]
    cards = last.cards or ""
    assert cards.count("<img") == 2
    assert "RuntimeError: &lt;b&gt;broken&lt;/b&gt;" in cards
    assert "Teacher folder x does not exist; give another." in cards
    assert "drawing…" not in cards
    assert "Traceback" in capsys.readouterr().err  # for whoever started the page


def test_a_hole_is_filled_and_the_rest_kept(studio: Studio) -> None:
    drawn = next(step for step in studio.draw(CAPTION, 0, 2, {}, []) if step.shelf)
    shelf = drawn.shelf or []
    before = shelf[1]
    painted = json.dumps({"id": before.id, "strokes": strokes((0, 0))})
    shown = studio.fill(painted, "a blue seven", 3, 2, {"steps": 1}, shelf)
    assert shown.notice == ""
    assert (shown.cards or "").count("<img") == 3
    assert "1 step<" in (shown.cards or "")
    new, kept = (shown.shelf or [])[:2], (shown.shelf or [])[2:]
    for picture in new:
        outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
        outside[:CELL, :CELL] = False
        assert picture.image[:, outside].equal(before.image[:, outside])
        assert not picture.image[:, ~outside].equal(before.image[:, ~outside])
    assert [picture.id for picture in kept] == [before.id, shelf[0].id]
    assert shown.choose is None  # the brush stays where it was
    told = json.loads(studio.easel(shown))
    assert [picture["id"] for picture in told["pictures"]] == [picture.id for picture in shown.shelf or ()]
    assert (told["choose"], told["cell"], told["width"], told["height"]) == (0, CELL, SIDE, SIDE)


@pytest.mark.parametrize(
    ("painted", "wish", "told"),
    [
        ("", CAPTION, "no picture under the brush"),
        (json.dumps({"id": 99, "strokes": strokes((0, 0))}), CAPTION, "no picture under the brush"),
        ("{", CAPTION, "cannot be read"),
        ("[1]", CAPTION, "cannot be read"),
        ('{"id": null}', CAPTION, "cannot be read"),
        ('{"id": 1}', CAPTION, "Nothing is painted yet"),
        (json.dumps({"id": 1, "strokes": "11"}), CAPTION, "paint again"),
        (json.dumps({"id": 1, "strokes": strokes((0, 0))}), "a reed three", "did you mean"),
        (json.dumps({"id": 1, "strokes": strokes((0, 0))}), "", "caption is empty"),
    ],
)
def test_holes_that_cannot_be_filled(studio: Studio, painted: str, wish: str, told: str) -> None:
    shelf = next(step.shelf for step in studio.draw(CAPTION, 0, 1, {}, []) if step.shelf)
    shown = studio.fill(painted, wish, 0, 1, {}, shelf)
    assert told.lower() in shown.notice.lower()
    assert shown == Shown(shown.notice)


def test_an_upload_comes_under_the_brush(studio: Studio, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    shelf = next(step.shelf for step in studio.draw(CAPTION, 0, 8, {}, []) if step.shelf)
    for _ in range(3):
        shown = studio.upload(tmp_path / "red.png", shelf)
        shelf = shown.shelf or []
    assert shown.choose == shelf[0].id
    assert shelf[0].image[:, 0, 0].tolist() == [1, -1, -1]
    assert len(studio.upload(tmp_path / "red.png", shelf * 2).shelf or []) == SHELF
    assert studio.upload(None, shelf) == Shown()
    (tmp_path / "red.png").write_bytes(b"")
    assert "no picture" in studio.upload(tmp_path / "red.png", shelf).notice


# --- what is shown ----------------------------------------------------------------------------------------------------
def decoded(uri: str) -> Tensor:
    import numpy as np

    file = io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_pictures_are_enlarged_by_whole_pixels() -> None:
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    shown = decoded(picture_uri(image / 127.5 - 1))
    assert shown.equal(image.repeat_interleave(8, 1).repeat_interleave(8, 2))
    grey = decoded(picture_uri(torch.full((1, 8, 4), 1.0)))
    assert grey.shape == (3, 256, 128)
    assert bool((grey == 255).all())
    assert decoded(picture_uri(torch.zeros(3, 300, 300))).shape == (3, 300, 300)
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[0, 0] = True
    striped = decoded(picture_uri(torch.ones(3, 8, 8), hole))
    assert set(striped[:, :32, :32].unique().tolist()) == {70, 110}
    assert bool((striped[:, 32:, :] == 255).all())


def test_verdicts_times_and_comparisons_are_told() -> None:
    images = torch.zeros(3, 3, 8, 8)
    student = Entry("little", "student", Drawing(images, 0.3, [True, False, True]), ("masked", "4 steps"))
    teachers = [
        Entry("big", "teacher", Drawing(images, 1.2, [None] * 3)),
        Entry("quick", "teacher", Drawing(images, 0.15, [True] * 3)),
    ]
    shown = sheet("a three", 0, 3, [student, *teachers])
    assert (shown.count("✓ obeys"), shown.count("✗ does not")) == (5, 1)
    assert "2 of 3 obey the caption" in shown
    assert "3 of 3 obey the caption" in shown
    assert re.findall(r"<b>([\d.]+ m?s)</b> per image", shown) == ["100 ms", "400 ms", "50 ms"]
    assert re.findall(r"width:([\d.]+)%", shown) == ["25.0", "100.0", "12.5"]
    assert "little is 4.0× faster" in shown
    assert "little is 2.0× slower" in shown
    assert [duration(ms) for ms in (0.123, 9.96, 123.4, 1234)] == ["0.1 ms", "10.0 ms", "123 ms", "1.2 s"]


def test_every_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    drawing = Drawing(torch.zeros(1, 3, 8, 8), 0.1, [None])
    entry = Entry(evil, "student", drawing, (evil,))
    hole = torch.ones(8, 8, dtype=torch.bool)
    for shown in (
        sheet(evil, 0, 1, [entry, Entry("t", "teacher", problem=evil)]),
        filled(evil, 0, torch.zeros(3, 8, 8), hole, entry),
    ):
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown
        assert 'alt="&lt;script' in shown


def test_messages_are_short_lines() -> None:
    assert message(UserError("the caption is empty", cure="say more")) == "The caption is empty; say more."
    assert message(UserError("x\n  y")) == "X y."
    assert len(message(UserError("word " * 1000))) == LONGEST_MESSAGE
    assert message(KeyError("a")) == "This did not work: KeyError: 'a'"


# --- which models -----------------------------------------------------------------------------------------------------
@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generators: dict[str, TextImageGenerator], class_folder: Path
) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("little", "big"):
        generators[name].save(tmp_path / name)
    (tmp_path / "by-class").symlink_to(class_folder)
    ImageClassifier(make_classifier("resnet-small", 1, len(CLASSES)), CLASSES).save(tmp_path / "classifier")
    return tmp_path


def test_a_run_brings_its_own_teachers(place: Path) -> None:
    run = place / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("method: dmd2\nteacher: by-class\n")
    shutil.copytree(place / "by-class", run / "student")
    studio = server.open_studio(str(run))
    assert studio.student.name == "mine"
    assert [(teacher.name, teacher.model.choices) for teacher in studio.teachers] == [("by-class", list(CLASSES))]
    shown = list(studio.draw("dot", 0, 2, {}, []))[-1]
    assert (shown.cards or "").count("<img") == 4
    assert cli._model("mine") == "runs/mine"


def test_a_runs_several_teachers_come_from_its_recipe(place: Path) -> None:
    run = place / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("method: dmd2\nteacher: ./big, ./little\n")
    shutil.copytree(place / "little", run / "student")
    assert [teacher.name for teacher in server.open_studio(str(run)).teachers] == ["big", "little"]


def test_a_diffusers_pipeline_is_shown(place: Path) -> None:
    pytest.importorskip("diffusers")
    make_pipeline("sd").save_pretrained(place / "pipe")
    studio = server.open_studio("./pipe@16", ["little"])
    exhibit = studio.student
    assert (exhibit.by_class, exhibit.model.examples(), exhibit.surprise()) == (False, [], "")
    assert exhibit.model.settings["steps"] == 25
    last = list(studio.draw("a cat", 0, 2, {"steps": 1}, []))[-1].cards or ""
    assert "1 step<" in last
    assert last.count("<img") == 2
    assert "the caption is empty" in next(studio.draw(" ", 0, 2, {}, [])).notice.lower()


def test_a_folder_is_shown_with_the_teachers_named(place: Path) -> None:
    assert server.open_studio("little").teachers == []
    studio = server.open_studio("little", ["big", "little"])  # a model is not its own teacher
    assert [teacher.name for teacher in studio.teachers] == ["big"]
    assert studio.student.model.fills


@pytest.mark.parametrize(
    ("student", "teachers", "told"),
    [
        ("nowhere", [], "no model 'nowhere'"),
        ("./nowhere", [], "nowhere does not exist"),
        ("little", ["./nowhere"], "nowhere does not exist"),
        ("little", ["by-class"], "asked in words, teacher 'by-class' by class"),
        ("by-class", ["little"], "asked by class, teacher 'little' in words"),
        ("classifier", [], "this model recognises images, it draws none; stillroom.load"),
        ("little", ["classifier"], "asked in words, teacher 'classifier' recognises images"),
    ],
)
def test_models_that_cannot_be_shown(place: Path, student: str, teachers: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        server.open_studio(student, teachers)


def test_a_teacher_that_breaks_after_the_start_is_told_on_its_card(place: Path) -> None:
    studio = server.open_studio("little", ["big"])
    next((place / "big").rglob("*.safetensors")).write_bytes(b"")
    cards = list(studio.draw(CAPTION, 0, 1, {}, []))[-1].cards or ""
    assert cards.count("<img") == 1
    assert "cannot be read" in cards


# --- the server -------------------------------------------------------------------------------------------------------
def test_it_listens_to_this_machine_only() -> None:
    with server.listen(0) as listening:
        host, port = listening.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=f"port {port}: address already in use; give --port 0"):
            server.listen(port)
    for wrong in (-1, 65536):
        with pytest.raises(UserError, match="from 0 to 65535"):
            server.listen(wrong)


def test_without_a_port_the_first_free_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with server.listen(0) as taken:
        monkeypatch.setattr(server, "FIRST_PORT", taken.getsockname()[1])
        with server.listen() as found:
            assert found.getsockname()[1] > taken.getsockname()[1]
        monkeypatch.setattr(server, "PORTS", 1)
        with pytest.raises(UserError, match="every port from"):
            server.listen()


def test_without_gradio_the_cure_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", "little"]) == 2
    assert capsys.readouterr().err == "stillroom: the demo needs gradio; pip install 'stillroom[demo]'\n"


# --- the page ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reached() -> list[str]:
    """Hosts that this process tried to reach while the page was built and used."""
    return []


@pytest.fixture(scope="module")
def address(generators: dict[str, TextImageGenerator], reached: list[str]) -> Iterator[str]:
    """The page with tiny models, served in a thread."""
    pytest.importorskip("gradio")
    import uvicorn

    student, *teachers = (Exhibit(name, lambda g=g: g) for name, g in generators.items())
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self: socket.socket, where: Any) -> None:
        if self.family != socket.AF_UNIX:
            reached.append(str(where[0]))
        connect(self, where)

    def watched_lookup(host: Any, *more: Any, **named: Any) -> Any:
        reached.append(str(host))
        return lookup(host, *more, **named)

    with pytest.MonkeyPatch.context() as patch, server.listen(0) as listening:
        patch.setattr(socket.socket, "connect", watched_connect)
        patch.setattr(socket, "getaddrinfo", watched_lookup)
        app = server.application(Studio(student, teachers))
        running = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        running.should_exit = True
        thread.join(10)


def test_the_page_may_fetch_from_nowhere_else(address: str) -> None:
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.headers["Content-Security-Policy"] == server.POLICY
        page = answer.read().decode()
    assert "http:" not in server.POLICY
    assert "*" not in server.POLICY
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page)[1])  # type: ignore[index]
    assert config["analytics_enabled"] is False
    assert config["title"] == "stillroom demo"
    request = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=30)


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@needs_browser
def test_a_visitor_draws_and_fills(address: str, reached: list[str], tmp_path: Path) -> None:
    cards, images = "document.querySelector('#sr-cards')", "document.querySelectorAll('#sr-cards img').length"
    wide = "document.documentElement.scrollWidth <= window.innerWidth"
    with Browser(1280, 900) as browser:
        browser.open(address)
        browser.wait("Boolean(document.querySelector('.sr-ask textarea'))")
        assert browser.run("document.querySelector('h1').innerText") == "little beside big and bigger"

        browser.type(".sr-ask textarea", "a reed three")
        browser.click("#sr-go")
        told = browser.wait("document.querySelector('#sr-notice .sr-notice')?.innerText")
        assert "did you mean 'red'" in told
        assert browser.run(images) == 0

        browser.type(".sr-ask textarea", "a red three and a blue seven")
        browser.click("#sr-go")
        browser.wait(f"{images} === 12")
        assert browser.run("document.querySelector('#sr-notice .sr-notice')") is None
        assert browser.run(f"{cards}.innerText.match(/per image/g).length") == 3
        assert browser.run("getComputedStyle(document.querySelector('#sr-cards img')).imageRendering") == "pixelated"
        assert browser.run(wide)

        browser.click(".sr-chips button", "a red eight")
        browser.wait(f"{cards}.innerText.includes('a red eight') && {images} === 12")
        seed = browser.run(f"{cards}.innerText.match(/seed \\d+/)[0]")
        browser.click("#sr-again")
        browser.wait(f"{cards}.innerText.match(/seed \\d+/)[0] !== {json.dumps(seed)} && {images} === 12")
        browser.click("#sr-surprise")
        browser.wait(f"!{cards}.innerText.includes('a red eight') && {images} === 12")

        browser.resize(390, 844)
        browser.click("button[role=tab]", "Fill in")
        browser.wait("Boolean(document.querySelector('.sr-ready canvas'))")
        assert browser.run("document.querySelectorAll('.sr-shelf button').length") >= 4
        browser.click("#sr-fill-go")
        assert "nothing is painted" in browser.wait(
            "document.querySelector('#sr-fill-notice .sr-notice')?.innerText.toLowerCase()"
        )
        x, y = browser.middle("#sr-easel canvas")
        side = browser.run("document.querySelector('#sr-easel canvas').clientWidth")
        browser.drag([(x - 0.4 * side, y - 0.4 * side), (x - 0.3 * side, y - 0.35 * side)])
        browser.click("#sr-fill-go")
        browser.wait("document.querySelectorAll('#sr-fill-cards img').length === 5")
        assert browser.run("document.querySelector('#sr-fill-notice .sr-notice')") is None
        before, after = (
            decoded(browser.run(f"document.querySelectorAll('#sr-fill-cards img')[{i}].src")) for i in (0, 1)
        )
        assert set(before[:, :128, :128].unique().tolist()) == {70, 110}  # the hole: the upper left cell of four
        assert not before[:, :128, :128].equal(after[:, :128, :128])
        assert before[:, 128:].equal(after[:, 128:])
        assert before[:, :128, 128:].equal(after[:, :128, 128:])
        assert browser.run(wide)
        browser.screenshot(tmp_path / "page.png")
        assert Image.open(tmp_path / "page.png").width == 390
        assert browser.outside == []
        assert browser.complaints == []
        # None of this would show if the page could not be caught at it, or were not held back by its policy.
        assert (
            browser.run("fetch('http://203.0.113.1/').then(() => 'let through', problem => problem.name)")
            == "TypeError"
        )
        assert any("Content Security Policy" in complaint for complaint in browser.complaints)
        browser.open("data:text/html,<img src='http://203.0.113.1/'>")
        browser.wait("document.images.length === 1")
        assert browser.outside == ["http://203.0.113.1/"]
    assert set(reached) <= {"127.0.0.1", "localhost"}


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(place: Path) -> None:
    command = [sys.executable, "-m", "stillroom", "demo", "little", "--teachers", "big", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()  # type: ignore[union-attr]
        address = re.match(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + process.stderr.read()  # type: ignore[union-attr]
        with urllib.request.urlopen(address[0], timeout=60) as answer:
            assert answer.status == 200
        if CHROMIUM:  # a page that stays open does not hold the end up
            browser = Browser()
            browser.open(address[0])
            browser.wait("Boolean(document.querySelector('.sr-ask textarea'))")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            browser.__exit__(None, None, None)
        else:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        assert process.stderr.read() == ""  # type: ignore[union-attr]
    finally:
        process.kill()
