"""Try every score method on every family of text-to-image pipelines and write results/pipelines/pairs.json.

    PYTHONPATH=src python tools/pipeline_pairs.py

The pipelines are those of tests/tiny_pipelines.py; tests/test_pipeline_pairs.py holds the record to what happens.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    from pipeline_pairs import METHODS, STEPS, try_pair
    from stillroom.models.pipeline_families import FAMILIES

    families = {}
    for name, family in FAMILIES.items():
        found = {method: try_pair(name, method) for method in METHODS}
        print(name, found, flush=True)
        families[name] = {"title": family.title, "pipelines": list(family.pipelines), "methods": found}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = {
        "steps": STEPS, "commit": commit, "machine": f"{platform.system()} {platform.machine()}", "families": families,
    }  # fmt: skip
    path = ROOT / "results" / "pipelines" / "pairs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
