"""Random recipes and damaged folders: accepted, or refused with a reason; never a traceback, never something written.

The default run takes a part of the cases, ``pytest -m slow tests/test_fuzz.py`` all: 10,000 recipes, 1,500 folders,
3,000 pictures, 10,000 tables.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stillroom import cli
from stillroom.data.captioned_folders import read_captions
from stillroom.data.pictures import SUFFIXES, levels
from stillroom.data.prompt_sources import prompt_source
from stillroom.data.source import load_data
from stillroom.data.store import read_store
from stillroom.data.tables import rows
from stillroom.data.texts import load_texts
from stillroom.diffusion.process import VP, process_from_dict
from stillroom.engine.checkpoint import Checkpoints
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import process_from_scheduler
from stillroom.recipe import SHIPPED, Recipe
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.pipelines.model import PipelineGenerator
from tiny import FAST, make_data, make_teacher
from tiny_pipelines import save_pipeline
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


SPELLINGS = (
    "010", "0o17", "0x1F", "1e-4", "1E3", "1_000", "+5", "-0", ".5", "5.", "1:30", "on", "Off", "yes", "n", "TRUE",
    "Null", "~", "", "2026-11-29", ".INF", ".nan", "!!int 010", "!!float 3", "!!str 4", "!!timestamp 2020-01-01",
    "!!binary aGk=", "!!set {a, b}", "|\n    4", ">\n    4", "'4'", '"4\\n"', "4 # four", "[4", "{a: 4}", "<<", "=",
)  # fmt: skip


def spelled(text: str, rng: random.Random) -> str:
    """A YAML text, some of whose values are written in another way."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([i for i, line in enumerate(lines) if ": " in line])
        lines[at] = f"{lines[at].split(': ')[0]}: {rng.choice(SPELLINGS)}"
    return "\n".join(lines) + "\n"


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
                change = spelled if number % 2 else damaged_text
                file.write_text(change(yaml.safe_dump(tree, allow_unicode=True), rng), encoding="utf-8")
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


# --- pictures ---------------------------------------------------------------------------------------------------------
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
KINDS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def random_picture(rng: random.Random) -> tuple[str, bytes, tuple[int, int], int]:
    """A file's name, its content, (height, width) as it is stored, and how many channels it is read with: 1 where the
    mode is grey and the format keeps that, 3 for colours, 0 for either."""
    noise = np.random.default_rng(rng.randrange(2**31))
    while True:
        mode, kind, height, width = rng.choice(MODES), rng.choice(list(KINDS)), rng.randint(1, 9), rng.randint(1, 9)
        more: dict[str, Any] = {}
        if rng.random() < 0.7 and kind in ("PNG", "JPEG", "WEBP", "TIFF"):
            exif = Image.Exif()
            exif[0x0112] = rng.randint(0, 9)
            more["exif"] = exif.tobytes() if rng.random() < 0.9 else b"Exif\0\0" + rng.randbytes(rng.randint(0, 40))
        if rng.random() < 0.3 and kind != "BMP":
            more["icc_profile"] = rng.randbytes(rng.randint(0, 300))
        if rng.random() < 0.3 and mode in ("1", "L", "P", "RGB") and kind in ("PNG", "GIF"):
            more["transparency"] = (1, 2, 3) if mode == "RGB" else 1
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if mode == "I;16":
            picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        else:
            picture = Image.fromarray(pixels).convert("L" if mode == "LA" else mode).convert(mode)
        if rng.random() < 0.2 and kind in ("PNG", "WEBP", "GIF", "TIFF"):
            more |= {"save_all": True, "append_images": [picture.copy()]}
        buffer = io.BytesIO()
        try:
            picture.save(buffer, kind, **more)
        except Exception:  # the format has no such mode, or Pillow does not write such EXIF
            continue
        grey = mode in ("1", "L", "LA", "I;16") and kind in ("PNG", "TIFF", "JPEG")
        channels = 1 if grey else 3 if mode in ("RGB", "RGBA", "CMYK") else 0
        return f"x{KINDS[kind]}", buffer.getvalue(), (height, width), channels


