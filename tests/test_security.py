"""Input that means harm: pickles, archives, links, bombs. Each is refused in one line that names the file, with exit
code 2, nothing is written, and no code of it is run. And: no command reaches the network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import stillroom as sr
import tiny_text
from stillroom import cli, files
from stillroom.data import pictures
from stillroom.data.prompt_sources import Tars, prompt_source
from stillroom.data.source import load_data
from stillroom.data.texts import load_texts
from stillroom.errors import UserError
from stillroom.files import stay_inside
from stillroom.parsing import DEEPEST, LARGEST_YAML, parse_json, parse_yaml
from stillroom.synthesis.teachers import PipelineTeacher
from tiny import CLASSES, FAST, SIZE, make_data, make_teacher

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Evil:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (os.environ["STILLROOM_MARKER"], "w"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, data, and a run of two of four steps."""
    folder = tmp_path_factory.mktemp("store")
    make_teacher(folder / "teacher")
    make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(run_arguments("--name", "half")) == 0
    for name in ("result.json", "report.html"):
        (folder / "runs/half" / name).unlink()
    return folder


@pytest.fixture
def place(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the working folder; what a pickle would leave must not be there afterwards."""
    shutil.copytree(store, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("STILLROOM_MARKER", str(tmp_path / "marker"))
    yield tmp_path / "work"
    assert not (tmp_path / "marker").exists(), "code was run"


def run_arguments(*more: str, teacher: str = "teacher", data: str = "data", method: str = "dmd2") -> list[str]:
    return ["run", method, "--teacher", teacher, "--data", data, "--steps", "2", *FAST, *more]


def contents(folder: Path) -> dict[str, Any]:
    """What is there, links not followed."""
    return {
        str(Path(at) / name): os.lstat(Path(at) / name).st_mtime_ns
        for at, folders, names in os.walk(folder)
        for name in (*folders, *names)
    }


def refused(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that must be refused at once and change nothing."""
    capsys.readouterr()
    before, began = contents(place.parent), time.monotonic()
    code = cli.main(list(arguments))
    assert time.monotonic() - began < 10
    said = capsys.readouterr()
    assert code == 2, said
    assert contents(place.parent) == before
    assert said.out == ""
    (line,) = said.err.splitlines()  # one line
    assert line.startswith("stillroom: ")
    assert len(line) < 1000
    return line


def evil_pickle(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Evil()))
    return path


def test_the_pickle_is_one_that_would_run(place: Path, tmp_path: Path) -> None:
    evil_pickle(tmp_path / "evil.pt")
    with (tmp_path / "evil.pt").open("rb") as file:
        pickle.load(file).close()
    assert (tmp_path / "marker").is_file()
    (tmp_path / "marker").unlink()


# --- pickles ----------------------------------------------------------------------------------------------------------
def test_a_pickled_teacher_is_not_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil_pickle(place / "evil.pt")
    assert "evil.pt" in refused(place, capsys, *run_arguments(teacher="./evil.pt"))
    evil_pickle(place / "teacher" / WEIGHTS)
    assert "cannot be read" in refused(place, capsys, *run_arguments())
    (place / "teacher" / WEIGHTS).unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pt"):
        evil_pickle(place / "teacher/transformer" / name)
    assert "are missing" in refused(place, capsys, *run_arguments())


def classifier(folder: Path) -> None:
    from stillroom.folders.image_networks import make_classifier
    from stillroom.tasks.classify.model import ImageClassifier

    ImageClassifier(make_classifier("resnet-small", 1, 3), CLASSES).save(folder)


def encoder(folder: Path) -> None:
    from stillroom.networks.mae import make_encoder
    from stillroom.tasks.encode.model import ImageEncoder

    ImageEncoder(make_encoder("mae-nano", 1, SIZE)).save(folder)


def text_encoder(folder: Path) -> None:
    tiny_text.encoder(classes=3).save_pretrained(folder)
    tiny_text.tokenizer().save_pretrained(folder)


