"""What holds for every method: its health numbers are defined, its docstring has formulas, it has a test file."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from stillroom.method import Method, methods

TESTS = Path(__file__).parent
OWN = {slug: cls for slug, cls in methods().items() if cls.__module__.startswith("stillroom.")}


def noted(cls: type[Method]) -> tuple[set[str], bool]:
    """The names of the numbers that a method's file notes; whether others are named when it runs."""
    names, more = set(), False
    for call in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(cls)))):  # type: ignore[arg-type]
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "note":
            name = call.args[0]
            if isinstance(name, ast.Constant):
                names.add(str(name.value))
            else:
                more = True
    return names, more


@pytest.mark.parametrize("slug", OWN)
def test_health_numbers_are_defined(slug: str) -> None:
    names, more = noted(OWN[slug])
    defined = set(OWN[slug].health)
    assert names <= defined
    assert more or defined == names
    assert all(len(meaning) > 20 for meaning in OWN[slug].health.values())


@pytest.mark.parametrize("slug", OWN)
def test_the_docstring_has_formulas_and_says_what_departs_and_points_to_no_list(slug: str) -> None:
    text = inspect.cleandoc(OWN[slug].__doc__ or "")
    assert re.search(r"^    \S.*=", text, re.MULTILINE), "no formula"
    assert "Departures" in text
    source = inspect.getsource(inspect.getmodule(OWN[slug]))  # type: ignore[arg-type]
    assert not re.search(r'"""(Items?|Steps?|\d+\.) ?\d*', source), "numbers of a list that the reader does not have"


@pytest.mark.parametrize("slug", OWN)
def test_every_method_has_its_own_test_file(slug: str) -> None:
    wing, name = OWN[slug].wing, slug.replace("-", "_")
    assert (TESTS / wing / f"test_{name}.py").is_file()
