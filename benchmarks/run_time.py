"""The wall time of a whole run, from an empty folder to its report: what `make run` takes after its set-up.

    python benchmarks/run_time.py [RECIPE ...]

A run is a fresh process in an empty temporary folder, with the threads that it takes by itself. Without recipes, the
default one is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Row, record

from stillroom.recipe import DEFAULT, Recipe

LIMIT = 600.0


def timed(name: str) -> Row:
    """One row: steps, wall time, its share of training, and the student's own scores."""
    recipe = Recipe.load(name)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stillroom", "run", name], cwd=folder, check=True)
        seconds = time.perf_counter() - began
        (result,) = Path(folder).glob("runs/*/result.json")
        found = json.loads(result.read_text(encoding="utf-8"))
    row: Row = {"recipe": name, "steps": recipe.engine.steps, "wall time, s": seconds}
    return row | {"of which training, s": float(found["cost"]["seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=[DEFAULT], help="shipped recipes by name")
    names = parser.parse_args().recipes
    rows = [timed(name) for name in names]
    record(
        "Run time",
        f"A run takes under {LIMIT / 60:g} minutes from start to report, set-up excluded.",
        " ".join(["python benchmarks/run_time.py", *names]),
        rows,
        all(float(row["wall time, s"]) < LIMIT for row in rows),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
