"""What the documents show runs: every block of code is executed, or checked as far as it can be without a training; one
that is neither fails. And the site's navigation has every page."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import stillroom
from stillroom import cli
from stillroom.arguments import parse
from stillroom.method import get_method
from stillroom.parsing import parse_yaml
from stillroom.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    """As the documents name it to one another: ``running.md``, ``methods/dmd2.md``."""
    return page.name if page.parent == ROOT else page.relative_to(ROOT / "docs").as_posix()


class Block(NamedTuple):
    page: str
    line: int
    text: str


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[1] == language:
                found.append(Block(name_of(page), text[: match.start()].count("\n") + 2, match[2]))
    return found


def of(found: list[Any]) -> Any:
    return pytest.mark.parametrize("block", found, ids=lambda block: f"{block.page}:{block.line}")


def test_every_block_is_of_a_known_language() -> None:
    known = {"sh", "python", "yaml", "toml", "text", ""}  # the last two are no code: figures, signatures, formulas
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert {match[1] for match in FENCE.finditer(text)} <= known, name_of(page)
        assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(FENCE.findall(text)), name_of(page)


# --- the shell --------------------------------------------------------------------------------------------------------
def lines(block: Block) -> Iterator[Block]:
    for number, line in enumerate(block.text.replace("\\\n", "").splitlines()):
        if shlex.split(line, comments=True):
            yield Block(block.page, block.line + number, line)


COMMANDS = [line for block in blocks("sh") for line in lines(block)]
CHEAP = ("methods", "doctor", "recipe", "--help", "bench")
"""Commands that are run as they stand."""
OTHERS = ("tensorboard", "hf")
"""Programs of other projects, which nothing here can check."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents name as the reader's own."""
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("yaml") if block.page == "running.md")
    (tmp_path / "my-recipe.yaml").write_text(block.text)
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/recipe.yaml").write_text(block.text)
    return tmp_path


@of(COMMANDS)
def test_a_command_is_one(
    block: Block, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(block.text, comments=True)
    while "=" in words[0] and words[0].split("=")[0].isupper():  # settings of the environment
        words = words[1:]
    if words[0] == "torchrun":
        words = ["stillroom", *words[words.index("stillroom") + 1 :]]
    if words[0] == "stillroom":
        check_stillroom(words[1:], monkeypatch)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words == ["pip", "install", "."]:
        assert (ROOT / "pyproject.toml").is_file()
    elif words[:2] == ["pip", "install"]:
        (extra,) = re.findall(r"^stillroom\[([a-z,]+)\]$", words[-1])
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert set(extra.split(",")) <= set(extras)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] not in OTHERS:
        pytest.fail(f"{block.page}:{block.line}: nothing checks {block.text!r}")


