"""What is made once is found again, made anew when the code that made it has changed, and never waited for in vain."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillroom.cache import _read, cache_folder, code_of, kept, kept_json


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def counted(value: Any) -> tuple[Callable[[], Any], list[int]]:
    calls: list[int] = []

    def make() -> Any:
        calls.append(1)
        return value

    return make, calls


# --- what is kept -----------------------------------------------------------------------------------------------------
def test_tensors_are_made_once_for_each_of_their_parts() -> None:
    make, calls = counted({"x": torch.arange(6).reshape(2, 3).T})
    for _ in range(2):
        assert torch.equal(kept("a/b", make)["x"], torch.arange(6).reshape(2, 3).T)
    assert len(calls) == 1
    kept("a/b", make, parts=[1, "x"])
    kept("a/b", make, parts=["1 x"])
    kept("a/b", make, code=[test_tensors_are_made_once_for_each_of_their_parts])
    assert len(calls) == 4
    assert len(list((cache_folder() / "a").glob("b-*.safetensors"))) == 4


def test_what_is_kept_shares_no_memory_with_what_made_it() -> None:
    tied = nn.Linear(2, 2)
    twice = {"one": tied.weight, "two": tied.weight}
    found = kept("tied", lambda: twice)
    with torch.no_grad():
        tied.weight.zero_()
    assert all(value.abs().sum() > 0 for value in found.values())


def test_numbers_come_back_the_same_the_first_time_and_later() -> None:
    make, calls = counted({"fd": 0.1 + 0.2, "n": 3, "pair": (1, None)})
    first, second = kept_json("scores", make), kept_json("scores", make)
    assert first == second == {"fd": 0.1 + 0.2, "n": 3, "pair": [1, None]}
    assert len(calls) == 1


@pytest.mark.parametrize("content", [b"", b"\x00" * 100])
def test_a_damaged_file_is_made_again(content: bytes) -> None:
    make, calls = counted({"x": torch.ones(1)})
    kept("x", make), kept_json("x", lambda: 1)
    for file in cache_folder().glob("x-*[!k]"):
        file.write_bytes(content)
    assert torch.equal(kept("x", make)["x"], torch.ones(1))
    assert kept_json("x", lambda: 2) == 2
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(folder: Path) -> None:
    folder.write_text("a file in its place")
    make, calls = counted({"x": torch.ones(1)})
    for _ in range(2):
        assert torch.equal(kept("x", make)["x"], torch.ones(1))
    assert len(calls) == 2


def test_another_process_waits_for_what_is_being_made(folder: Path) -> None:
    code = "import sys, time, torch; from stillroom.cache import kept\n"
    code += "def make():\n    print('made', flush=True); time.sleep(1); return {'x': torch.ones(1)}\n"
    code += "assert float(kept('slow', make)['x']) == 1"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == ["", "made\n"]


# --- what code made it ------------------------------------------------------------------------------------------------
FILES = {
    "__init__.py": "",
    "teacher.py": "from brewery.parts import malt\nfrom . import water\ndef make():\n    return malt() + water.POUR\n",
    "parts/__init__.py": "from .malt import malt\n",
    "parts/malt.py": 'def malt():\n    "Barley."\n    from brewery.deep import heat\n    return heat(2)\n',
    "deep.py": "# hot\ndef heat(x):\n    return 3 * x\n",
    "water.py": "POUR = 1\n",
    "signs.py": "PAINT = 'red'\n",
}


@pytest.fixture
def brewery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The key of a small package in which some files read otherwise."""

    def key(**changed: str) -> str:
        for name, text in FILES.items():
            file = tmp_path / "brewery" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(changed.get(name.removesuffix(".py").replace("/", "_"), text))
        _read.cache_clear()
        return code_of(importlib.import_module("brewery.teacher").make)

    monkeypatch.syspath_prepend(tmp_path)
    yield key
    for name in [name for name in sys.modules if name.startswith("brewery")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("teacher", "+", "-"),
        ("parts_malt", "heat(2)", "heat(4)"),
        ("deep", "3 * x", "3 + x"),
        ("water", "1", "2"),
        ("parts___init__", "from .malt", "X = 1\nfrom .malt"),
    ],
)
def test_changed_code_changes_the_key_wherever_it_is_imported_from(
    brewery: Callable[..., str], file: str, old: str, new: str
) -> None:
    text = FILES[f"{file.replace('parts_', 'parts/')}.py"]
    assert old in text
    assert brewery() != brewery(**{file: text.replace(old, new)})


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("deep", "# hot", "# quite hot\n"),
        ("parts_malt", "Barley", "Barley, or wheat"),
        ("deep", "3 * x", "(3\n            * x)"),
        ("water", "POUR = 1", 'POUR = 1\n"""Litres."""'),
        ("water", "POUR", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import brewery.signs\nPOUR"),
        ("signs", "red", "blue"),
    ],
)
def test_comments_docstrings_layout_and_what_is_not_imported_do_not(
    brewery: Callable[..., str], file: str, old: str, new: str
) -> None:
    text = FILES[f"{file.replace('parts_', 'parts/')}.py"]
    assert old in text
    changed = brewery(**{file: text.replace(old, new)})
    if "TYPE_CHECKING" in new:
        text = text.replace("POUR", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nPOUR")
        assert changed == brewery(**{file: text})
    else:
        assert changed == brewery()


def test_the_code_of_a_class_an_instance_and_a_module_is_that_of_its_file() -> None:
    from stillroom.engine import trainer
    from stillroom.engine.trainer import Trainer
    from stillroom.losses.score import __name__ as other

    assert code_of(trainer) == code_of(Trainer) == code_of(Trainer.fit)
    assert code_of(trainer) != code_of(sys.modules[other])
