"""Random recipes and damaged folders: accepted, or refused with a reason; never a traceback, never something written.

The default run takes a part of the cases, ``pytest -m slow tests/test_fuzz.py`` all: 10,000 recipes, 1,000 folders.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom import cli
from stillroom.data.captioned_folders import read_captions
from stillroom.data.source import load_data
from stillroom.data.store import read_store
from stillroom.engine.checkpoint import Checkpoints
from stillroom.errors import UserError
from stillroom.recipe import SHIPPED, Recipe
from stillroom.tasks.class_images.model import ImageGenerator
from tiny import FAST, make_data, make_teacher
from workers.draw import FEW_CAPTIONS, Samplewise

RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(SHIPPED.glob("*.yaml"))}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**30, -(10**30), 0.0, -0.5, 1e-300, 1e308, float("inf"), float("nan"), "", "x",
    "0", "1e3", "inf", "..", "/", "dmd2", "é" * 50, "a" * 5000, "\0", "null", [], [0], ["x", None], [[1, 2], [3]], {},
    {"x": 1}, {"law": "uniform"}, {"low": "x"}, {1: 2}, {None: None}, [{}],
)  # fmt: skip


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below ``tree``."""
    if isinstance(tree, dict):
        return [path for key, value in tree.items() for path in ((*at, key), *places(value, (*at, key)))]
    if isinstance(tree, list):
        return [path for i, value in enumerate(tree) for path in ((*at, i), *places(value, (*at, i)))]
    return []


def mutate(tree: Any, rng: random.Random) -> None:
    """One change in place: a value replaced, removed, moved from elsewhere, or one too many."""
    path = rng.choice(places(tree))
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    how = rng.randrange(4)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "steps", "lr", "seed", "", 7, None, str(path[-1]) + "s"])] = copy.deepcopy(
            rng.choice(VALUES)
        )
    elif how == 2:
        value: Any = tree
        for key in rng.choice(places(tree)):
            value = value[key]
        parent[path[-1]] = copy.deepcopy(value)
    else:
        parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))


def damaged_text(text: str, rng: random.Random) -> str:
    """Some characters of ``text`` replaced, doubled or left out."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        piece = rng.choice(
            ["", ":", "\t", "[", "{", "- ", "!!python/object:os.system ", "&a *a", "\x00", "'", "\n", "~", "9"]
        )
        text = text[:at] + piece + text[at + rng.randint(0, 3) :]
        text = text or ":"
    return text


def one_line(error: UserError) -> None:
    if "\n" in str(error):
        raise ValueError(f"more than one line: {error}")


def try_recipes(numbers: range, folder: Path) -> tuple[int, int]:
    """How many were accepted and refused; whatever else is raised comes out."""
    accepted = 0
    for number in numbers:
        rng = random.Random(number)
        tree = copy.deepcopy(RECIPES[rng.choice(list(RECIPES))])
        for _ in range(rng.randint(1, 4)):
            if places(tree):
                mutate(tree, rng)
        try:
            if number % 5:
                Recipe.from_dict(tree).to_yaml()
            else:
                file = folder / "recipe.yaml"
                file.write_text(damaged_text(yaml.safe_dump(tree, allow_unicode=True), rng), encoding="utf-8")
                Recipe.load(file)
            accepted += 1
        except UserError as error:
            one_line(error)
        except Exception as error:
            raise AssertionError(f"recipe {number}: {tree}") from error
    return accepted, len(numbers) - accepted


def test_random_recipes(tmp_path: Path) -> None:
    accepted, refused = try_recipes(range(400), tmp_path)
    assert accepted > 15, "the mutations are too harsh to say anything"
    assert refused > 100, "the mutations are too mild to say anything"


@pytest.mark.slow
def test_ten_thousand_recipes(tmp_path: Path) -> None:
    assert min(try_recipes(range(10_000), tmp_path)) > 500


def test_what_is_accepted_is_the_same_when_read_again(tmp_path: Path) -> None:
    kept = 0
    for number in range(100):
        rng = random.Random(-1 - number)
        tree = copy.deepcopy(RECIPES[rng.choice(list(RECIPES))])
        mutate(tree, rng)
        try:
            recipe = Recipe.from_dict(tree)
        except UserError:
            continue
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert Recipe.load(tmp_path / "again.yaml").hash() == recipe.hash()
        kept += 1
    assert kept > 15


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good folder of every kind that is read."""
    from stillroom.synthesis import synthesize

    folder = tmp_path_factory.mktemp("whole")
    make_teacher(folder / "model")
    make_data(folder / "arrays")
    place = folder / "pictures"
    images = load_data(folder / "arrays", "train")
    from PIL import Image

    for i in range(6):
        home = place / images.classes[i % 3]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((images.images(slice(i, i + 1))[0, 0] + 1) * 127.5).round().byte().numpy()).save(
            home / f"{i}.png"
        )
    synthesize({"t": Samplewise()}, FEW_CAPTIONS, folder / "store", repeats="redraw", shard_size=6, progress=False)
    (folder / "captions").mkdir()
    (folder / "captions" / "metadata.jsonl").write_text('{"text": "a red three"}\n{"caption": "two blue fours"}\n')
    arguments = ["run", "dmd2", "--teacher", str(folder / "model"), "--data", str(folder / "arrays"), "--name", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*arguments, "--steps", "2", *FAST]) == 0
    shutil.copytree(folder / "runs" / "run" / "checkpoints", folder / "checkpoints")
    shutil.rmtree(folder / "runs")
    return folder


