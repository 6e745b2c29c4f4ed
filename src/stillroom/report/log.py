"""Reading what a run has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.errors import UserError
from stillroom.parsing import parse_json, read_yaml

RESULT, ENDING = "result.json", "ending.json"
"""What a run measured; and what has been done of its end, while that is not over."""


def is_finished(run_dir: Path) -> bool:
    """Whether nothing of a run is left to do."""
    written = (RESULT, "report.html", "student/README.md")
    return all((run_dir / name).is_file() for name in written) and not (run_dir / ENDING).exists()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` by rising step. A half-written last line (a killed run) is left out; of a step that
    a resumed run logged again, the later row counts.

    Raises UserError for a line in the middle that is not JSON.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, nan=True)
            rows[row["step"]] = row
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged", cure="remove that line") from None
    return [rows[step] for step in sorted(rows)]


def series(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """``{name: (steps, values)}`` of every number whose key starts with ``prefix``, in order of appearance. JSON's null
    (how some writers store NaN) becomes NaN."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix):
                steps, values = found.setdefault(key.removeprefix(prefix), ([], []))
                steps.append(row["step"])
                values.append(float("nan") if value is None else float(value))
    return found


def read_result(run_dir: Path) -> dict[str, Any]:
    """``result.json``, or an empty dictionary if the run is not finished. Raises UserError if it is damaged."""
    path = run_dir / RESULT
    if not path.is_file():
        return {}
    try:
        result = parse_json(path.read_bytes(), nan=True)
        if not isinstance(result, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error})", cure=f"delete it and `stillroom run --resume {run_dir}`"
        ) from None
    return result


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """``recipe.yaml`` as plain data, unchecked: a report must also be possible for a method that is not installed."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no recipe.yaml", cure="give a folder of `stillroom run`")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no recipe", cure="restore it from a copy")
    return tree
