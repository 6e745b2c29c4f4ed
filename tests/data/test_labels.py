"""Names and order of classes, and which files of a folder are data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.data.captioned_folders import FolderTeacher
from stillroom.data.labels import in_order, label_text, matched, numbered, places, without_points
from stillroom.data.listing import left_out
from stillroom.data.prompt_sources import prompt_source
from stillroom.data.source import ArrayData, load_data
from stillroom.data.texts import load_texts
from stillroom.errors import UserError
from stillroom.recipe import Recipe
from stillroom.task import make_task
from tiny import CLASSES, make_data, make_teacher

TWELVE = [str(i) for i in range(12)]


def picture(file: Path, level: int = 7) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 6), level).save(file)
    return file


# --- order ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (TWELVE, TWELVE),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["1.5", "10", "2"], ["1.5", "2", "10"]),
        (["a10", "a9"], ["a10", "a9"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["True", "False"], ["False", "True"]),
        (["b", "a", "b"], ["a", "b"]),
        (["1" * 5000, "2"], ["1" * 5000, "2"]),
    ],
)
def test_numbers_are_in_order_of_value(names: list[str], wanted: list[str]) -> None:
    assert in_order(reversed(names)) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"), [(3, "3"), (3.0, "3"), (0.5, "0.5"), (True, "True"), (" pos ", "pos"), ("1.0", "1.0")]
)
def test_labels_of_every_type(value: Any, wanted: str) -> None:
    assert label_text(value, "here") == wanted


@pytest.mark.parametrize("value", [None, "", "  ", [1], {"a": 1}])
def test_what_is_no_label_is_named(value: Any) -> None:
    with pytest.raises(UserError, match=r"^here: the label is"):
        label_text(value, "here")


def test_points_of_whole_numbers_go() -> None:
    assert without_points(["1.0", "2.0", "10"]) == {"1.0": "1", "2.0": "2", "10": "10"}
    assert without_points(["0.5", "1.0"]) == {"0.5": "0.5", "1.0": "1.0"}
    assert without_points(["1.0", "v2"]) == {"1.0": "1.0", "v2": "v2"}


@pytest.mark.parametrize("write", ["csv", "jsonl", "float", "folder", "npz", "pictures", "metadata"])
def test_integer_labels_are_in_numeric_order_everywhere(tmp_path: Path, write: str) -> None:
    """0 to 11, of which the texts sort 0, 1, 10, 11, 2: label i is the number i."""
    where = tmp_path / "data"
    found: Any
    if write in ("csv", "jsonl", "float"):
        where = tmp_path / f"data.{'jsonl' if write == 'jsonl' else 'csv'}"
        rows = [{"text": f"w{k}", "label": float(k) if write == "float" else k} for k in range(12)]
        if write == "jsonl":
            where.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            where.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
        found = load_texts(where, "all")
    elif write == "folder":
        for k in range(12):
            (where / str(k)).mkdir(parents=True)
            (where / str(k) / "a.txt").write_text(f"w{k}")
        found = load_texts(where, "all")
    else:
        where.mkdir()
        for k in range(12) if write != "npz" else ():
            picture(where / (f"{k}/a.png" if write == "pictures" else f"{k:02}.png"), k)
        if write == "npz":
            images = np.stack([np.full((6, 6), k, np.uint8) for k in range(12)])
            np.savez(where / "train.npz", images=images, labels=np.array(TWELVE))
        if write == "metadata":
            lines = [json.dumps({"file_name": f"{k:02}.png", "label": k}) + "\n" for k in range(12)]
            (where / "metadata.jsonl").write_text("".join(lines))
        found = load_data(where, "all")
    assert found.classes == TWELVE
    numbers = [int(text[1:]) for text in found.texts] if hasattr(found, "texts") else found.array[:, 0, 0, 0].tolist()
    assert numbers == found.labels.tolist()


# --- of data and networks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mine", "theirs", "wanted"),
    [
        (["cat", "dog"], ["dog", "cat"], [1, 0]),
        (["Cat", "a dog"], ["a_dog, hound", "cat"], [1, 0]),
        (["cat", "dog"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_10", "LABEL_2"], ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_10"], [0, 1, 3, 2]),
        (["0", "1"], ["dog", "cat"], [0, 1]),
        (["1", "0"], ["0", "1"], [1, 0]),
        (["cat"], ["dog", "cat"], [1]),
        (["crane", "crane, bird"], ["crane", "crane, bird"], [0, 1]),
    ],
)
def test_classes_are_matched_by_name(mine: list[str], theirs: list[str], wanted: list[int]) -> None:
    assert places(mine, theirs, "the classes of x") == wanted


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (["cat", "cow"], ["cat", "dog"], r"class 'cow' of the data is none of the classes of x.*those names are 'cat'"),
        (["cat", "CAT"], ["cat", "dog"], r"class 'CAT' .* as another one is, one of the classes of x"),
        (["cow", "crane"], ["crane, bird", "crane, lift", "cow"], r"class 'crane' of the data is several of"),
        (["1", "2"], ["cat", "dog"], r"class '1' of the data is none"),
    ],
)
def test_classes_that_a_network_does_not_have_are_named(mine: list[str], theirs: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        places(mine, theirs, "the classes of x")


def test_names_stay_the_data_s_where_it_has_some() -> None:
    assert matched(["Cat", "Dog"], ["dog, hound", "cat"], "x") == ([1, 0], ["Dog", "Cat"])
    assert matched(["0", "1"], ["dog", "cat"], "x") == ([0, 1], ["dog", "cat"])
    assert matched(["b", "c"], ["LABEL_0", "LABEL_1"], "x") == ([0, 1], ["b", "c"])


@pytest.mark.parametrize(
    ("mine", "wanted"),
    [
        (["0", "2"], ["0", "1", "2", "3"]),
        (["00", "03"], ["00", "1", "2", "03"]),
        (["1", "2", "3", "4"], []),
        (["1", "01"], []),
        (["0", "cat"], []),
        ([], []),
    ],
)
def test_outputs_without_names_are_called_by_number(mine: list[str], wanted: list[str]) -> None:
    assert numbered(mine, 4) == wanted


def test_data_in_a_network_s_order() -> None:
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
    data = ArrayData(images, {"label": torch.tensor([0, 1, 2, 0])}, ["a", "b", "c"], parts={})
    data.parts["heldout"] = data.take(torch.tensor([1]))
    assert data.fingerprint
    turned = data.by_names(["c", "a", "b"], "x")
    assert (turned.classes, turned.labels.tolist()) == (["c", "a", "b"], [1, 2, 0, 1])
    assert turned.parts["heldout"].labels.tolist() == [2]
    assert (data.classes, data.labels.tolist()) == (["a", "b", "c"], [0, 1, 2, 0])
    assert turned.fingerprint != data.fingerprint
    assert data.by_names(["A", "B", "C"], "x") is data


def test_data_follow_the_order_of_a_teacher_that_draws_classes(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    with np.load(make_data(tmp_path / "data") / "train.npz") as stored:
        arrays = dict(stored)
    turned = {"classes": arrays["classes"][[2, 0, 1]], "labels": (arrays["labels"] + 1) % 3}
    np.savez(tmp_path / "turned.npz", **{**arrays, **turned})
    np.savez(tmp_path / "strange.npz", **{**arrays, "classes": np.array(["bar", "cross", "square"])})

    def loaded(name: str) -> ArrayData:
        task: Any = make_task("class-images", str(tmp_path / "teacher"))
        task.load(Recipe.load("dmd2", teacher=str(tmp_path / "teacher"), data=str(tmp_path / name)))
        return task.data

    every = load_data(tmp_path / "turned.npz", "train")
    known = {image.numpy().tobytes(): every.classes[i] for image, i in zip(every.array, every.labels.tolist())}
    data = loaded("turned.npz")
    assert data.classes == list(CLASSES)
    assert [known[image.numpy().tobytes()] for image in data.array] == [data.classes[i] for i in data.labels.tolist()]
    assert loaded("data").classes == list(CLASSES)
    with pytest.raises(UserError, match=r"class 'square' of the data is none of the classes of teacher '.*teacher'"):
        loaded("strange.npz")


# --- which files ------------------------------------------------------------------------------------------------------
def junk(folder: Path) -> None:
    for name in ("._0.png", ".DS_Store", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/._0.png", "Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    read = [picture(tmp_path / "a" / "0.png")]
    assert left_out(tmp_path, read) == ""
    (tmp_path / "a" / "1.heic").write_bytes(b"x")
    assert left_out(tmp_path, read) == " (left out: 1 file: 1 .heic)"
    junk(tmp_path / "a")
    picture(tmp_path / "val" / "0.png")
    (tmp_path / "LICENSE").write_text("x")
    assert left_out(tmp_path, read) == " (left out: 8 files: 5 hidden, 1 LICENSE, 1 .heic, 1 in val/)"


def test_folders_of_classes_without_what_systems_add(tmp_path: Path) -> None:
    for name in "ab":
        for i in range(5):
            picture(tmp_path / name / f"{i}.png")
        junk(tmp_path / name)
    junk(tmp_path)
    picture(tmp_path / "a" / "more" / "5.png")
    data = load_data(tmp_path)
    assert (data.classes, data.n) == (["a", "b"], 8)
    assert data.origin.endswith(
        f"({tmp_path} (left out: 16 files: 15 hidden, 1 .png), every fifth image of each class held out as test)"
    )


def test_pictures_of_all_formats_are_read(tmp_path: Path) -> None:
    for suffix in (".png", ".bmp", ".tif", ".tiff", ".JPG", ".jpeg", ".Png"):
        picture(tmp_path / "a" / f"x{suffix}")
    data = load_data(tmp_path, "all")
    assert data.n == 7
    assert "left out" not in data.origin


def test_texts_in_folders_without_what_systems_add(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.txt").write_text("words")
        (tmp_path / name / "._0.txt").write_bytes(b"\0\5\x16\7\xff")
        (tmp_path / name / ".ipynb_checkpoints").mkdir()
        (tmp_path / name / ".ipynb_checkpoints" / "0-checkpoint.txt").write_text("words")
        (tmp_path / name / "0.pdf").write_bytes(b"%PDF")
    found = load_texts(tmp_path, "all")
    assert found.n == 2
    assert found.origin.endswith("2 all texts (left out: 6 files: 4 hidden, 2 .pdf)")
    (tmp_path / "a" / "1.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"1\.txt is empty"):
        load_texts(tmp_path, "all")


def test_a_test_split_alone_is_no_class(tmp_path: Path) -> None:
    picture(tmp_path / "test" / "a" / "0.png")
    with pytest.raises(UserError, match="has a test split only"):
        load_data(tmp_path)


# --- tables of pictures -----------------------------------------------------------------------------------------------
def rows(file: Path, *pairs: tuple[str, Any], key: str = "label") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"file_name": name, key: value}) + "\n" for name, value in pairs))


@pytest.mark.parametrize("where", ["", "train/"])
def test_labels_of_a_table_in_or_above_the_splits(tmp_path: Path, where: str) -> None:
    for split, count in (("train", 3), ("test", 2)):
        names = [f"{split}/{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            picture(tmp_path / name, 10 * i)
        if where:
            rows(tmp_path / split / "metadata.jsonl", *((f"{i}.png", "ba"[i % 2]) for i in range(count)))
    if not where:
        both = [(f"{split}/{i}.png", "ba"[i % 2]) for split, count in (("train", 3), ("test", 2)) for i in range(count)]
        rows(tmp_path / "metadata.jsonl", *both)
    train, test = load_data(tmp_path), load_data(tmp_path, "test")
    assert (train.classes, train.labels.tolist(), train.array[:, 0, 0, 0].tolist()) == (
        ["a", "b"],
        [1, 0, 1],
        [0, 10, 20],
    )
    assert test.labels.tolist() == [1, 0]
    assert "left out" not in train.origin


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "../x.png", "label": "a"}, r"metadata\.jsonl:1: \.\./x\.png lies outside"),
        ({"file_name": "x.png", "label": "a"}, r"metadata\.jsonl:1: there is no image"),
        ({"label": "a"}, r"metadata\.jsonl:1: file_name is missing"),
        ({"file_name": "0.png", "label": None}, r"metadata\.jsonl:1: the label is empty"),
    ],
)
def test_bad_rows_of_a_table_of_pictures(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        load_data(tmp_path, "all")


@pytest.mark.parametrize("where", ["metadata.jsonl", "train/metadata.jsonl"])
def test_captions_of_a_table_in_or_above_train(tmp_path: Path, where: str) -> None:
    """Those of other splits are left out, and counted."""
    for name in ("train/0.png", "train/1.png", "test/0.png"):
        picture(tmp_path / name)
    above = where == "metadata.jsonl"
    home = "train/" if above else ""
    rows(tmp_path / where, (f"{home}0.png", "a cat"), (f"{home}1.png", "a dog"), key="caption")
    junk(tmp_path / "train")
    source = prompt_source(str(tmp_path))
    assert [text for text, _ in source] == ["a cat", "a dog"]
    assert source.origin.endswith(" (left out: 6 files: 5 hidden, 1 in test/)")


def test_captions_beside_and_in_tables_below(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "0.png")
    rows(tmp_path / "a" / "metadata.jsonl", ("0.png", "a cat"), key="text")
    picture(tmp_path / "b" / "0.png")
    (tmp_path / "b" / "0.caption").write_text("a dog")
    junk(tmp_path / "b")
    picture(tmp_path / "c" / "0.PNG")
    (tmp_path / "c" / "0.TXT").write_text("a cow")
    assert FolderTeacher(tmp_path).captions == ["a cat", "a dog", "a cow"]
    picture(tmp_path / "b" / "1.png")
    with pytest.raises(UserError, match=r"1\.png has no caption; write one into 1\.txt"):
        FolderTeacher(tmp_path)


def test_pictures_that_the_table_does_not_name_are_counted(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    rows(tmp_path / "metadata.jsonl", ("0.png", "a cat"), key="text")
    assert FolderTeacher(tmp_path).left_out == " (left out: 2 files: 2 .png)"
