"""The documents say what the results say, their links lead somewhere, and their worked example runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("generate_docs")
    sys.path.remove(str(ROOT / "tools"))


# --- generated parts --------------------------------------------------------------------------------------------------
def test_the_readme_names_every_command() -> None:
    from stillroom.cli import COMMANDS

    readme = (ROOT / "README.md").read_text()
    missing = [
        command.__name__.lower() for command in COMMANDS if f"| `stillroom {command.__name__.lower()}" not in readme
    ]
    assert not missing


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
    "health": {"health/fake_error": [0.1, 0.2]},
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
README = """<!-- generated: methods -->
old
<!-- end -->

<!-- generated: planned -->
<!-- end -->

<!-- generated: benchmarks -->
<!-- end -->

by hand
"""
PAGE = """# dmd2

<!-- generated: card -->
<!-- end -->

**In short.** Takes <!-- value: fashion / dmd2 / nfe -->?<!-- end --> call, not
<!-- value: fashion / teacher / nfe -->?<!-- end -->: [see](x.md).
<!-- rests on: fashion/one-step holds -->

<!-- generated: health -->
<!-- end -->

<!-- generated: measured -->
<!-- end -->

<!-- generated: cost -->
<!-- end -->

### The paper's number beside ours

| what | in the paper | here |
| --- | --- | --- |
| one step | 1.5 | <!-- spread: fashion / dmd2 / fd -->?<!-- end --> |
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository: README, one method with its page, the real catalogue, one result."""
    package = tmp_path / "src" / "stillroom"
    (package / "methods" / "score").mkdir(parents=True)
    (package / "methods" / "score" / "dmd2.py").touch()
    shutil.copy(ROOT / "src" / "stillroom" / "catalogue.yaml", package)
    for folder in ("docs/methods", "results/benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "methods.md").write_text("## One step\n\n<!-- generated: index dmd2 -->\n<!-- end -->\n")
    page_of(tmp_path, "dmd2").write_text(PAGE)
    record(tmp_path, RESULT)
    return tmp_path


def page_of(tree: Path, slug: str) -> Path:
    return tree / "docs" / "methods" / f"{slug}.md"


def record(tree: Path, result: dict[str, Any]) -> None:
    (tree / "results" / "dmd2.json").write_text(json.dumps(result))


def changed(**changes: Any) -> dict[str, Any]:
    """The result with another first claim."""
    result = json.loads(json.dumps(RESULT))
    result["claims"][0] |= changes
    return result


def test_readme_and_index_take_the_methods_verdict_in_words_from_its_page(generator: ModuleType, tree: Path) -> None:
    assert generator.main([], tree) == 0
    readme = (tree / "README.md").read_text()
    assert "| **One step** | [dmd2](docs/methods/dmd2.md) | Takes 1 call, not 49: see. |" in readme
    assert "by hand" in readme
    index = (tree / "docs" / "methods.md").read_text()
    assert "- **[dmd2](methods/dmd2.md)**: " in index
    assert "*Takes 1 call, not 49: see.*" in index
    assert generator.main(["--check"], tree) == 0


def test_a_methods_page_shows_claims_arms_health_and_cost(generator: ModuleType, tree: Path) -> None:
    generator.main([], tree)
    page = page_of(tree, "dmd2").read_text()
    assert "✅ holds: One step is as good as many (Table 1; FD-fashion@12345678, N=5000: dmd2 <= 1.2 x teacher)" in page
    assert "| dmd2 | 2 ± 1 |" in page
    assert re.search(r"^\| `fake_error` \| .* \| 0.1 to 0.2 \|$", page, re.MULTILINE)
    assert "| teacher | – | – | – | 49 | – |" in page
    assert "| one step | 1.5 | <!-- spread: fashion / dmd2 / fd -->2 ± 1<!-- end --> |" in page


def test_every_method_of_the_catalogue_is_here_or_planned(generator: ModuleType, tree: Path) -> None:
    generator.main([], tree)
    readme = (tree / "README.md").read_text()
    catalogue = generator.Sources(tree).catalogue
    assert sum(not (entry.get("foundation") or entry.get("small")) for entry in catalogue) == 47
    planned = set(re.findall(r"^\| ([a-z][a-z0-9-]+) \| \[\d", readme, re.MULTILINE))
    assert planned == {entry["slug"] for entry in catalogue} - {"dmd2"}


def test_a_method_without_a_page_is_given_a_draft_with_every_section(generator: ModuleType, tree: Path) -> None:
    page_of(tree, "dmd2").unlink()
    (tree / "docs" / "methods.md").write_text("<!-- generated: unsorted -->\n<!-- end -->\n")
    assert generator.main(["--check"], tree) == 1
    assert not page_of(tree, "dmd2").exists()
    assert generator.main([], tree) == 0
    assert re.findall(r"^## (.+)$", page_of(tree, "dmd2").read_text(), re.MULTILINE) == list(SECTIONS)
    assert "| **Not sorted yet** | [dmd2](docs/methods/dmd2.md) | image: 1 holds. |" in (tree / "README.md").read_text()
    assert "## Not sorted yet" in (tree / "docs" / "methods.md").read_text()
    assert generator.main(["--check"], tree) == 0


@pytest.mark.parametrize("change", ["verdict", "figure", "typed"])
def test_check_fails_when_page_and_results_part(generator: ModuleType, tree: Path, change: str) -> None:
    generator.main([], tree)
    page = page_of(tree, "dmd2")
    if change == "verdict":
        record(tree, changed(verdict="fails"))
    elif change == "figure":
        arms = RESULT["claims"][0]["arms"]  # type: ignore[index]
        record(tree, changed(arms={**arms, "dmd2": {**arms["dmd2"], "mean": 2.1}}))
    else:
        page.write_text(page.read_text().replace("-->2 ± 1<!--", "-->1 ± 1<!--"))
    before = page.read_text()
    assert generator.main(["--check"], tree) == 1
    assert page.read_text() == before


def test_a_sentence_that_rests_on_another_verdict_is_named(
    generator: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tree, changed(verdict="unresolved"))
    assert generator.main([], tree) == 1
    said = "docs/methods/dmd2.md: a sentence rests on fashion/one-step being 'holds'; the results say 'unresolved'"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("<!-- value: fashion / dmd3 / fd -->?<!-- end -->", "no arm 'dmd3'"),
        ("<!-- value: fashion / dmd2 / latency -->?<!-- end -->", "no 'latency'"),
        ("<!-- value: dmd2 -->?<!-- end -->", "METHOD / WORLD / ARM / KEY"),
        ("<!-- benchmark: Speed / dmd2 / ratio -->?<!-- end -->", "no benchmark"),
        ("<!-- generated: turn -->\n<!-- end -->", "nothing makes 'turn'"),
    ],
)
def test_a_figure_that_is_not_there_is_named(
    generator: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str], wrong: str, said: str
) -> None:
    page_of(tree, "dmd2").write_text(wrong)
    assert generator.main([], tree) == 1
    assert said in capsys.readouterr().out


def test_figures_are_means_multiples_and_percentages(generator: ModuleType, tree: Path) -> None:
    page_of(tree, "dmd2").write_text(
        "<!-- value: fashion / dmd2 / fd -->?<!-- end --> <!-- percent: fashion / floor / fd -->?<!-- end --> "
        "<!-- percent: fashion / dmd2 / fd -->?<!-- end --> "
        "<!-- ratio: fashion / teacher / fd over dmd2 -->?<!-- end --> "
        "<!-- spread: dmd2 / fashion / dmd2 / fd -->?<!-- end -->"
    )
    assert generator.main([], tree) == 0
    assert re.findall(r"-->([^<]+)<!--", page_of(tree, "dmd2").read_text())[::2] == [
        "2",
        "50 %",
        "200 %",
        "1.2",
        "2 ± 1",
    ]


def test_a_failing_claim_is_shown_failing(generator: ModuleType, tree: Path) -> None:
    failed = changed()
    failed["claims"].append(failed["claims"][0] | {"id": "second", "verdict": "fails"})
    record(tree, failed)
    assert generator.main([], tree) == 0
    assert "❌ fails: One step is as good as many" in page_of(tree, "dmd2").read_text()


EVIDENCE = """<!-- generated: verdicts -->
<!-- end -->

