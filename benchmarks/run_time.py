"""The time of a whole run, from an empty folder to its report: what `make run` takes after its set-up.

    python benchmarks/run_time.py [RECIPE ...]

A run is a fresh process in an empty temporary folder, with the threads that it takes by itself. Without recipes, the
default one is timed. The limit is on processor time: what else the machine does lengthens the wall time, at times by
three.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Row, record

from stillroom.recipe import DEFAULT, Recipe

LIMIT = 300.0


def spent() -> float:
    """Processor time of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(name: str) -> Row:
    """One row: steps, processor and wall time, and the training's share of the latter."""
    recipe = Recipe.load(name)
    with tempfile.TemporaryDirectory() as folder:
        before, began = spent(), time.perf_counter()
        subprocess.run([sys.executable, "-m", "stillroom", "run", name], cwd=folder, check=True)
        seconds = time.perf_counter() - began
        (result,) = Path(folder).glob("runs/*/result.json")
        found = json.loads(result.read_text(encoding="utf-8"))
    row: Row = {"recipe": name, "steps": recipe.engine.steps}
    row |= {"processor time, s": spent() - before, "wall time, s": seconds}
    return row | {"of which training, s": float(found["cost"]["seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=[DEFAULT], help="shipped recipes by name")
    names = parser.parse_args().recipes
    rows = [timed(name) for name in names]
    record(
        "Run time",
        f"A run takes under {LIMIT / 60:g} minutes of processor time from start to report, set-up excluded.",
        " ".join(["python benchmarks/run_time.py", *names]),
        rows,
        all(float(row["processor time, s"]) < LIMIT for row in rows),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