def check_stillroom(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a cheap command. Of ``run`` read the recipe, all of it; of others the arguments."""
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert not stop.value.code
        return
    command: Any = parse(cli.COMMANDS, words)
    if words[0] in CHEAP:
        assert command() == 0
    elif words[0] == "run" and command.resume is None:
        made: list[Recipe] = []
        for name in ("_run", "_run_again"):
            monkeypatch.setattr(cli, name, lambda recipe, folder, *_, **__: made.append(recipe) or 0)
        assert command() == 0
        assert len(made) == 1
        assert made[0].to_yaml()


def inline_commands() -> list[Block]:
    """``stillroom ...`` between backticks, without places to fill in."""
    found = []
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for text in re.findall(r"`(stillroom [a-z][^`]*)`", line):
                if not re.search(r"[A-Z]{2,}|\.\.\.|\[", text.replace("--", "")):
                    found.append(Block(name_of(page), number, text))
    return [next(group) for _, group in itertools.groupby(sorted(found, key=lambda b: b.text), key=lambda b: b.text)]


@of(inline_commands())
def test_a_command_in_the_text_is_one(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(block.text)[1:]
    if words[0] in CHEAP and len(words) == 1 and words[0] != "methods":
        words += ["fashion"] if words[0] == "bench" else ["runs/x"]
    if words in (["export"], ["sample"]):
        words += ["fashion"]
    if words[0] in ("doctor", "bench") or {"denoising-student", "my-method"} & {*words}:  # what is not here
        parse(cli.COMMANDS, words)
        return
    check_stillroom(words, monkeypatch)


# --- Python -----------------------------------------------------------------------------------------------------------
def regression() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = np.eye(2)[(x[:, 0] > 0).astype(int)]
    return {"X": x[:30], "y": y[:30], "X_val": x[30:45], "y_val": y[30:45], "X_test": x[45:]}


EXECUTED: dict[tuple[str, str], Any] = {
    ("classifiers.md", "KernelSelfDistillation("): regression,
}
"""Blocks that are run, by page and a word of theirs, with what they are given."""
PARTS = {
    ("methods/agd.md", "attach("): "run by tests/methods/trajectory/test_agd.py",
    ("methods/sana-sprint.md", "student.draw("): "reads the student of a run",
    ("methods/sana-sprint.md", "SanaSprintPipeline.from_pretrained"): "reads the student of a run",
    ("methods/flash-dmd.md", "SamModel"): "reads a model that nothing here ships",
    (
        "methods/phased-dmd.md",
        "WanPipeline",
    ): "reads the student of a run; run on a tiny one by tests/tasks/pipelines/test_two_experts.py",
    ("methods/hyper-sd.md", "load_lora_weights"): "the test of the unified adapter runs them on a tiny pipeline",
    ("README.md", 'sr.distill("dmd2"'): "a training",
    ("README.md", 'sr.load("scenes-sd3")'): "loads a teacher, and goes on from the block above it",
    ("architecture.md", "def critic("): "methods of a class that is not shown",
    ("classifiers.md", "student.classify(images)"): "reads the student of a run",
    ("data.md", "scene_set("): "draws a thousand pictures",
    ("export.md", "network = onnxruntime.InferenceSession("): "run by tests/exports/test_export.py",
    ("export.md", "transformer(None"): "run by tests/exports/test_export.py",
    ("export.md", "openvino.Core()"): "run by tests/exports/test_export.py",
    ("export.md", "torch.export.load("): "run by tests/exports/test_export.py",
    ("export.md", 'answers = pipeline("text-classification"'): "run by tests/exports/test_export.py",
    ("export.md", "litserve.LitServer("): "run by tools/serve.py",
    ("export.md", "Triton(config="): "run by tools/serve.py",
    ("features.md", "layer_maps.layer_map("): "run by tests/test_docs.py",
    ("demo.md", "open_studio("): "reads the student of a run",
    ("encoders.md", "student.tokens(images)"): "reads the student of a run",
    ("language.md", "student.classify(["): "reads the student of a run",
    ("language.md", "Recommender()"): "trains thirty students",
    ("plan.md", "sr.plan("): "takes seconds; tests/test_planning.py plans smaller things",
    ("synthesis.md", "store_data("): "draws with a teacher",
    ("synthesis.md", "register_filter("): "registers a filter for good",
    ("synthesis.md", "webdataset.WebDataset("): "other libraries",
    ("text-to-image.md", "student.sample("): "reads the student of a run",
}
"""Blocks of which only grammar, imports and calls of ``stillroom`` are checked, and why."""


def kind_of(block: Block) -> tuple[str, str]:
    found = [key for key in (*EXECUTED, *PARTS) if key[0] == block.page and key[1] in block.text]
    assert len(found) == 1, f"{block.page}:{block.line} is to be listed once, in EXECUTED or in PARTS; it is {found}"
    return found[0]


OF_METHODS = [block for block in blocks("python") if block.page.startswith("methods/") and "sr." in block.text]
"""Short uses on the methods' pages: a training, or the student of a run."""
FILES = [block for block in blocks("python") if re.match(r"# \S+\.py\n", block.text)]
"""Files of the worked examples, which tests/test_docs.py and tests/test_adding_a_task.py run."""
OTHERS_IN_PYTHON = [block for block in blocks("python") if block not in [*OF_METHODS, *FILES]]


def test_every_listed_block_is_there() -> None:
    assert sorted(kind_of(block) for block in OTHERS_IN_PYTHON) == sorted([*EXECUTED, *PARTS])


@of(OF_METHODS)
def test_a_short_use_of_a_method_calls_what_there_is(block: Block) -> None:
    """``sr.distill`` is given the page's method and options that it has; what is loaded is asked by a verb of some
    model."""
    slug = Path(block.page).stem
    known = {name for f in (stillroom.distill, stillroom.load) for name in inspect.signature(f).parameters}
    known |= {field.name for field in dataclasses.fields(get_method(slug).Options)} | {"seed"}
    calls = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call)]
    assert calls
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        assert {keyword.arg for keyword in call.keywords} <= known
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "sr":
            assert call.func.attr in stillroom.__all__
            if call.func.attr == "distill":
                assert ast.literal_eval(call.args[0]) == slug
        else:
            assert call.func.attr in ("sample", "away", "classify", "probabilities", "features", "tokens")


@of(OTHERS_IN_PYTHON)
def test_a_python_block_holds(block: Block, place: Path) -> None:
    if (key := kind_of(block)) in EXECUTED:
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), EXECUTED[key]())
    else:
        check_names(block)


@of(FILES)
def test_a_file_of_an_example_imports_what_there_is(block: Block) -> None:
    check_names(block)


def check_names(block: Block) -> None:
    """Grammar, imports from ``stillroom``, and what is asked of ``sr``."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stillroom"):
            module = importlib.import_module(node.module or "")
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            for name in missing:  # a module of the package
                importlib.import_module(f"{node.module}.{name}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sr":
            assert node.attr in stillroom.__all__


# --- YAML and TOML ----------------------------------------------------------------------------------------------------
@of(blocks("yaml"))
def test_a_yaml_block_is_a_recipe_or_a_part_of_one(block: Block) -> None:
    tree = parse_yaml(block.text, f"{block.page}:{block.line}")
    if block.page.startswith("methods/"):
        tree = {"method": Path(block.page).stem, **tree}
    if block.page not in ("adding-a-method.md", "adding-a-task.md"):  # of methods that other tests make
        Recipe.from_dict(tree)


@of(blocks("toml"))
def test_a_toml_block_is_one(block: Block) -> None:
    assert tomllib.loads(block.text)


# --- the site ---------------------------------------------------------------------------------------------------------
def listed(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from listed(part)


def test_the_navigation_has_every_page_once() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    named = list(listed(project["nav"]))
    assert sorted(named) == sorted(name_of(path) for path in (ROOT / project["docs_dir"]).rglob("*.md"))
    assert (ROOT / project["docs_dir"] / "index.md").is_file()


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_sections_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        there = page if not target else page.parent / target
        assert anchor in anchors(there), f"{name_of(page)} links to {target}#{anchor}"


def test_the_checks_can_fail(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("run dmd3", "run dmd2 engine.stepps=3", "sample", "methods dmd3", "run dmd2 --data"):
        with pytest.raises((stillroom.UserError, SystemExit, AssertionError)):
            check_stillroom(wrong.split(), monkeypatch)
    with pytest.raises(AssertionError, match="listed once"):
        kind_of(Block("README.md", 1, "print()"))
    assert "a-section" not in anchors(ROOT / "README.md")
    assert sys.version_info >= (3, 11)