def texts(place: Path) -> str:
    rows = [f"{text},{label}" for text, label in zip(tiny_text.texts().texts, tiny_text.texts().labels.tolist())]
    (place / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return "texts.csv"


KINDS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "classifier": (classifier, "meal-v2", "resnet-small"),
    "encoder": (encoder, "dmae", "mae-nano"),
    "text encoder": (text_encoder, "distiller", "bert-2x64"),
}


@pytest.mark.parametrize("how", ["teacher", "student"])
@pytest.mark.parametrize("kind", KINDS)
def test_pickles_of_transformers_are_not_read(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str, how: str
) -> None:
    make, method, student = KINDS[kind]
    make(place / "model")
    make(place / "good")
    for path in place.glob("model/*.safetensors"):
        path.unlink()
    evil_pickle(place / "model/pytorch_model.bin")
    pair = (student, "./model") if how == "teacher" else ("./model", "./good")
    given = ["--student", pair[0], "--teacher", pair[1]]
    data = texts(place) if kind == "text encoder" else "data"
    line = refused(place, capsys, "run", method, *given, "--data", data, "--steps", "2", *FAST)
    assert "model" in line
    assert "safetensors" in line
    assert refused(place, capsys, "sample", "model")


def test_a_pickled_student_is_not_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = place / "runs/half/student/transformer"
    shutil.move(student / Path(WEIGHTS).name, place / "aside")
    evil_pickle(student / "diffusion_pytorch_model.bin")
    for name in ("half", "runs/half/student"):
        assert "are missing" in refused(place, capsys, "sample", name)