def try_pictures(numbers: range) -> int:
    """Whole ones are read, cut and changed ones refused or read. How many were refused of the latter."""
    refused = 0
    for number in numbers:
        rng = random.Random(number)
        name, content, size, channels = random_picture(rng)
        try:
            found = levels(io.BytesIO(content), name)
            assert found.dtype == np.uint8
            assert len(found) == channels or (channels == 0 and len(found) in (1, 3))
            assert sorted(found.shape[1:]) == sorted(size)
        except UserError as error:
            one_line(error)
            if "32 bits" not in str(error):
                raise AssertionError(f"picture {number}") from error
        except Exception as error:
            raise AssertionError(f"picture {number}") from error
        data = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            levels(io.BytesIO(bytes(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])), name)
        except UserError as error:
            one_line(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"picture {number}, damaged") from error
    return refused


@pytest.mark.filterwarnings("ignore")
def test_random_pictures() -> None:
    assert try_pictures(range(300)) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_three_thousand_pictures() -> None:
    assert try_pictures(range(3_000)) > 1_000


# --- tables -----------------------------------------------------------------------------------------------------------
PIECES = (
    "a",
    "red cat",
    " ",
    ",",
    ";",
    "\t",
    "|",
    '"',
    "\n",
    "\r\n",
    "\u2028",
    "\u0085",
    "é",
    "😀",
    "'",
    "\\",
    "=1",
    "#",
    "0",
)


def random_table(rng: random.Random) -> tuple[str, bytes, list[tuple[str, str]]]:
    """A file's name, its content in some dialect, and the rows that it holds."""

    def word(least: int) -> str:
        return "w" * least + "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 6)))

    pairs = [(word(1), rng.choice(["pos", "neg", "a, b", "1", "2.0"])) for _ in range(rng.randint(1, 8))]
    kind, packed = rng.choice([".csv", ".csv", ".tsv", ".jsonl"]), rng.random() < 0.2
    end = rng.choice(["\n", "\r\n"])
    if kind == ".jsonl":
        ascii_only = rng.random() < 0.5
        text = "".join(json.dumps({"text": t, "label": b}, ensure_ascii=ascii_only) + end for t, b in pairs)
        text += rng.choice(["", end, end + " " + end])
    else:
        file = io.StringIO(newline="")
        delimiter = rng.choice(",;\t|")
        writer = csv.writer(
            file, delimiter=delimiter, lineterminator=end, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        )
        columns = ["text", "label"] + ["more"] * rng.randint(0, 1)
        writer.writerow(columns)
        writer.writerows([*pair, "x"][: len(columns)] for pair in pairs)
        text = file.getvalue() + rng.choice(["", end, delimiter * (len(columns) - 1) + end])
    content = text.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"]))
    return f"x{kind}{'.gz' * packed}", gzip.compress(content) if packed else content, pairs


def try_tables(numbers: range, folder: Path) -> int:
    """Whole ones give their rows, changed ones some or a refusal. How many were refused."""
    refused = 0
    for number in numbers:
        rng = random.Random(number)
        name, content, pairs = random_table(rng)
        (folder / name).write_bytes(content)
        found = [(row["text"], row["label"]) for _, row in rows(folder / name, ("text", "label"), "{}")]
        assert found == pairs, number
        data = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b'",;\t\n{}[]:\0\xff\xfe=x')
        (folder / name).write_bytes(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])
        for read in (lambda file: load_texts(file, "all"), read_captions):
            try:
                read(folder / name)
            except UserError as error:
                one_line(error)
                refused += 1
            except Exception as error:
                raise AssertionError(f"table {number}") from error
        (folder / name).unlink()
    return refused


def test_random_tables(tmp_path: Path) -> None:
    assert try_tables(range(400), tmp_path) > 100


