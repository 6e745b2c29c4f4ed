"""How soon the command line answers: `stillroom --help` in a fresh process, and what it imports on the way.

python benchmarks/start_up.py [--repeats N]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from common import Row, median, record

LIMIT = 2.0
COMMAND = [sys.executable, "-m", "stillroom", "--help"]
HEAVY = ("torch", "numpy", "scipy", "sklearn", "diffusers", "transformers", "peft", "matplotlib")


def seconds() -> float:
    began = time.perf_counter()
    subprocess.run(COMMAND, capture_output=True, check=True)
    return time.perf_counter() - began


def imported() -> set[str]:
    """The packages that ``--help`` imports."""
    told = subprocess.run([COMMAND[0], "-X", "importtime", *COMMAND[1:]], capture_output=True, text=True, check=True)
    return {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in told.stderr.splitlines() if "|" in line}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    times = [seconds() for _ in range(repeats)]
    heavy = sorted(imported() & set(HEAVY))
    row: Row = {
        "command": "stillroom --help", "fastest, s": min(times), "median, s": median(times), "heavy imports": len(heavy)
    }  # fmt: skip
    record(
        "Start-up",
        f"`stillroom --help` answers in under {LIMIT:g} s and imports none of {', '.join(HEAVY)}.",
        "python benchmarks/start_up.py",
        [row],
        min(times) < LIMIT and not heavy,
    )


if __name__ == "__main__":
    main()