def resealed(checkpoint: Path) -> None:
    """Write the checksums anew: whoever exchanges a file can do that too."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        data = (checkpoint / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickled_checkpoint_is_not_read(place: Path, capsys: pytest.CaptureFixture[str], sharded: bool) -> None:
    for checkpoint in (place / "runs/half/checkpoints").iterdir():
        evil_pickle(checkpoint / "weights.safetensors")
        evil_pickle(checkpoint / ".metadata")
        path = checkpoint / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sharded": sharded}))
        resealed(checkpoint)
    assert cli.main(["run", "--resume", "half"]) == 2  # found when the run is already open
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "runs/half/checkpoints/step-" in line
    assert "cannot be read" in line


def test_a_checkpoint_s_files_lie_inside_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in (place / "runs/half/checkpoints").iterdir():
        path = checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"]["../../../../outside.safetensors"] = {}
        save_file({"x": torch.zeros(1)}, place / "outside.safetensors")
        path.write_text(json.dumps(manifest))
        resealed(checkpoint)
    assert "outside.safetensors" in refused(place, capsys, "run", "--resume", "half")


def test_pickled_data_are_not_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("evil.pt", "evil.npz", "evil.pkl"):
        evil_pickle(place / name)
        assert name in refused(place, capsys, *run_arguments(data=f"./{name}"))
    evil_pickle(place / "data/train.npz")
    assert "train.npz" in refused(place, capsys, *run_arguments())
    np.savez(place / "data/train.npz", images=np.array([Evil()], object), labels=np.array([0]))
    assert "train.npz" in refused(place, capsys, *run_arguments())


# --- code of a folder -------------------------------------------------------------------------------------------------
CODE = "open(__import__('os').environ['STILLROOM_MARKER'], 'w')\n"


@pytest.mark.parametrize("kind", KINDS)
def test_code_of_a_folder_is_not_run(place: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    make, method, student = KINDS[kind]
    make(place / "model")
    config = place / "model/config.json"
    (place / "model/own.py").write_text(CODE)
    own = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForSequenceClassification": "own.M"}
    own["AutoModelForImageClassification"] = "own.M"
    known = json.loads(config.read_text()) | {"auto_map": own}
    arguments = ["run", method, "--student", student, "--teacher", "./model", "--steps", "2", *FAST]
    arguments += ["--data", texts(place) if kind == "text encoder" else "data"]
    config.write_text(json.dumps(known | {"model_type": "own"}))
    if kind != "encoder":  # there the class is named, and transformers' own
        assert "config.json" in refused(place, capsys, *arguments)
    if kind == "text encoder":
        config.write_text(json.dumps(known | {"auto_map": {}}))
        settings = place / "model/tokenizer_config.json"
        told = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | told))
        cli.main(arguments)  # transformers has a tokenizer of its own for this kind of model


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fetched_because_a_config_says_so(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, method, student = KINDS[kind]
    make(place / "model")
    config = place / "model/config.json"
    known = json.loads(config.read_text())
    arguments = ["run", method, "--student", student, "--teacher", "./model", "--steps", "2", *FAST]
    arguments += ["--data", texts(place) if kind == "text encoder" else "data"]
    for change, named in (
        ({"attn_implementation": "some-one/kernel"}, "some-one/kernel"),
        ({"text_config": {"_attn_implementation": "some-one/kernel"}}, "some-one/kernel"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
    ):
        config.write_text(json.dumps(known | change))
        line = refused(place, capsys, *arguments)
        assert named in line
        assert "config.json" in line
    config.write_text(json.dumps(known))
    (place / "model/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../elsewhere"}))
    assert "adapter" in refused(place, capsys, *arguments)


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["own", "Own"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["own", "Own"]},
        {"_class_name": "StableDiffusionPipeline", "../unet": ["diffusers", "UNet2DConditionModel"]},
    ],
)
def test_code_beside_a_pipeline_is_not_run(
    place: Path, capsys: pytest.CaptureFixture[str], index: dict[str, Any]
) -> None:
    (place / "pipe/unet").mkdir(parents=True)
    (place / "pipe/own.py").write_text(CODE)
    (place / "pipe/unet/own.py").write_text(CODE)
    (place / "pipe/model_index.json").write_text(json.dumps(index))
    (place / "prompts.txt").write_text("a cat\n")
    line = refused(place, capsys, *run_arguments(teacher="./pipe", data="prompts.txt"))
    assert "pipe/model_index.json" in line
    with pytest.raises(UserError, match=r"model_index\.json"):
        PipelineTeacher.load(place / "pipe")


# --- archives ---------------------------------------------------------------------------------------------------------
def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    """Members by name, type and content; for links, where they lead."""
    with tarfile.open(path, "w") as opened:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
            else:
                member.linkname = content.decode()
            opened.addfile(member, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return path


FILE = tarfile.REGTYPE
HARMS: dict[str, tuple[tuple[str, bytes, bytes], str]] = {
    "out by dots": (("../../x.txt", FILE, b"x"), "leads out"),
    "out from within": (("a/../../x.txt", FILE, b"x"), "leads out"),
    "absolute": (("/tmp/x.txt", FILE, b"x"), "leads out"),
    "symbolic link": (("0.txt", tarfile.SYMTYPE, b"/etc/passwd"), "is a link"),
    "hard link": (("0.txt", tarfile.LNKTYPE, b"../../x"), "is a link"),
    "device": (("0.txt", tarfile.CHRTYPE, b""), "a device"),
    "pipe": (("0.txt", tarfile.FIFOTYPE, b""), "a device"),
}


@pytest.mark.parametrize("what", HARMS)
def test_a_tar_with_odd_members_is_refused(place: Path, what: str) -> None:
    member, words = HARMS[what]
    path = tar(place / "x.tar", ("0.png", FILE, png()), member)
    before = contents(place.parent)
    with pytest.raises(UserError, match=rf"x\.tar: member .*{words}"):
        list(Tars([path]))
    assert contents(place.parent) == before


def test_a_tar_may_hold_folders_and_nothing_is_unpacked(place: Path) -> None:
    path = tar(place / "x.tar", ("a", tarfile.DIRTYPE, b""), ("a/0.png", FILE, png()), ("a/0.txt", FILE, b"a cat"))
    before = contents(place.parent)
    ((caption, image),) = list(Tars([path]))
    assert caption == "a cat"
    assert image is not None
    assert contents(place.parent) == before


def test_a_member_that_says_it_is_huge_is_refused(place: Path) -> None:
    member = tarfile.TarInfo("0.png")
    member.size = 1 << 40
    (place / "x.tar").write_bytes(member.tobuf() + b"\0" * 4096)
    with pytest.raises(UserError, match=r"x\.tar: member '0\.png' has 1,099,511,627,776 bytes"):
        list(Tars([place / "x.tar"]))


def test_gzip_bombs_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_UNPACKED", 1_000_000)
    (place / "train.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b"x" * 1_000_000))
    with pytest.raises(UserError, match=r"train\.csv\.gz: it unpacks to more than"):
        load_texts(place / "train.csv.gz")
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = place / "idx" / f"{stem}-ubyte.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(bytes(1_000_001)))
    with pytest.raises(UserError, match=r"ubyte\.gz: it unpacks to more than"):
        load_data(place / "idx")


# --- links ------------------------------------------------------------------------------------------------------------
def test_a_linked_run_folder_is_refused(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.move(place / "runs/half", tmp_path / "elsewhere")
    (place / "runs/half").symlink_to(tmp_path / "elsewhere")
    for command in (["run", "--resume", "half"], ["report", "half"], ["doctor", "half"], ["compare", "half"]):
        assert "runs/half is a symbolic link" in refused(place, capsys, *command)
    (tmp_path / "empty").mkdir()
    (place / "runs/new").symlink_to(tmp_path / "empty")
    assert "runs/new is a symbolic link" in refused(place, capsys, *run_arguments("--name", "new"))
    assert cli.main(["doctor", str(tmp_path / "elsewhere")]) in (0, 1)  # the folder itself is welcome


@pytest.mark.parametrize("name", ["metrics.jsonl", "student", "checkpoints", "samples", "report.html"])
def test_a_link_in_a_run_folder_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = place / "runs/half" / name
    if path.exists():
        shutil.move(path, tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("mine")
    path.symlink_to(tmp_path / "elsewhere")
    for command in (["run", "--resume", "half"], ["report", "half"], ["sample", "half"]):
        line = refused(place, capsys, *command)
        assert f"runs/half/{name} leads out of its folder" in line


@pytest.mark.parametrize("name", ["stillroom.json", WEIGHTS, "transformer", "transformer/extra.json"])
def test_a_link_in_a_teacher_s_folder_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = place / "teacher" / name
    if path.exists():
        shutil.move(path, tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("mine")
    path.symlink_to(tmp_path / "elsewhere")
    for command in (run_arguments(), ["sample", "teacher"]):
        assert f"teacher/{name} leads out of its folder" in refused(place, capsys, *command)
    with pytest.raises(UserError, match="leads out"):
        sr.load(place / "teacher")


def test_a_link_in_a_data_folder_is_refused(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.move(place / "data/train.npz", tmp_path / "elsewhere.npz")
    (place / "data/train.npz").symlink_to(tmp_path / "elsewhere.npz")
    assert "data/train.npz leads out of its folder" in refused(place, capsys, *run_arguments())
    (tmp_path / "cat.png").write_bytes(png())
    (place / "images").mkdir()
    (place / "images/0.png").symlink_to(tmp_path / "cat.png")
    (place / "images/0.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"images/0\.png leads out of its folder"):
        prompt_source(str(place / "images"))
    (place / "texts").mkdir()
    (place / "texts/train.csv").symlink_to(tmp_path / "cat.png")
    with pytest.raises(UserError, match=r"texts/train\.csv leads out of its folder"):
        load_texts(place / "texts")


def test_links_that_stay_inside_are_followed(place: Path) -> None:
    shutil.move(place / "data/train.npz", place / "data/one.bin")
    (place / "data/train.npz").symlink_to("one.bin")
    assert load_data("data").n > 0
    (place / "data/around").symlink_to(".")  # and none is followed in a circle
    stay_inside(place / "data")


def test_a_snapshot_may_link_to_the_blobs_of_its_own_model(place: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--x--y/snapshots/0123"
    shutil.copytree(place / "teacher", snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / WEIGHTS, blobs / "abc")
    (snapshot / WEIGHTS).symlink_to("../../../blobs/abc")
    assert sr.load(snapshot).sample([0]).shape == (1, 1, SIZE, SIZE)
    shutil.move(blobs / "abc", tmp_path / "hub/abc")
    (blobs / "abc").symlink_to("../../abc")
    with pytest.raises(UserError, match="leads out"):
        sr.load(snapshot)


def test_pipes_and_dead_links_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(place / "data/test.npz")
    assert "data/test.npz is neither a file nor a folder" in refused(place, capsys, *run_arguments())
    (place / "data/test.npz").unlink()
    (place / "data/test.npz").symlink_to("nowhere")
    assert "data/test.npz leads nowhere" in refused(place, capsys, *run_arguments())


# --- YAML -------------------------------------------------------------------------------------------------------------
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
RECIPES: dict[str, tuple[str, str]] = {
    "object": ("method: !!python/object/apply:os.system ['touch $STILLROOM_MARKER']\n", "line 1"),
    "module": ("method: !!python/module:os\n", "line 1"),
    "name": ("method: dmd2\nengine: !!python/name:os.system\n", "line 2"),
    "laughs": (f"method: dmd2\noptions:\n  {LAUGHS.replace(chr(10), chr(10) + '  ')}\n", "too many values"),
    "merged laughs": (
        "method: dmd2\na0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
        "too many values",
    ),
    "circle": ("method: dmd2\noptions: &a [*a]\n", "inside itself"),
    "deep": ("method: " + "[" * 20_000, "nested too deeply"),
    "deep mappings": ("method: " + "{a: " * 500 + "}" * 500, "nested too deeply"),
    "odd key": ("method: dmd2\n? [a, b]\n: 1\n", "no plain word"),
    "not a number": ("method: dmd2\nengine: {steps: .nan}\n", "engine.steps"),
    "not a number, learning rate": ("method: dmd2\nengine: {optim: {all: {lr: .nan}}}\n", "engine.optim.all.lr"),
}


@pytest.mark.parametrize("what", RECIPES)
def test_a_hostile_recipe_is_refused(place: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    text, words = RECIPES[what]
    (place / "hostile.yaml").write_text(text)
    line = refused(place, capsys, "run", "hostile.yaml")
    assert words in line
    if "not a number" not in what:
        assert "hostile.yaml" in line
        shutil.copy(place / "hostile.yaml", place / "runs/half/recipe.yaml")
        for command in (["run", "--resume", "half"], ["report", "half"]):
            assert "half/recipe.yaml" in refused(place, capsys, *command)


def test_a_huge_recipe_is_not_even_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (place / "huge.yaml").open("wb") as file:
        file.truncate(100_000_000)
    assert "huge.yaml has 100,000,000 bytes" in refused(place, capsys, "run", "huge.yaml")


def test_an_override_is_read_as_strictly(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("!!python/object/apply:os.system [x]", "{a: " * 500, "[" * 20_000):
        line = refused(place, capsys, "run", "dmd2", f"options.critic_turns={value}")
        assert "options.critic_turns" in line
    with pytest.raises(UserError, match="too many"):
        parse_yaml("x" * (LARGEST_YAML + 1), "override")


def test_anchors_in_measure_are_read() -> None:
    assert parse_yaml("a: &a {lr: 1e-4}\nb: *a\nc: {<<: *a, steps: 3}\n", "x") == {
        "a": {"lr": 1e-4}, "b": {"lr": 1e-4}, "c": {"lr": 1e-4, "steps": 3},
    }  # fmt: skip


# --- JSON -------------------------------------------------------------------------------------------------------------
DEEP = "[" * 100_000
LESS_DEEP = '{"a": ' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1)


@pytest.mark.parametrize("text", [DEEP, LESS_DEEP, '{"x": NaN}', "[1, NaN]"])
@pytest.mark.parametrize("name", ["stillroom.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_json_bomb_beside_a_teacher_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    (place / "teacher" / name).write_text(text)
    assert f"teacher/{name}" in refused(place, capsys, *run_arguments())


@pytest.mark.parametrize("text", [DEEP, LESS_DEEP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_json_bomb_of_transformers_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str, text: str
) -> None:
    make, method, student = KINDS[kind]
    make(place / "model")
    arguments = ["run", method, "--student", student, "--teacher", "./model", "--steps", "2", *FAST]
    arguments += ["--data", texts(place) if kind == "text encoder" else "data"]
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"):
        if (place / "model" / name).is_file():
            (place / "model" / name).write_text(text)
            assert "model" in refused(place, capsys, *arguments)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("classifier", {"hidden_sizes": {}}),
        ("classifier", {"depths": [1, -1, "x"]}),
        ("encoder", {"hidden_size": "x"}),
        ("encoder", {"patch_size": 0}),
        ("text encoder", {"num_hidden_layers": None}),
        ("text encoder", {"num_attention_heads": 0}),
    ],
)
def test_nonsense_in_a_config_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str, change: dict[str, Any]
) -> None:
    make, method, student = KINDS[kind]
    make(place / "model")
    config = place / "model/config.json"
    known = json.loads(config.read_text())
    assert change.keys() <= known.keys()
    config.write_text(json.dumps(known | change))
    arguments = ["run", method, "--student", student, "--teacher", "./model", "--steps", "2", *FAST]
    arguments += ["--data", texts(place) if kind == "text encoder" else "data"]
    assert "model" in refused(place, capsys, *arguments)


def test_json_bombs_among_the_data_are_refused(place: Path) -> None:
    (place / "images").mkdir()
    (place / "images/metadata.jsonl").write_text(DEEP + "\n")
    with pytest.raises(UserError, match=r"metadata\.jsonl:1"):
        prompt_source(str(place / "images"))
    (place / "prompts.jsonl").write_text('{"caption": "a cat"}\n' + LESS_DEEP + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl:2"):
        prompt_source(str(place / "prompts.jsonl"))
    (place / "train.jsonl").write_text(DEEP + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl:1"):
        load_texts(place / "train.jsonl")
    with pytest.raises(UserError, match=r"x\.tar, 0: the caption"):
        list(Tars([tar(place / "x.tar", ("0.png", FILE, png()), ("0.json", FILE, DEEP.encode()))]))


def test_json_bombs_in_a_run_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = place / "runs/half/metrics.jsonl"
    log.write_text(DEEP + "\n" + log.read_text())
    assert "metrics.jsonl, line 1" in refused(place, capsys, "report", "half")
    (place / "runs/half/result.json").write_text(DEEP)
    assert "result.json is damaged" in refused(place, capsys, "compare", "half")
    (place / "runs/half/result.json").unlink()
    for checkpoint in (place / "runs/half/checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text(DEEP)
    assert "damaged" in refused(place, capsys, "run", "--resume", "half")


def test_infinity_is_a_number_and_nan_is_none() -> None:
    assert parse_json('{"limit": [0.0, Infinity]}') == {"limit": [0.0, float("inf")]}
    assert parse_json('{"x": NaN}', nan=True)["x"] != 0
    with pytest.raises(ValueError, match="NaN"):
        parse_json('{"x": NaN}')


# --- safetensors ------------------------------------------------------------------------------------------------------
def tensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(64)


def entry(shape: list[int], end: int) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


LIES = {
    "a header of 2^63 bytes": tensors(b"{}", 1 << 63),
    "a header of 2^40 bytes": tensors(b"{}", 1 << 40),
    "a tensor of 2^40 values": tensors(entry([1 << 40], 4 << 40)),
    "a shape that overflows": tensors(entry([1 << 62, 1 << 62], 64)),
    "fewer bytes than the shape": tensors(entry([1 << 20], 64)),
    "a negative shape": tensors(entry([-16], 64)),
    "a deep header": tensors(b'{"x":' + b"[" * 100_000),
}


@pytest.mark.parametrize("what", LIES)
def test_weights_that_lie_about_their_size_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (place / "teacher" / WEIGHTS).write_bytes(LIES[what])
    assert WEIGHTS in refused(place, capsys, *run_arguments())
    for checkpoint in (place / "runs/half/checkpoints").iterdir():
        (checkpoint / "weights.safetensors").write_bytes(LIES[what])
        resealed(checkpoint)
    assert cli.main(["run", "--resume", "half"]) == 2
    assert "weights" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors"])
def test_an_index_of_shards_names_its_neighbours_only(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    weights = place / "teacher" / WEIGHTS
    shutil.move(weights, place / "teacher/outside.safetensors")
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    line = refused(place, capsys, *run_arguments())
    assert "index.json names" in line
    assert name in line


# --- pictures ---------------------------------------------------------------------------------------------------------
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int) -> bytes:
    """Says that it is so large, and is a few bytes long."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8193, 8192), (12_000, 12_000), (60_000, 60_000), (1, 1 << 30)])