@pytest.mark.slow
def test_ten_thousand_tables(tmp_path: Path) -> None:
    assert try_tables(range(10_000), tmp_path) > 3_000


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good folder of every kind that is read."""
    from stillroom.synthesis import synthesize

    folder = tmp_path_factory.mktemp("whole")
    make_teacher(folder / "model")
    save_pipeline("sd", folder / "pipeline")
    make_data(folder / "arrays")
    place = folder / "pictures"
    images = load_data(folder / "arrays", "train")
    for i in range(6):
        home = place / images.classes[i % 3]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((images.images(slice(i, i + 1))[0, 0] + 1) * 127.5).round().byte().numpy()).save(
            home / f"{i}.png"
        )
    synthesize({"t": Samplewise()}, FEW_CAPTIONS, folder / "store", repeats="redraw", shard_size=6, progress=False)
    (folder / "captions").mkdir()
    (folder / "captions" / "metadata.jsonl").write_text('{"text": "a red three"}\n{"caption": "two blue fours"}\n')
    make_modes(folder / "modes")
    make_tables(folder / "tables")
    make_captioned(folder / "captioned")
    arguments = ["run", "dmd2", "--teacher", str(folder / "model"), "--data", str(folder / "arrays"), "--name", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*arguments, "--steps", "2", *FAST]) == 0
    shutil.copytree(folder / "runs" / "run" / "checkpoints", folder / "checkpoints")
    shutil.rmtree(folder / "runs")
    return folder


def make_modes(folder: Path) -> None:
    """Pictures of every format and mode, with EXIF, profiles, frames."""
    folder.mkdir()
    for number in range(40):
        name, content = random_picture(random.Random(number))[:2]
        (folder / f"{number:02}{Path(name).suffix}").write_bytes(content)


def make_tables(folder: Path) -> None:
    """Tables of every dialect."""
    folder.mkdir()
    for number in range(12):
        name, content, _ = random_table(random.Random(number))
        (folder / f"{number:02}-{name}").write_bytes(content)


def make_captioned(folder: Path) -> None:
    """Captions beside pictures, in a table, and in a tar."""
    for name in ("beside/0.png", "listed/0.png"):
        (folder / name).parent.mkdir(parents=True)
        Image.new("RGB", (6, 6)).save(folder / name)
    (folder / "beside" / "0.txt").write_text("a cat")
    (folder / "listed" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dog"}\n')
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in ("0.png", "0.txt"):
            tar.add(folder / "beside" / name, name)


def read_tables(folder: Path) -> None:
    """Each table by both of its readers; what one refuses the other may still read."""
    refused = []
    for file in sorted(folder.iterdir()):
        for read in (lambda file: load_texts(file, "all"), read_captions):
            try:
                read(file)
            except UserError as error:
                one_line(error)
                refused.append(error)
    if refused:
        raise refused[0]


def read_modes(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES:
            levels(file, str(file))


def read_captioned(folder: Path) -> None:
    for place in (folder / "beside", folder / "listed", folder / "a.tar"):
        list(prompt_source(str(place)))


READERS: dict[str, Callable[[Path], Any]] = {
    "model": ImageGenerator.load,
    "pipeline": PipelineGenerator.load,
    "arrays": lambda folder: load_data(folder, "train").images(slice(2)),
    "pictures": lambda folder: load_data(folder, "train").images(slice(2)),
    "store": lambda folder: read_store(folder, report=str),
    "captions": lambda folder: read_captions(folder / "metadata.jsonl"),
    "checkpoints": lambda folder: Checkpoints(folder).newest(),
    "modes": read_modes,
    "tables": read_tables,
    "captioned": read_captioned,
}


def damage(folder: Path, rng: random.Random) -> str:
    """One file of ``folder`` cut, flipped, emptied, exchanged, removed or made a folder; JSON also changed inside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    ways = ["cut", "flip", "empty", "noise", "exchange", "remove", "folder", "extra"]
    text = file.suffix in (".json", ".jsonl") and data[:2] != b"\xff\xfe"
    how = rng.choice(ways + ["json"] * 4 if text else ways)
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
        whole = file.read_text(encoding="utf-8-sig")
        trees = [
            json.loads(line) for line in (whole.split("\n") if file.suffix == ".jsonl" else [whole]) if line.strip()
        ]
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
    refused = try_folders(range(180), whole, tmp_path)
    assert all(count >= 3 for count in refused.values()), refused


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fifteen_hundred_damaged_folders(whole: Path, tmp_path: Path) -> None:
    refused = try_folders(range(1_500), whole, tmp_path)
    assert all(count >= 20 for count in refused.values()), refused


