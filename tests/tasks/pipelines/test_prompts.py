"""Prompts and captioned images in every form, what a pipeline's network makes of them, and whole runs on them."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stillroom.data.prompt_sources import PromptList, PromptSource, Texts, fitted, prompt_source, read_picture
from stillroom.errors import UserError
from stillroom.recipe import Recipe
from stillroom.run import run
from stillroom.task import load_model, make_task, sample_rows
from stillroom.tasks.pipelines import model as pipeline
from stillroom.tasks.pipelines.data import SHARD, PromptedData, encode_prompts
from stillroom.tasks.pipelines.task import pipeline_card
from tiny_pipelines import save_pipeline

TEXTS = ["a red cat", "the boat", "a photo of the house"]
FAST = ["engine.batch=2", "engine.steps=2", "engine.warmup=0", "engine.log_every=1", "evaluate.n=0"]


def png(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def as_folder(root: Path) -> Path:
    root.mkdir()
    for i, text in enumerate(TEXTS):
        (root / f"{i}.png").write_bytes(png(i))
        (root / f"{i}.txt").write_text(text)
    return root


def as_metadata(root: Path) -> Path:
    root.mkdir()
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(TEXTS)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(len(TEXTS)):
        (root / f"{i}.png").write_bytes(png(i))
    return root


def as_tars(root: Path) -> Path:
    """Two shards, the second compressed; captions as text and as JSON; a folder in the names."""
    root.mkdir()
    for shard, mode, rows in (("a.tar", "w", [0, 1]), ("b.tar.gz", "w:gz", [2])):
        with tarfile.open(root / shard, mode) as opened:
            for i in rows:
                caption = json.dumps({"caption": TEXTS[i]}) if i == 1 else TEXTS[i]
                parts = {"json" if i == 1 else "txt": caption.encode(), "png": png(i), "cls": b"7"}
                for ending, content in parts.items():
                    member = tarfile.TarInfo(f"part/{i}.{ending}")
                    member.size = len(content)
                    opened.addfile(member, io.BytesIO(content))
    return root


def as_parquet(root: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    root.mkdir()
    images = [{"bytes": png(i), "path": None} for i in range(len(TEXTS))]
    parquet.write_table(pyarrow.table({"image": images, "text": TEXTS}), root / "train-00000.parquet")
    return root


def as_metadata_parquet(root: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    root.mkdir()
    for i in range(len(TEXTS)):
        (root / f"{i}.png").write_bytes(png(i))
    names = [f"{i}.png" for i in range(len(TEXTS))]
    parquet.write_table(pyarrow.table({"file_name": names, "caption": TEXTS}), root / "metadata.parquet")
    return root


def as_dataset(root: Path) -> Path:
    """What datasets.save_to_disk writes: Arrow streams, and a state that names them."""
    pyarrow = pytest.importorskip("pyarrow")

    (root / "train").mkdir(parents=True)
    (root / "dataset_dict.json").write_text('{"splits": ["train"]}')
    names = []
    for shard, rows in enumerate(([0, 1], [2])):
        names.append(f"data-{shard:05d}-of-00002.arrow")
        images = [{"bytes": png(i), "path": None} for i in rows]
        table = pyarrow.table({"image": images, "prompt": [TEXTS[i] for i in rows]})
        with (
            pyarrow.OSFile(str(root / "train" / names[-1]), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]}
    (root / "train" / "state.json").write_text(json.dumps(state))
    (root / "train" / "dataset_info.json").write_text("{}")
    return root


@pytest.mark.parametrize("form", [as_folder, as_metadata, as_tars, as_parquet, as_metadata_parquet, as_dataset])
def test_every_form_gives_the_same_pictures_and_captions(form: Any, tmp_path: Path) -> None:
    source = prompt_source(str(form(tmp_path / "data")))
    assert source.pictures
    found = list(source)
    assert [text for text, _ in found] == TEXTS
    for i, (_, image) in enumerate(found):
        assert image is not None
        assert torch.equal(image, read_picture(png(i), "here"))
    assert list(source)[0][0] == TEXTS[0]  # noqa: RUF015 - it can be read again
    assert source.origin


def test_prompts_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in TEXTS))
    for name in ("a.txt", "b.jsonl"):
        source = prompt_source(str(tmp_path / name))
        assert list(source) == [(text, None) for text in TEXTS]
        assert not source.pictures
    assert len(list(prompt_source("scenes:5"))) == 5


def test_a_source_s_fingerprint_follows_its_files(tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "data")
    first = prompt_source(str(folder)).fingerprint
    assert prompt_source(str(folder)).fingerprint == first
    (folder / "0.txt").write_text("another caption")
    assert prompt_source(str(folder)).fingerprint != first


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prompts at .*one prompt per line"):
        prompt_source(str(tmp_path / "nothing"))
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(UserError, match="holds no prompts"):
        prompt_source(str(tmp_path / "a.png"))
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"broken\.tar"):
        list(prompt_source(str(tmp_path / "broken.tar")))
    for parts, named in (
        ({"png": png(0)}, "no caption"),
        ({"txt": b"a cat"}, "no image"),
        ({"png": b"no picture", "txt": b"a cat"}, "cannot be read"),
        ({"png": png(0), "json": b'{"title": "a cat"}'}, "it has: title"),
        ({"png": png(0), "json": b"{"}, "nor JSON"),
        ({"png": png(0), "txt": b"  "}, "empty"),
    ):
        with tarfile.open(tmp_path / "one.tar", "w") as opened:
            for ending, content in parts.items():
                member = tarfile.TarInfo(f"0.{ending}")
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
        with pytest.raises(UserError, match=f"one.tar, 0.*{named}"):
            list(prompt_source(str(tmp_path / "one.tar")))


def test_what_macos_adds_to_a_tar_is_passed_over_and_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        added = dict.fromkeys(("./._0.png", "./._0.txt", "__MACOSX/0.png", "./.DS_Store"), b"\x00\x05")
        for name, content in sorted({**added, "./0.png": png(0), "./0.txt": b"a cat"}.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    source = prompt_source(str(tmp_path / "a.tar"))
    assert [text for text, _ in source] == ["a cat"]
    assert source.origin.endswith(" (left out: 4 hidden)")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pyarrow.*stillroom\[data\]"):
        prompt_source(str(tmp_path))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"pyarrow.*stillroom\[data\]"):
        prompt_source(str(tmp_path))


def test_parquet_stays_in_its_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png(0))
    parquet.write_table(
        pyarrow.table({"file_name": ["../secret.png"], "caption": ["a cat"]}), tmp_path / "data" / "a.parquet"
    )
    with pytest.raises(UserError, match="outside the folder"):
        list(prompt_source(str(tmp_path / "data")))


def test_pictures_are_covered_and_cut_in_the_middle() -> None:
    image = torch.zeros(3, 4, 12)
    image[:, :, 4:8] = 1
    assert torch.equal(fitted(image, (4, 4)), torch.ones(3, 4, 4))
    assert fitted(torch.rand(3, 30, 20), (16, 8)).shape == (3, 16, 8)
    assert fitted(torch.rand(3, 5, 7), (16, 8)).shape == (3, 16, 8)


# --- encoding ---------------------------------------------------------------------------------------------------------
class Counting:
    """An encoder whose features say what was encoded: length and first letter. Texts have lengths of their own."""

    size = (8, 8)

    def __init__(self, large: float = 1.0) -> None:
        self.prompts: list[str] = []
        self.large = large

    def conditions(self, prompts: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.prompts += prompts
        longest = max([1, *map(len, prompts)])
        states = torch.zeros(len(prompts), longest, 2)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for i, text in enumerate(prompts):
            states[i, : len(text)] = self.large * len(text)
            mask[i, : len(text)] = True
        found = {"states": states, "mask": mask, "scale": torch.tensor([float(len(text)) for text in prompts])}
        null = {"states": torch.zeros(1, 2), "mask": torch.ones(1, dtype=torch.bool), "scale": torch.tensor(0.0)}
        return found, null

    def latents(self, images: Tensor) -> Tensor:
        return images.mean((2, 3), keepdim=True)


class Listed(PromptSource):
    def __init__(self, texts: list[str], pictures: bool = False) -> None:
        super().__init__([], "listed")
        self.texts, self.pictures = texts, pictures

    def __iter__(self):
        for i, text in enumerate(self.texts):
            yield text, torch.full((3, 8, 8), i / 1000) if self.pictures else None


def check(data: PromptedData, texts: list[str]) -> None:
    seen = []
    for step in range(4):
        batch = data.batch(seed=1, step=step, size=len(texts) // 4)
        cond = batch["cond"]
        assert cond["states"].shape[1:] == (max(map(len, texts)), 2)
        for i in range(len(cond["scale"])):
            length = int(cond["scale"][i])
            assert cond["mask"][i].sum() == length
            assert bool((cond["states"][i, length:] == 0).all())
            assert bool((cond["states"][i, :length] == length).all())
            seen.append(length)
        part = data.batch(seed=1, step=step, size=len(texts) // 4, rows=slice(1, 3))
        assert torch.equal(part["cond"]["states"], cond["states"][1:3])
    assert sorted(seen) == sorted(map(len, texts))


TWO_SHARDS = ["x" * (1 + i % 9) for i in range(SHARD)] + ["y" * (1 + i % 17) for i in range(SHARD // 2)]


def test_shards_of_several_lengths_make_one_batch(tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        data = encode_prompts(Listed(TWO_SHARDS), Counting(), cache, lambda _: None)
        assert data.n == len(TWO_SHARDS)
        assert data.null["states"].shape == (17, 2)
        assert data.null["mask"].sum() == 1
        check(data, TWO_SHARDS)


def test_what_is_cached_is_not_computed_again(tmp_path: Path) -> None:
    first = encode_prompts(Listed(TWO_SHARDS, True), Counting(), tmp_path / "c", lambda _: None)
    encoder = Counting()
    again = encode_prompts(Listed(TWO_SHARDS, True), encoder, tmp_path / "c", lambda _: None)
    assert encoder.prompts == []
    one, two = first.batch(0, 3, 16), again.batch(0, 3, 16)
    assert torch.equal(one["x"], two["x"])
    assert one["x"].shape == (16, 3, 1, 1)
    assert torch.equal(one["cond"]["states"], two["cond"]["states"])
    (tmp_path / "c" / "index.json").unlink()  # as an interrupted encoding leaves it
    (tmp_path / "c" / "000001.safetensors").unlink()
    encode_prompts(Listed(TWO_SHARDS, True), encoder, tmp_path / "c", lambda _: None)
    assert all(text.startswith("y") for text in encoder.prompts)


def test_features_beyond_half_precision_are_kept() -> None:
    data = encode_prompts(Listed(TWO_SHARDS), Counting(large=1e5), report=lambda _: None)
    states = data.batch(0, 0, 8)["cond"]["states"]
    assert bool(torch.isfinite(states).all())
    assert float(states.max()) > 1e5


def test_prompts_alone_have_no_images() -> None:
    batch = encode_prompts(Listed(TEXTS), Counting(), report=lambda _: None).batch(0, 0, 2)
    with pytest.raises(UserError, match="prompts alone"):
        batch["x"]
    with pytest.raises(KeyError):
        batch["other"]
    with pytest.raises(UserError, match="no prompts"):
        encode_prompts(Listed([]), Counting(), report=lambda _: None)


# --- runs -------------------------------------------------------------------------------------------------------------
def test_a_whole_run_on_captioned_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe in, a pipeline's folder with its card out; stillroom and diffusers draw the same from it."""
    import diffusers

    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "TEACHER_STEPS", 2)
    folder = save_pipeline("sd3", tmp_path / "teacher")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    data = as_folder(tmp_path / "images")
    recipe = Recipe.load(
        "dmd2", [*FAST, "options.t_init=1.0", "options.student_steps=2"], teacher=str(folder), data=str(data)
    )
    result = run(recipe, tmp_path / "run")
    student = tmp_path / "run" / "student"
    card = (student / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "teacher"
    assert front["pipeline_tag"] == "text-to-image"
    for said in ("arxiv.org/abs/2405.14867", "3 captioned images", "timesteps 1000, 500", "manual_seed", "apache-2.0",
                 "num_inference_steps=2", recipe.hash(), "steps: 2"):  # fmt: skip
        assert said in card, said
    # the very code of the card
    code = card.split("```python\n")[1].split("```")[0].replace('"dmd2/student"', repr(str(student)))
    code = code.replace('"run/student"', repr(str(student)))
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["image"].size == (16, 16)
    assert isinstance(space["pipeline"], diffusers.StableDiffusion3Pipeline)
    loaded = load_model(student)
    states = [one.denoiser.network.state_dict() for one in (loaded, result.student)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    # The weights are equal; modules in memory and those mapped from a file still differ in the last bit of a picture.
    torch.testing.assert_close(
        loaded.sample(TEXTS[:1], seed=3), result.student.sample(TEXTS[:1], seed=3), rtol=1e-5, atol=1e-5
    )
    found = sample_rows(loaded, [], TEXTS[:2], 3, 0)
    assert found.names == TEXTS[:2]
    assert found.images is not None
    assert found.images.shape == (2, 3, 3, 16, 16)
    with pytest.raises(UserError, match="captions, not classes"):
        sample_rows(loaded, ["1"], [], 3, 0)
    with pytest.raises(UserError, match="draws prompts"):
        sample_rows(loaded, [], [], 3, 0)


def test_a_lora_run_on_prompts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    folder = save_pipeline("sd", tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    recipe = Recipe.load(
        "sid-lsg", [*FAST, "lora={student: {rank: 2}}"], teacher=str(folder), data=str(tmp_path / "prompts.txt")
    )  # fmt: skip
    run(recipe, tmp_path / "run")
    student = tmp_path / "run" / "student"
    assert {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= {
        path.name for path in (student / "lora").iterdir()
    }
    card = (student / "README.md").read_text()
    assert "load_lora_weights" in card
    assert "licence-of-the-teacher" in card


def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    folder = save_pipeline("sd3", tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    for method, changes, named in (
        ("dmd2", ["options.t_init=1.0"], "prompts alone"),
        ("sim", ["options.t_init=0.8"], r"t_init=1\.0"),
    ):
        recipe = Recipe.load(method, [*FAST, *changes], teacher=str(folder), data=str(tmp_path / "prompts.txt"))
        with pytest.raises(UserError, match=named):
            run(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_task_follows_the_teacher(tmp_path: Path) -> None:
    from stillroom.tasks.class_images.task import ClassImages
    from stillroom.tasks.pipelines.task import Pipelines

    (tmp_path / "model_index.json").write_text("{}")
    assert isinstance(make_task("class-images", str(tmp_path)), Pipelines)
    assert isinstance(make_task("class-images", "fashion"), ClassImages)
    assert not isinstance(make_task("text-images", str(tmp_path)), Pipelines)
    assert isinstance(PromptList("scenes:3"), PromptSource)


def test_a_shard_on_disk_is_opened_once_however_many_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    rows = [torch.randn(SHARD, 3, 2), torch.randn(5, 3, 2)]
    paths: list[Any] = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path, tensor in zip(paths, rows, strict=True):
        save_file({"text/prompt": tensor, "latents": tensor.clone()}, path)
    opened: list[Path] = []
    plain = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, *more: opened.append(path) or plain(path, *more))
    data = PromptedData(paths, [str(i) for i in range(SHARD + 5)], {"prompt": torch.zeros(3, 2)}, "made")
    for step in range(3):
        batch = data.batch(0, step, 40, slice(0, 40))
        index = data._order.indices(0, step, 40)
        assert torch.equal(batch["cond"]["prompt"], torch.cat(rows)[index])
    assert sorted(opened) == paths
    copied = copy.deepcopy(data)
    assert torch.equal(copied.batch(0, 0, 4)["x"], data.batch(0, 0, 4)["x"])


def test_the_card_s_code_asks_by_name() -> None:
    """The first argument of Flux 2's pipelines is an image."""
    recipe = Recipe.load("swiftbrush", [], teacher="flux2", data="prompts.txt")
    about: dict[str, Any] = {
        "licence": "",
        "timesteps": [1000],
        "size": [16, 16],
        "arguments": {},
        "scheduler": "S",
        "random": False,
    }
    about |= {"family": "Flux 2", "lora": False, "reads_scale": False}
    calls = {"student": {"nfe": 1}, "teacher": {"nfe": 25}}
    card = pipeline_card(recipe, {"name": "x", "pipeline": about, **calls})
    assert "image = pipeline(prompt='a red cat', height=16" in "\n".join(card.use)
    assert "with another number of steps, or another guidance scale, it is another model." in card.before_scores[0]
    about["reads_scale"], result = True, {"name": "x", "pipeline": about, **calls}
    said = pipeline_card(recipe, {**result, "also": {"student, 2 steps": 2, "student, 4 steps": 4}}).before_scores[0]
    assert "its weights serve 2 or 4 steps too: with yet another number of steps it is another model. It reads" in said


# --- negative prompts -------------------------------------------------------------------------------------------------
def test_texts_are_taken_as_they_are_and_files_for_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a boat\n  two   boats\n")
    source = Texts(["red", str(tmp_path / "more.txt"), "blue cats"])
    assert [text for text, _ in source] == ["red", "a boat", "two boats", "blue cats"]
    assert source.fingerprint == Texts(source.texts).fingerprint != Texts(["red"]).fingerprint
    with pytest.raises(UserError, match="no texts were given"):
        Texts([])
    with pytest.raises(UserError, match="text 2: the caption is empty"):
        Texts(["red", " "])
    for missing in ("words.txt", "in/there.JSONL", "words.csv.gz"):  # and not as a text to be learnt
        with pytest.raises(UserError, match=f"text 2: there is no file {missing}"):
            Texts(["red", missing])
    assert Texts(["a sign that says menu.txt", "U.S. flag", "f.lux"]).texts[2] == "f.lux"


def test_conditions_of_chosen_prompts_are_read_by_their_numbers(tmp_path: Path) -> None:
    for cache in (None, tmp_path / "c"):
        data = encode_prompts(Listed(TWO_SHARDS, pictures=True), Counting(), cache, lambda _: None)
        rows = torch.tensor([SHARD, 0, SHARD, 3])
        found = data.conditions(rows)
        assert set(found) == {"states", "mask", "scale"}
        for place, row in enumerate(rows.tolist()):
            assert float(found["scale"][place]) == len(TWO_SHARDS[row])
