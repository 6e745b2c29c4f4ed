"""What all benchmarks share: medians, and the JSON that the documentation is made from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stillroom.proofs.runner import commit, machine

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "benchmarks"

Row = dict[str, Any]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def record(
    name: str, statement: str, command: str, rows: list[Row], verdict: bool | None = None, threads: int = 1
) -> None:
    """Print the rows and write ``results/benchmarks/<stem of the command's program>.json``."""
    used = f"{threads} thread{'s' if threads > 1 else ''} used"
    where = f"{machine()}, {used}; other work may have shared the machine"
    result: dict[str, Any] = {
        "name": name,
        "statement": statement,
        "command": command,
        "commit": commit(),
        "machine": where,
    }
    if verdict is not None:
        result["verdict"] = "holds" if verdict else "fails"
    result["rows"] = [{key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    OUT.mkdir(parents=True, exist_ok=True)
    stem = next(Path(word).stem for word in command.split() if word.endswith(".py"))
    (OUT / f"{stem}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    print(f"{name}: {result.get('verdict', 'recorded')}")
