"""The documents say what the results say, their links lead somewhere, and their worked example runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- generated parts --------------------------------------------------------------------------------------------------
def test_documents_agree_with_results(generator: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main(["--check"]) == 0, capsys.readouterr().out


RESULT = {
    "method": "dmd2",
    "bench": ["fashion"],
    "commit": ["0123456789ab"],
    "recipe_hash": ["abc"],
    "machine": ["a laptop"],
    "seeds": [0, 1, 2],
    "floor": {"fashion": {"fd": 0.5, "extractor": "fashion@12345678", "n": 5000}},
    "notes": {"fashion": ""},
    "claims": [
        {
            "id": "one-step",
            "statement": "One step is as good as many",
            "paper": "Table 1",
            "level": "image",
            "world": "fashion",
            "metric": "fd",
            "left": "dmd2",
            "right": "teacher",
            "op": "<=",
            "margin": "dmd2 <= 1.2 x teacher",
            "verdict": "holds",
            "arms": {
                "untouched": {"values": [9.0], "mean": 9.0, "sd": None, "cost": {"nfe": 1}},
                "dmd2": {"values": [1.0, 2.0, 3.0], "mean": 2.0, "sd": 1.0, "cost": {"nfe": 1}},
                "teacher": {"values": [2.5], "mean": 2.5, "sd": None, "cost": {"nfe": 49}},
            },
        }
    ],
}
PAGE = "<!-- generated: methods -->\nold\n<!-- end -->\n\n<!-- generated: benchmarks -->\n<!-- end -->\n\nby hand\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository: one page, the real catalogue, one method, one result."""
    package = tmp_path / "src" / "stillroom"
    (package / "methods" / "score").mkdir(parents=True)
    (package / "methods" / "score" / "dmd2.py").touch()
    shutil.copy(ROOT / "src" / "stillroom" / "catalogue.yaml", package)
    for folder in ("docs", "results/benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "results" / "dmd2.json").write_text(json.dumps(RESULT))
    return tmp_path


def row(tree: Path, slug: str) -> str:
    lines = (tree / "README.md").read_text().splitlines()
    return next(line for line in lines if re.match(rf"\| \[?{slug}\b", line))


def test_a_row_comes_from_the_result(generator: ModuleType, tree: Path) -> None:
    assert generator.main([], tree) == 0
    assert "image: 1 holds | FD-fashion@12345678, N=5000: dmd2 2 ± 1, teacher 2.5 |" in row(tree, "dmd2")
    assert "| planned |  |" in row(tree, "boot")
    assert "by hand" in (tree / "README.md").read_text()
    assert generator.main(["--check"], tree) == 0


def test_every_method_of_the_catalogue_has_one_row(generator: ModuleType, tree: Path) -> None:
    generator.main([], tree)
    slugs = re.findall(r"^\| \[?([a-z][a-z0-9-]+)", (tree / "README.md").read_text(), re.MULTILINE)
    assert sorted(slugs[1:]) == sorted(entry["slug"] for entry in generator.Sources(tree).catalogue)
    assert sum(not entry.get("foundation") for entry in generator.Sources(tree).catalogue) == 47


@pytest.mark.parametrize("change", ["verdict", "figure", "typed"])
def test_check_fails_when_page_and_results_part(generator: ModuleType, tree: Path, change: str) -> None:
    generator.main([], tree)
    result = json.loads(json.dumps(RESULT))
    if change == "verdict":
        result["claims"][0]["verdict"] = "fails"
    elif change == "figure":
        result["claims"][0]["arms"]["dmd2"]["mean"] = 2.1
    else:
        page = tree / "README.md"
        page.write_text(page.read_text().replace("dmd2 2 ± 1", "dmd2 1 ± 1"))
    (tree / "results" / "dmd2.json").write_text(json.dumps(result))
    before = (tree / "README.md").read_text()
    assert generator.main(["--check"], tree) == 1
    assert (tree / "README.md").read_text() == before


def test_a_failing_claim_is_shown_failing(generator: ModuleType, tree: Path) -> None:
    failed = json.loads(json.dumps(RESULT))
    failed["claims"].append(failed["claims"][0] | {"id": "second", "verdict": "fails"})
    (tree / "results" / "dmd2.json").write_text(json.dumps(failed))
    generator.main([], tree)
    assert "1 holds, 1 fails" in row(tree, "dmd2")


def test_two_worlds_of_one_level_have_tables_and_notes_of_their_own(generator: ModuleType, tree: Path) -> None:
    result = json.loads(json.dumps(RESULT))
    other = json.loads(json.dumps(RESULT["claims"][0])) | {"id": "second", "world": "mnist"}
    other["arms"]["dmd2"]["mean"] = 7.0
    result["claims"].append(other)
    result["floor"]["mnist"] = {"fd": 0.25, "extractor": "mnist@87654321", "n": 100}
    result["notes"]["mnist"] = "Said of MNIST."
    (tree / "results" / "dmd2.json").write_text(json.dumps(result))
    page = "\n".join(generator.claim_lines(generator.Sources(tree), "dmd2"))
    first, second = page.split("(world `fashion`")[1].split("(world `mnist`")
    assert "| dmd2 | 2 ± 1 |" in first
    assert "| dmd2 | 7 ± 1 |" in second
    assert "FD-mnist@87654321, N=100" in second
    assert "Said of MNIST." in second
    assert "Said of MNIST." not in first


def test_a_benchmark_is_shown_with_its_command(generator: ModuleType, tree: Path) -> None:
    record = {
        "name": "Engine overhead",
        "statement": "A step costs at most 1.05 of its bare work.",
        "command": "python benchmarks/overhead.py",
        "commit": "0123456789abcdef",
        "machine": "a laptop",
        "verdict": "holds",
        "rows": [{"method": "dmd2", "ratio": 1.02}],
    }
    (tree / "results" / "benchmarks" / "overhead.json").write_text(json.dumps(record))
    generator.main([], tree)
    text = (tree / "README.md").read_text()
    assert "| dmd2 | 1.02 |" in text
    assert "python benchmarks/overhead.py" in text


# --- written parts ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    from stillroom.cli import COMMANDS

    known = {command.__name__.lower() for command in COMMANDS}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^|-m )stillroom ([a-z]+)", text, re.MULTILINE)) <= known
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)) <= targets