<!-- generated: numbers -->
<!-- end -->

<!-- generated: shortfalls -->
<!-- end -->
"""
NUMBERS = """| what | in the paper | here | why they cannot be compared directly |
| --- | --- | --- | --- |
| one step | 1.5 (Table 1) | <!-- spread: fashion / dmd2 / fd -->?<!-- end --> | another judge |
"""


def with_evidence(tree: Path, why: str = "", numbers: str = NUMBERS, verdict: str = "fails") -> Path:
    """A page that collects the evidence of all methods; the one claim has this verdict."""
    (tree / "docs" / "evidence.md").write_text(EVIDENCE)
    record(tree, changed(verdict=verdict))
    before = PAGE[: PAGE.index("| what |")].replace("one-step holds", f"one-step {verdict}")
    page_of(tree, "dmd2").write_text(before.replace("### The paper", f"{why}\n\n### The paper") + numbers)
    return tree / "docs" / "evidence.md"


def test_papers_numbers_and_reasons_are_collected_from_the_methods_pages(generator: ModuleType, tree: Path) -> None:
    why = "<!-- why: fashion/one-step fails -->\nShort: [see](x.md),\n<!-- value: fashion / dmd2 / fd -->?<!-- end -->."
    page = with_evidence(tree, why)
    assert generator.main([], tree) == 0
    text = page.read_text()
    assert "Of 1 claims 1 fail." in text
    assert "| [dmd2](methods/dmd2.md) | one step | 1.5 (Table 1) | 2 ± 1 | another judge |" in text
    claim = "- ❌ fails: One step is as good as many (image level, world `fashion`; FD-fashion@12345678, N=5000: "
    assert f"{claim}dmd2 <= 1.2 x teacher): 1, 2, 3 against 2.5\n\nShort: see, 2.\n" in text


def test_a_draft_of_a_page_stops_nothing(generator: ModuleType, tree: Path) -> None:
    page = with_evidence(tree)
    page_of(tree, "dmd2").unlink()
    assert generator.main([], tree) == 0
    assert "Of 1 claims 1 fail." in page.read_text()


def test_a_claim_that_holds_needs_no_reason(generator: ModuleType, tree: Path) -> None:
    page = with_evidence(tree, verdict="holds")
    assert generator.main([], tree) == 0
    assert "All claims that were measured hold." in page.read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "docs/methods/dmd2.md does not say why fashion/one-step fails; write a paragraph there that begins with"),
        ({"why": "<!-- why: fashion/one-step unresolved -->\nNoise."}, "does not say why fashion/one-step fails"),
        (
            {"why": "<!-- why: fashion/one-step fails -->\nToo short.", "verdict": "holds"},
            "docs/methods/dmd2.md says why fashion/one-step fails, which the results do not say",
        ),
        ({"verdict": "holds", "numbers": ""}, "docs/methods/dmd2.md gives no number of its paper beside ours"),
        (
            {"verdict": "holds", "numbers": NUMBERS.replace(" (Table 1)", "")},
            "'one step': the paper's number needs its",
        ),
        ({"verdict": "holds", "numbers": NUMBERS.replace("another judge", "")}, "and a reason why ours cannot be"),
    ],
)
def test_the_generator_stops_at_evidence_without_place_or_reason(
    generator: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], said: str
) -> None:
    with_evidence(tree, **changes)
    assert generator.main([], tree) == 1
    assert said in capsys.readouterr().out


def test_a_claim_that_was_not_measured_is_listed_with_the_arm_it_waits_for(generator: ModuleType, tree: Path) -> None:
    result = changed()
    waiting = {"id": "second", "statement": "It learns", "verdict": "not measured", "unmeasured": ["ablation"]}
    result["claims"].append(result["claims"][0] | waiting)
    record(tree, result)
    readme = tree / "README.md"
    readme.write_text(readme.read_text() + "\n<!-- generated: unmeasured -->\n<!-- end -->\n")
    assert generator.main([], tree) == 0
    page = page_of(tree, "dmd2").read_text()
    assert (
        "not measured: It learns (Table 1; FD-fashion@12345678, N=5000: dmd2 <= 1.2 x teacher); not run: `ablation`"
        in page
    )
    assert "| ablation | not measured |" in page
    assert "Takes 1 call, not 49: see. Not measured yet: 1 of its 2 claims. |" in readme.read_text()
    assert "1 of the 2 claims of the proofs have no verdict yet" in readme.read_text()
    assert "image level, world `fashion`: It learns; not run: `ablation`" in readme.read_text()


def test_an_arm_diverged_only_where_the_record_says_so(generator: ModuleType, tree: Path) -> None:
    nothing = {"values": [None], "mean": None, "sd": None, "cost": {"steps": 9}}
    arms = RESULT["claims"][0]["arms"] | {"logs-no-such": nothing, "burst": nothing | {"diverged": 1}}  # type: ignore[index]
    record(tree, changed(arms=arms))
    generator.main([], tree)
    page = page_of(tree, "dmd2").read_text()
    assert "| logs-no-such | – |" in page
    assert "| burst | diverged |" in page


def test_two_worlds_of_one_level_have_tables_and_notes_of_their_own(generator: ModuleType, tree: Path) -> None:
    result = changed()
    other = json.loads(json.dumps(RESULT["claims"][0])) | {"id": "second", "world": "mnist"}  # type: ignore[index]
    other["arms"]["dmd2"]["mean"] = 7.0
    result["claims"].append(other)
    result["floor"]["mnist"] = {"fd": 0.25, "extractor": "mnist@87654321", "n": 100}
    result["notes"]["mnist"] = "Said of MNIST."
    record(tree, result)
    generator.main([], tree)
    measured = page_of(tree, "dmd2").read_text().split("<!-- generated: cost")[0]
    first, second = measured.split("world `fashion`")[1].split("world `mnist`")
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


def test_the_shipped_student_is_told_as_a_report_would(generator: ModuleType, tree: Path) -> None:
    (tree / "README.md").write_text("<!-- generated: student -->\n<!-- end -->\n")
    generator.main([], tree)
    assert "Not measured yet." in (tree / "README.md").read_text()
    rows = [
        {"model": who, "parameters": n, "latency, batch 1, ms": ms, "SceneEval-x, N=6": scene, "FD-x, N=6": 3.0}
        for who, n, ms, scene in (("one", 200, 90.0, 0.6), ("two", 100, 50.0, 0.8), ("ours", 50, 100.0, 0.79))
    ]
    found = {"name": "Text to image", "statement": "", "commit": "a", "machine": "b", "rows": rows}
    (tree / "results" / "benchmarks" / "text.json").write_text(json.dumps(found))
    generator.main([], tree)
    text = (tree / "README.md").read_text()
    assert (
        "Beside two, the better of its teachers, the student is smaller (0.5 times the parameters), as good (SceneEval "
        "0.79 against 0.8) and as good (Fréchet distance 3 against 3); it is not faster at batch 1 (0.5 times the "
        "speed)."
    ) in text
    assert "| ours | 50 | 100 | 0.79 | 3 |" in text


# --- the methods' pages -----------------------------------------------------------------------------------------------
SECTIONS = (
    "What it is for",
    "When to choose it, and when not",
    "Formulas and code",
    "Quick use",
    "Turns and options",
    "Health numbers",
    "Deviations from the paper",
    "Measured",
    "Cost",
)
GENERATED = ("card", "turns", "options", "health", "measured", "cost")
SLUGS = sorted(path.stem.replace("_", "-") for path in (ROOT / "src/stillroom/methods").glob("*/[!_]*.py"))


@pytest.mark.parametrize("slug", SLUGS)
def test_a_method_has_a_page_with_all_sections_in_order(slug: str) -> None:
    text = page_of(ROOT, slug).read_text(encoding="utf-8")
    assert text.startswith(f"# {slug}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(SECTIONS)
    assert re.findall(r"<!-- generated: (\S+)", text) == list(GENERATED)
    assert "(To be written.)" not in text
    assert len(re.findall(r"^\*\*In short\.\*\* ", text, re.MULTILINE)) == 1
    part = text.split("## Deviations from the paper")[1].split("## Measured")[0]
    numbered = re.findall(r"^(\d+)\. (.+?)(?=^\d+\. |\Z)", part, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    for number, said in numbered:
        marked = re.search(
            r"\*(Affects results|Does not affect results|A part that is missing)", " ".join(said.split())
        )
        assert marked, f"{slug}: deviation {number} does not say whether it affects results"


@pytest.mark.parametrize("slug", SLUGS)
def test_the_places_in_the_code_that_a_page_names_are_there(slug: str) -> None:
    from stillroom.method import get_method

    cls = get_method(slug)
    text = page_of(ROOT, slug).read_text(encoding="utf-8")
    named = re.findall(rf"`{cls.__name__}\.(\w+)`", text)
    assert named, f"{slug}: the page names no place in {cls.__name__}"
    assert [name for name in named if not hasattr(cls, name)] == []
    fields = {field.name for field in dataclasses.fields(cls.Options)}
    assert set(re.findall(r"`options\.([a-z]\w*)", text)) <= fields


def test_the_index_lists_every_method_once() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    listed = [slug for found in re.findall(r"<!-- generated: index (.+?) -->", text) for slug in found.split()]
    assert sorted(listed) == SLUGS
    assert sorted(re.findall(r"^- \*\*\[([a-z0-9-]+)\]", text, re.MULTILINE)) == SLUGS


def test_readme_says_how_many_methods_there_are_and_lists_each() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    catalogue = yaml.safe_load((ROOT / "src/stillroom/catalogue.yaml").read_text(encoding="utf-8"))
    small = {entry["slug"] for entry in catalogue if entry.get("small")}
    assert f"47 methods in all: {len(set(SLUGS) - small)} are here" in text
    assert sorted(re.findall(r"^\|.*?\| \[([a-z0-9-]+)\]\(docs/methods/\1\.md\) \|", text, re.MULTILINE)) == SLUGS


def test_every_wing_with_a_method_has_a_page() -> None:
    wings = {path.parent.name for path in (ROOT / "src/stillroom/methods").glob("*/[!_]*.py")}
    assert {path.stem for path in (ROOT / "docs" / "wings").glob("*.md")} == wings


# --- written parts ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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
    page = page_of(copy_with_example, "denoising-student").read_text()
    assert len(re.findall(r"^- ✅ holds: ", page, re.MULTILINE)) == 2
    readme = (copy_with_example / "README.md").read_text()
    assert "[denoising-student](docs/methods/denoising-student.md) | mechanism: 2 holds. |" in readme