def test_a_picture_that_would_fill_the_memory_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    for name in CLASSES:
        (place / "images" / name).mkdir(parents=True)
        (place / "images" / name / "0.png").write_bytes(png_of(*size))
    assert "0.png" in refused(place, capsys, *run_arguments(data="images"))
    with pytest.raises(UserError, match=r"x\.tar, 0: the image cannot be read"):
        list(Tars([tar(place / "x.tar", ("0.png", FILE, png_of(*size)), ("0.txt", FILE, b"a cat"))]))
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_a_picture_starts_no_other_program(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow draws PostScript with ghostscript, whatever the file's name ends in."""
    Image.new("RGB", (8, 8)).save(place / "0.eps", "EPS")
    shutil.copy(place / "0.eps", place / "0.png")
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(subprocess, "check_call", None)
    with pytest.raises(UserError, match=r"0\.png: the image cannot be read"):
        pictures.rgb(place / "0.png", str(place / "0.png"))


# --- the network ------------------------------------------------------------------------------------------------------
@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to reach another machine is refused and listed, whatever the settings of huggingface_hub."""
    import huggingface_hub.constants
    import transformers.utils.hub

    attempts: list[str] = []
    plain = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return plain(self, address)
        attempts.append(f"connect {address}")
        raise OSError("no network in this test")

    def lookup(host: Any, *_: Any, **__: Any) -> Any:
        attempts.append(f"look up {host}")
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for module in (transformers.utils.hub,):
        monkeypatch.setattr(module, "is_offline_mode", lambda: False, raising=False)
    return attempts


def test_the_trap_catches(reached: list[str]) -> None:
    from huggingface_hub import HfApi

    with pytest.raises(Exception, match=r"(?i)network|connect"):
        HfApi().model_info("bert-base-uncased")
    assert reached


def test_commands_reach_no_network(place: Path, reached: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        run_arguments("--name", "whole", "evaluate.n=4"),
        ["sample", "whole", "--n", "1"],
        ["report", "whole"],
        ["compare", "whole"],
        ["methods", "dmd2"],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    assert cli.main(["doctor", "whole"]) in (0, 1)
    assert reached == []


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_folders_of_transformers_reach_no_network(
    place: Path, reached: list[str], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, method, student = KINDS[kind]
    make(place / "model")
    data = texts(place) if kind == "text encoder" else "data"
    if kind == "text encoder":
        student = "./model"
    arguments = ["run", method, "--student", student, "--teacher", "./model", "--data", data, "--steps", "2", *FAST]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    sr.load(place / "runs" / method)
    assert reached == []


def test_a_name_is_never_looked_up(place: Path, reached: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is no folder here is not sought on a hub."""
    for name in ("bert-base-uncased", "google/vit-base-patch16-224", "https://example.org/model"):
        for method in ("dmd2", "meal-v2", "dmae"):
            refused(place, capsys, *run_arguments(teacher=f"{name}", method=method))
        refused(place, capsys, "run", "distiller", "--student", "bert-2x64", "--teacher", name, "--data", texts(place))
        refused(place, capsys, *run_arguments(data=name))
    assert reached == []