def test_readme_calls_fit_the_python_face() -> None:
    import inspect

    import stillroom as sr

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"distill", "load"} <= set(re.findall(r"sr\.([a-z_]+)\(", text)) <= set(sr.__all__)
    inspect.signature(sr.distill).bind("dmd2", teacher="fashion", data="fashion", steps=2000)


def test_the_recipe_in_the_running_page_is_valid() -> None:
    import yaml

    from stillroom.recipe import Recipe

    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(method:.*?)```", text, re.DOTALL)
    assert Recipe.from_dict(yaml.safe_load(block)).engine.batch == 128


def test_the_example_of_the_features_page_runs() -> None:
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["target"] == (1, 3, 5)
    assert float(names["loss"].detach()) > 0
    assert all(p.grad is not None for p in names["projectors"].parameters())
    assert all(p.grad is None for p in names["teacher"].parameters())


# --- the worked example of docs/adding-a-method.md --------------------------------------------------------------------
def example_files() -> dict[str, str]:
    """Path -> text of the page's code blocks that are files: a block whose first line is a comment naming its path."""
    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```[a-z]+\n# (\S+\.(?:py|yaml))\n(.*?)```", text, re.DOTALL)
    return dict(blocks)


@pytest.fixture(scope="module")
def copy_with_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the example's four files added and nothing else changed."""
    root = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tools", "docs", "results"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "README.md", root)
    (root / "tests").mkdir()
    (root / "src" / "stillroom" / "methods" / "trajectory").mkdir(exist_ok=True)
    (root / "src" / "stillroom" / "methods" / "trajectory" / "__init__.py").touch()
    for name, text in example_files().items():
        assert not (root / name).exists(), f"{name} is there already"
        (root / name).write_text(text, encoding="utf-8")
    return root


def run_in(root: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_example_is_a_method_file_a_recipe_a_proof_and_a_test() -> None:
    assert [Path(name).parts[:3] for name in example_files()] == [
        ("src", "stillroom", "methods"),
        ("src", "stillroom", "recipes"),
        ("src", "stillroom", "proofs"),
        ("tests", "test_denoising_student.py"),
    ]


def test_the_example_is_listed_and_its_recipe_is_valid(copy_with_example: Path) -> None:
    assert "denoising-student" in run_in(copy_with_example, "-m", "stillroom", "methods")
    assert "options.teacher_steps" in run_in(copy_with_example, "-m", "stillroom", "methods", "denoising-student")
    check = "from stillroom.recipe import Recipe; print(Recipe.load('denoising-student').options)"
    assert run_in(copy_with_example, "-c", check).strip() == "{'teacher_steps': 16, 'guidance': 1.0}"


def test_the_example_keeps_the_house_rules(copy_with_example: Path) -> None:
    from test_architecture import violations

    assert [line for line in violations(copy_with_example / "src" / "stillroom") if "denoising_student" in line] == []
    ruff = ["-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    run_in(copy_with_example, *ruff, *example_files().keys() - {"src/stillroom/recipes/denoising-student.yaml"})


def test_the_examples_own_test_passes(copy_with_example: Path) -> None:
    assert "2 passed" in run_in(copy_with_example, "-m", "pytest", "-q", "tests/test_denoising_student.py")


def test_the_examples_claims_hold(copy_with_example: Path) -> None:
    prove = ["-m", "stillroom", "prove", "denoising-student", "--seeds", "0"]
    shown = run_in(copy_with_example, *prove)
    assert re.search(r"one-step .*denoising-student .*ced .*holds", shown)
    result = json.loads((copy_with_example / "results" / "denoising-student.json").read_text())
    assert {claim["id"]: claim["verdict"] for claim in result["claims"]} == {"one-step": "holds", "control": "holds"}
    run_in(copy_with_example, "tools/generate_docs.py")
    assert "mechanism: 2 holds | ced: denoising-student" in row(copy_with_example, "denoising-student")
