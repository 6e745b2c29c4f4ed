"""The kind of model of docs/adding-a-task.md, in a package of its own, through every command: the library is not edited
and knows nothing of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding-a-task.md"


def page_files() -> dict[str, str]:
    """Path -> text of the page's blocks that are files: their first line is a comment that names the path."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"```[a-z]+\n# (\S+\.(?:py|yaml|toml))\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's package as it lies after an installation, its recipe, and a teacher."""
    root = tmp_path_factory.mktemp("toy")
    files = page_files()
    for name, text in files.items():
        path = root / ("site" if name.startswith("toy_vectors/") else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "site" / "toy_vectors" / "__init__.py").touch()
    about = tomllib.loads(files["pyproject.toml"])["project"]
    info = root / "site" / f"toy_vectors-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {module}\n" for name, module in entries.items())
        for group, entries in about["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    python(root, "make_teacher.py")
    return root


def environment(root: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(root / "site"), str(ROOT / "src")])
    return os.environ | {"PYTHONPATH": paths, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def python(root: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment(root), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


WORDS = {
    "plan": ("plan", "imitate.yaml"),
    "run": ("run", "imitate.yaml", "--name", "first"),
    "sample": ("sample", "runs/first"),
    "demo": ("demo", "runs/first"),
    "compare": ("compare", "first"),
    "report": ("report", "first"),
    "doctor": ("doctor", "first"),
    "student": ("run", "imitate.yaml", "--name", "second", "--student", "runs/first", "--steps", "10"),
    "export": ("export", "runs/first", "--to", "torch", "--out", "exported"),
    "prove": ("prove", "imitate", "--seeds", "0", "1"),
    "bench": ("bench", "vectors"),
    "misspelt": ("run", "imitate.yaml", "--student", "mpl-8"),
}
"""Commands in their order; one process runs them all, for the start of each takes longer than what it does."""
ALL = """
import contextlib, io, json, sys
import stillroom as sr
from stillroom import cli
from stillroom.errors import UserError
from stillroom.task import make_task

def told(call):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = call()
    return code, said.getvalue()

if __name__ == "__main__":
    found = {name: told(lambda: cli.main(words)) for name, words in json.loads(sys.argv[1]).items()}
    found["load"] = 0, type(sr.load("runs/first")).__name__
    try:
        make_task("vector")
    except UserError as error:
        found["task"] = 2, str(error)
    json.dump(found, open("told.json", "w"))
"""


@pytest.fixture(scope="module")
def told(place: Path) -> dict[str, tuple[int, str]]:
    """Exit code and words of each command."""
    (place / "all.py").write_text(ALL)
    python(place, "all.py", json.dumps(WORDS))
    return json.loads((place / "told.json").read_text())


def test_every_command_ends_as_it_should(told: dict[str, tuple[int, str]]) -> None:
    assert {name: code for name, (code, _) in told.items() if code} == {"demo": 2, "misspelt": 2, "task": 2}
    assert "imitate" in told["plan"][1]


def test_a_run_leaves_a_student_that_load_reads(place: Path, told: dict[str, tuple[int, str]]) -> None:
    result = json.loads((place / "runs" / "first" / "result.json").read_text())
    assert result["task"] == "vectors"
    assert result["teachers"] == ["teacher-1"]
    assert set(result["scores"]) == {"student", "teacher-1"}
    assert result["student"]["params"] == 8 * 3 + 8 + 8 + 1
    assert told["load"][1] == "Regressor"


def test_a_killed_run_goes_on_to_the_same_weights(place: Path, told: dict[str, tuple[int, str]]) -> None:
    command = [sys.executable, "-m", "stillroom", "run", "imitate.yaml", "--name", "killed"]
    run = subprocess.Popen(command, cwd=place, env=environment(place), stderr=subprocess.DEVNULL)
    checkpoint = place / "runs" / "killed" / "checkpoints" / "step-0000020" / "manifest.json"
    while run.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    if not (place / "runs" / "killed" / "result.json").exists():  # it may have been faster than we are
        python(place, "-m", "stillroom", "run", "--resume", "runs/killed")
    first, again = (place / "runs" / name / "student" / "model.safetensors" for name in ("first", "killed"))
    assert first.read_bytes() == again.read_bytes()


def test_what_is_shown(place: Path, told: dict[str, tuple[int, str]]) -> None:
    assert re.search(r"random vectors\n +\[.*\] -> ", told["sample"][1])
    assert "predicts numbers" in told["demo"][1]
    assert "Mean squared error ↓" in told["compare"][1]
    assert "Vectors seen" in told["compare"][1]
    page = (place / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    assert "Mean squared error" in page
    assert "random vectors" in page
    assert "-&gt;" in page
    assert "step" in told["doctor"][1]
    card = (place / "runs" / "first" / "student" / "README.md").read_text(encoding="utf-8")
    assert "A regressor taught by `teacher`" in card
    assert "y = student.predict(vectors)" in card


def test_a_student_goes_on_from_another_run(place: Path, told: dict[str, tuple[int, str]]) -> None:
    result = json.loads((place / "runs" / "second" / "result.json").read_text())
    assert result["student"]["params"] == 8 * 3 + 8 + 8 + 1


def test_an_export_answers_as_the_model_does(place: Path, told: dict[str, tuple[int, str]]) -> None:
    facts = json.loads((place / "exported" / "export.json").read_text())
    assert facts["files"]["model.pt2"]["parity"]["max_abs_error"] < 1e-5


def test_its_claims_hold_on_its_bench(place: Path, told: dict[str, tuple[int, str]]) -> None:
    assert "learns" in told["prove"][1]
    result = json.loads((place / "results" / "imitate.json").read_text())
    assert {claim["id"]: claim["verdict"] for claim in result["claims"]} == {"learns": "holds", "control": "holds"}
    assert "exact function" in told["bench"][1]


def test_mistakes_are_one_line(told: dict[str, tuple[int, str]]) -> None:
    assert "no regressor 'mpl-8'" in told["misspelt"][1]
    assert "unknown task 'vector' (did you mean 'vectors'?)" in told["task"][1]