READERS: dict[str, Callable[[Path], Any]] = {
    "model": ImageGenerator.load,
    "arrays": lambda folder: load_data(folder, "train").images(slice(2)),
    "pictures": lambda folder: load_data(folder, "train").images(slice(2)),
    "store": lambda folder: read_store(folder, report=str),
    "captions": lambda folder: read_captions(folder / "metadata.jsonl"),
    "checkpoints": lambda folder: Checkpoints(folder).newest(),
}


def damage(folder: Path, rng: random.Random) -> str:
    """One file of ``folder`` cut, flipped, emptied, exchanged, removed or made a folder; JSON also changed inside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    ways = ["cut", "flip", "empty", "noise", "exchange", "remove", "folder", "extra"]
    how = rng.choice(ways + ["json"] * 4 if file.suffix in (".json", ".jsonl") else ways)
    if how == "cut":
        file.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif how == "flip" and data:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "noise":
        file.write_bytes(rng.randbytes(rng.randint(1, 4000)))
    elif how == "exchange":
        file.write_bytes(rng.choice(files).read_bytes())
    elif how == "remove":
        file.unlink()
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "extra":
        (file.parent / rng.choice(["x.png", "train.npz", "model.json", "step-9999999", "a\nb"])).write_bytes(data)
    elif how == "json":
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        trees = [json.loads(line) for line in lines]
        for tree in trees:
            if places(tree):
                mutate(tree, rng)
        file.write_text("\n".join(json.dumps(tree, default=str, skipkeys=True) for tree in trees))
    return f"{how} {file.name}"


def try_folders(numbers: range, whole: Path, aside: Path) -> dict[str, int]:
    """How many of each kind were refused. Reading must change nothing either."""
    refused = dict.fromkeys(READERS, 0)
    for number in numbers:
        rng = random.Random(number)
        kind = list(READERS)[number % len(READERS)]
        folder = Path(shutil.copytree(whole / kind, aside / kind))
        what = damage(folder, rng)
        before = sorted(str(path) for path in folder.rglob("*"))
        try:
            READERS[kind](folder)
        except UserError as error:
            one_line(error)
            refused[kind] += 1
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {what}") from error
        assert sorted(str(path) for path in folder.rglob("*")) == before, what
        shutil.rmtree(folder)
    return refused


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders(whole: Path, tmp_path: Path) -> None:
    refused = try_folders(range(120), whole, tmp_path)
    assert all(count >= 3 for count in refused.values()), refused


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_damaged_folders(whole: Path, tmp_path: Path) -> None:
    refused = try_folders(range(1_000), whole, tmp_path)
    assert all(count >= 20 for count in refused.values()), refused


def test_a_command_on_a_damaged_folder_leaves_nothing_behind(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = 0
    for number in range(24):
        rng = random.Random(f"command {number}")
        for kind in ("model", "arrays"):
            shutil.copytree(whole / kind, tmp_path / kind)
        what = damage(tmp_path / ("model", "arrays")[number % 2], rng)
        code = cli.main(["run", "dmd2", "--teacher", "model", "--data", "arrays", "--steps", "1", *FAST])
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out, what
        assert code in (0, 2, 3), (what, code, said.err)
        if code == 2:
            refused += 1
            assert not (tmp_path / "runs").exists(), what
            assert said.err.startswith("stillroom: "), what
        for name in ("model", "arrays", "runs"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert refused >= 8
