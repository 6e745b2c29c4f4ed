"""The house rules that a machine can check: imports run downhill, the command line starts light, and
what is registered is also proven and documented."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stillroom"

# What each part of the package may import besides itself. A part that is not listed here fails the test.
TOOLS = {"losses", "diffusion", "networks", "surgery", "folders", "augment", "draws", "errors", "files", "parsing"}
TOOLS |= {"registry", "values", "checks"}
BELOW_METHODS = TOOLS | {"cache", "data", "evaluation", "method", "task", "pictures", "engine", "recipe", "training"}
BELOW_BENCH = BELOW_METHODS | {"methods", "synthesis", "tasks"}
BELOW_RUN = BELOW_BENCH | {"bench", "proofs", "report"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "draws": set(),
    "checks": set(),
    "registry": {"errors"},
    "files": {"errors"},
    "parsing": {"errors"},
    "values": {"errors", "parsing"},
    "cache": {"errors", "files"},
    **dict.fromkeys(("losses", "diffusion", "networks", "surgery", "folders", "augment"), TOOLS),
    "data": TOOLS,
    "evaluation": TOOLS | {"data"},
    "method": TOOLS,
    "task": TOOLS | {"evaluation"},
    "pictures": TOOLS | {"evaluation", "task"},
    "engine": TOOLS | {"data", "method"},
    "recipe": TOOLS | {"method", "engine"},
    "training": TOOLS | {"method", "engine", "recipe"},
    "catalogue": TOOLS | {"method"},
    "methods": TOOLS | {"method", "data", "evaluation"},  # a method may have its own samples judged
    "synthesis": BELOW_METHODS,
    "tasks": BELOW_METHODS | {"synthesis"},
    "bench": BELOW_BENCH,
    "proofs": BELOW_BENCH | {"bench"},
    "report": BELOW_METHODS,
    "ending": BELOW_RUN,
    "run": BELOW_RUN | {"ending"},
    **dict.fromkeys(("demo", "exports", "planning", "auto"), BELOW_RUN | {"run"}),
    "arguments": {"errors"},
    "cli": BELOW_RUN | {"run", "demo", "exports", "planning", "catalogue", "arguments"},
    "__init__": BELOW_RUN | {"run", "exports", "planning"},
    "__main__": {"cli"},
}
# Anybody may name these in an annotation (under TYPE_CHECKING): they are the contract, not an implementation.
CONTRACT = {"stillroom.method", "stillroom.task", "stillroom.recipe", "stillroom.errors"}


def module_name(path: Path, source: Path) -> str:
    parts = ("stillroom", *path.relative_to(source).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def part_of(module: str) -> str:
    """``stillroom.diffusion.process`` -> ``diffusion``; the package itself -> ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def type_only(tree: ast.AST) -> set[ast.AST]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path, source: Path, named: Container[str] = CONTRACT) -> Iterator[tuple[str, int]]:
    """Modules of the package that this file imports, anywhere in it, with the line; not those of ``named`` of which it
    takes but the types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotations_only = type_only(tree)
    package = module_name(path, source).split(".")
    package = package if path.name == "__init__.py" and package[-1] != "__init__" else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            found = [
                f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}", source) else base for alias in node.names
            ]
        else:
            continue
        for module in found:
            if module.split(".")[0] == "stillroom" and not (node in annotations_only and module in named):
                yield module, node.lineno


def is_module(name: str, source: Path) -> bool:
    path = source.joinpath(*name.split(".")[1:])
    return name.startswith("stillroom.") and (path.is_dir() or path.with_suffix(".py").is_file())


def violations(source: Path) -> list[str]:
    found = []
    for path in sorted(source.rglob("*.py")):
        here = module_name(path, source)
        part = part_of(here)
        if part not in MAY_IMPORT:
            found.append(f"{path.relative_to(source)}: {part!r} has no place in the house; give it one in MAY_IMPORT")
            continue
        for target, line in imports(path, source):
            other = part_of(target)
            uphill = other != part and other not in MAY_IMPORT[part]
            sideways = part == other == "methods" and target != here and path.name != "__init__.py"
            if uphill or sideways:
                found.append(f"{path.relative_to(source)}:{line}: {part} imports {target}")
    return found


def test_imports_run_downhill() -> None:
    assert violations(SOURCE) == []


def circle(source: Path) -> list[str]:
    """Modules of which each imports the last one, and the first one the last; annotations do not count."""
    paths = {module_name(path, source): path for path in source.rglob("*.py")}
    found = {module: {target for target, _ in imports(path, source, paths)} for module, path in paths.items()}
    graph = {module: targets & found.keys() - {module} for module, targets in found.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_tests_lie_in_folders_like_the_sources() -> None:
    tests = ROOT / "tests"
    found = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert [folder for folder in sorted(found) if not (SOURCE / folder).is_dir()] == []
    names = [path.name for path in tests.rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest tells tests in folders apart by the names of their files"


def test_no_modules_import_each_other() -> None:
    assert circle(SOURCE) == []


def test_a_circle_is_caught(tmp_path: Path) -> None:
    planted = {"a": "from stillroom.b import x", "b": "def f():\n    from stillroom.c import y"}
    planted["c"] = "import stillroom.a"
    for name, text in planted.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert set(circle(tmp_path)) == {"stillroom.a", "stillroom.b", "stillroom.c"}


ANNOTATION = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
PLANTED = {
    "diffusion/process.py": "def f():\n    from stillroom.engine.trainer import Trainer",
    "engine/trainer.py": "import stillroom.methods.score.dmd2",
    "methods/score/dmd2.py": "from .sim import SIM",
    "methods/score/sim.py": "from stillroom.methods.score import dmd2",
    "bench/fashion.py": "from ..proofs import dmd2",
    "losses/score.py": ANNOTATION + "from stillroom.bench.fashion import Bench",
}


@pytest.mark.parametrize("file", PLANTED)
def test_an_uphill_import_is_caught(tmp_path: Path, file: str) -> None:
    for name in PLANTED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PLANTED[name] if name == file else "")
    assert [line.split(":")[0] for line in violations(tmp_path)] == [file]


def test_a_part_without_a_place_is_caught(tmp_path: Path) -> None:
    (tmp_path / "gadgets.py").write_text("")
    assert violations(tmp_path) == ["gadgets.py: 'gadgets' has no place in the house; give it one in MAY_IMPORT"]


def test_downhill_and_contract_imports_pass(tmp_path: Path) -> None:
    allowed = {
        "method.py": "from stillroom.errors import UserError",
        "errors.py": "",
        "diffusion/times.py": ANNOTATION + "from stillroom.method import Draws",
        "methods/score/dmd2.py": "from stillroom.diffusion import times\nfrom ...method import register",
    }
    for name, text in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == []


def test_help_is_light() -> None:
    """How long it takes is measured by benchmarks/start_up.py."""
    command = [sys.executable, "-X", "importtime", "-m", "stillroom", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONWARNINGS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "stillroom" in imported
    heavy = {"torch", "diffusers", "transformers", "peft", "matplotlib", "numpy", "scipy", "sklearn", "filelock"}
    assert not imported & heavy


def test_no_module_needs_what_one_system_alone_has() -> None:
    for path in SOURCE.rglob("*.py"):
        top = {
            alias.name
            for n in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(n, ast.Import)
            for alias in n.names
        }
        assert not top & {"fcntl", "msvcrt", "pwd", "grp", "resource", "termios"}, path


def test_the_source_distribution_names_what_there_is() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [name for name in included if not (ROOT / name).exists()] == []


# --- commands ask the task and the model -----------------------------------------------------------------------------
ASKING = ("cli", "run", "planning", "auto", "report", "exports", "demo", "synthesis")


def test_no_command_names_a_class_of_model() -> None:
    from stillroom.task import tasks

    known = re.compile("|".join(rf"\b{cls.model.__name__}\b" for cls in tasks().values()))
    assert known.search("an ImageGenerator")
    found = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for part in ASKING
        for path in (sorted((SOURCE / part).rglob("*.py")) or [SOURCE / f"{part}.py"])
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if known.search(line)
    ]
    assert found == []


# --- every method has its whole set -----------------------------------------------------------------------------------
SLUGS = sorted(p.stem.replace("_", "-") for p in (SOURCE / "methods").glob("*/*.py") if p.name != "__init__.py")


def test_method_files_and_registry_agree() -> None:
    from stillroom.method import methods

    own = {slug for slug, cls in methods().items() if cls.__module__.startswith("stillroom.")}
    assert own == set(SLUGS)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_method_has_recipe_proof_and_page_and_a_result_or_says_that_it_has_none(slug: str) -> None:
    assert (SOURCE / "recipes" / f"{slug}.yaml").is_file()
    assert (SOURCE / "proofs" / f"{slug.replace('-', '_')}.py").is_file()
    results = [json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "results").glob("*.json")]
    measured = any(result["method"] == slug for result in results)
    page = (ROOT / "docs" / "methods" / f"{slug}.md").read_text(encoding="utf-8")
    assert measured != ("No result has been recorded yet." in page)


CATALOGUE = {e["slug"]: e for e in yaml.safe_load((SOURCE / "catalogue.yaml").read_text(encoding="utf-8"))}


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug in CATALOGUE])
def test_the_catalogue_agrees_with_the_class(slug: str) -> None:
    from stillroom.method import get_method

    cls, entry = get_method(slug), CATALOGUE[slug]
    assert (entry["arxiv"], entry["title"], entry["wing"]) == (cls.paper.arxiv, cls.paper.title, cls.wing)