# --- schedulers and types of numbers ----------------------------------------------------------------------------------
FIELDS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 1, 2, 3, 0, -1, 10.0, "10", None), "beta_start": (1e-4, 0, -1, 2.0, "x"),
    "beta_end": (0.02, 0, 1.0, 1.5, None), "trained_betas": (None, [], [0.1], [0.1, 0.2, 0.3], [0.2, 1.0], [0.1, "x"]),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", 3),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction", "trigflow", "", 1, None),
    "rescale_betas_zero_snr": (True, False, "yes", None), "use_flow_sigmas": (True, False), "shift": (3.0, 0, -1, "x"),
    "flow_shift": (3.0, 0, -1, "x", None), "use_dynamic_shifting": (True, False), "invert_sigmas": (True, False),
    "timestep_spacing": ("leading", "trailing", "linspace", "x"), "sigma_max": (80.0, 0, -1, "x"),
    "timestep_type": ("discrete", "continuous"), "predict_epsilon": (True, False), "final_sigmas_type": ("zero", "x"),
    "use_karras_sigmas": (True, False), "_diffusers_version": ("0.6.0", "9.9", 3), "written_elsewhere": ([], {"x": 1}),
    "_class_name": (None, 3, ["a", "b"], "UNet2DModel", "AutoencoderKL", "NoSuchScheduler", "SchedulerMixin"),
}  # fmt: skip


def try_schedulers(numbers: range) -> tuple[int, int]:
    """How many were accepted and refused. What is accepted has the noise rates that its class computes itself."""
    import diffusers

    classes = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
    accepted = 0
    for number in numbers:
        rng = random.Random(f"scheduler {number}")
        config: dict[str, Any] = {"_class_name": rng.choice(classes)}
        for field in rng.sample(list(FIELDS), rng.randint(0, 4)):
            config[field] = rng.choice(FIELDS[field])
        try:
            process, kind = process_from_scheduler(dict(config))
        except UserError as error:
            one_line(error)
            continue
        except Exception as error:
            raise AssertionError(f"scheduler {number}: {config}") from error
        accepted += 1
        assert kind in ("eps", "v", "x0", "edm"), config
        assert process_from_dict(process.to_dict()) == process, config
        times = torch.linspace(0, process.t_max, 50, dtype=torch.float64)
        ratio = process.alpha(times) / torch.hypot(process.alpha(times), process.sigma(times))
        assert bool(torch.isfinite(ratio).all()), config
        assert bool((ratio.diff() <= 0).all()), config
        if isinstance(process, VP):
            cls = getattr(diffusers, config["_class_name"])
            given = {key: value for key, value in config.items() if key != "_class_name"}
            theirs = cls.from_config(given).alphas_cumprod.double()
            ours = process.alpha(torch.arange(process.steps, dtype=torch.float64)) ** 2
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6, msg=str(config))
            assert not process.zero_snr or kind != "eps", config
    return accepted, len(numbers) - accepted


@pytest.mark.filterwarnings("ignore")
def test_random_schedulers() -> None:
    assert min(try_schedulers(range(150))) > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_five_thousand_random_schedulers() -> None:
    assert min(try_schedulers(range(5_000))) > 500


TYPES: tuple[Any, ...] = (
    "float16", "bfloat16", "torch.float16", "float64", "auto", "float99", "int8", "", 16, None, [], {"x": "float16"},
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_types_in_configs_change_nothing(whole: Path, tmp_path: Path) -> None:
    """Whatever type a part's config names, weights are read in float32 and are the same, or the config is refused."""
    first = dict(PipelineGenerator.load(whole / "pipeline").pipeline.text_encoder.named_parameters())
    folder = Path(shutil.copytree(whole / "pipeline", tmp_path / "pipeline"))
    read = 0
    for value in TYPES:
        for part in ("text_encoder", "unet", "vae"):
            config = json.loads((whole / "pipeline" / part / "config.json").read_text())
            said = {"torch_dtype": value} | ({"dtype": value} if part == "text_encoder" else {})
            (folder / part / "config.json").write_text(json.dumps(config | said))
        try:
            again = PipelineGenerator.load(folder)
        except UserError as error:
            one_line(error)
            continue
        read += 1
        for name, parameter in again.pipeline.text_encoder.named_parameters():
            assert torch.equal(parameter, first[name]), value
        assert {p.dtype for p in again.denoiser.parameters()} == {torch.float32}, value
    assert read >= 4


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
