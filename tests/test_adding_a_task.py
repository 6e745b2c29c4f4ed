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


def stillroom(root: Path, *words: str, code: int = 0) -> str:
    return python(root, "-m", "stillroom", *words, code=code)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    stillroom(place, "run", "imitate.yaml", "--name", "first")
    return place / "runs" / "first"


def test_a_plan_before_anything_is_trained(place: Path) -> None:
    assert "imitate" in stillroom(place, "plan", "imitate.yaml")
    assert not (place / "runs" / "imitate").exists()


def test_a_run_leaves_a_student_that_load_reads(place: Path, finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["task"] == "vectors"
    assert result["teachers"] == ["teacher-1"]
    assert set(result["scores"]) == {"student", "teacher-1"}
    assert result["student"]["params"] == 8 * 3 + 8 + 8 + 1
    said = python(place, "-c", f"import stillroom as sr; print(type(sr.load({str(finished)!r})).__name__)")
    assert said.strip() == "Regressor"


def test_a_killed_run_goes_on_to_the_same_weights(place: Path, finished: Path) -> None:
    command = [sys.executable, "-m", "stillroom", "run", "imitate.yaml", "--name", "killed"]
    run = subprocess.Popen(command, cwd=place, env=environment(place), stderr=subprocess.DEVNULL)
    checkpoint = place / "runs" / "killed" / "checkpoints" / "step-0000020" / "manifest.json"
    while run.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    if not (place / "runs" / "killed" / "result.json").exists():  # it may have been faster than we are
        stillroom(place, "run", "--resume", "runs/killed")
    first, again = (path / "student" / "model.safetensors" for path in (finished, place / "runs" / "killed"))
    assert first.read_bytes() == again.read_bytes()


def test_what_is_shown(place: Path, finished: Path) -> None:
    assert re.search(r"random vectors\n +\[.*\] -> ", stillroom(place, "sample", "runs/first"))
    assert "predicts numbers" in stillroom(place, "demo", "runs/first", code=2)
    compared = stillroom(place, "compare", "first")
    assert "Mean squared error ↓" in compared
    assert "Vectors seen" in compared
    stillroom(place, "report", "first")
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Mean squared error" in page
    assert "random vectors" in page
    assert "-&gt;" in page
    assert "step" in stillroom(place, "doctor", "first", code=0)
    card = (finished / "student" / "README.md").read_text(encoding="utf-8")
    assert "A regressor taught by `teacher`" in card
    assert "y = student.predict(vectors)" in card


def test_a_student_goes_on_from_another_run(place: Path, finished: Path) -> None:
    stillroom(place, "run", "imitate.yaml", "--name", "second", "--student", "runs/first", "--steps", "10")
    result = json.loads((place / "runs" / "second" / "result.json").read_text())
    assert result["student"]["params"] == 8 * 3 + 8 + 8 + 1


def test_an_export_answers_as_the_model_does(place: Path, finished: Path) -> None:
    stillroom(place, "export", "runs/first", "--to", "torch", "--out", "exported")
    facts = json.loads((place / "exported" / "export.json").read_text())
    assert facts["files"]["model.pt2"]["parity"]["max_abs_error"] < 1e-5


def test_its_claims_hold_on_its_bench(place: Path) -> None:
    shown = stillroom(place, "prove", "imitate", "--seeds", "0", "1")
    assert "learns" in shown
    result = json.loads((place / "results" / "imitate.json").read_text())
    assert {claim["id"]: claim["verdict"] for claim in result["claims"]} == {"learns": "holds", "control": "holds"}
    assert "exact function" in stillroom(place, "bench", "vectors")


def test_mistakes_are_one_line(place: Path) -> None:
    assert "no regressor 'mpl-8'" in stillroom(place, "run", "imitate.yaml", "--student", "mpl-8", code=2)
    wrong = "from stillroom.task import make_task; make_task('vector')"
    said = python(place, "-c", wrong, code=1)
    assert "unknown task 'vector' (did you mean 'vectors'?)" in said
