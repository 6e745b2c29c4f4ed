"""Try every method on every family of models that it may take, and write what happens; docs/models.md shows it.

    PYTHONPATH=src python tools/pairs.py pipelines     results/pipelines/pairs.json: text-to-image pipelines
    PYTHONPATH=src python tools/pairs.py models        results/models/pairs.json: classifiers, encoders, text encoders
    PYTHONPATH=src python tools/pairs.py pipelines --methods agd      what the record says of other methods stays

The models are those of tests/tiny_pipelines.py and tests/tiny_models.py; tests/tasks/test_model_pairs.py and
tests/tasks/pipelines/test_pipeline_pairs.py hold the records to what happens.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def pipelines(chosen: list[str]) -> dict[str, Any]:
    from pipeline_pairs import METHODS, STEPS, try_pair
    from stillroom.folders.pipeline_families import FAMILIES

    families = {}
    for name, family in FAMILIES.items():
        found = {method: try_pair(name, method) for method in chosen or METHODS}
        print(name, found, flush=True)
        families[name] = {"title": family.title, "pipelines": list(family.pipelines), "methods": found}
    return {"steps": STEPS, "families": families}


def models(chosen: list[str]) -> dict[str, Any]:
    from model_pairs import METHODS, STEPS, try_pair
    from tiny_models import SAVE

    kinds: dict[str, Any] = {}
    for kind, (families, _) in SAVE.items():
        kinds[kind] = {}
        for name, family in families.items():
            found = {
                method: try_pair(kind, name, method) for method in METHODS[kind] if method in (chosen or (method,))
            }
            print(kind, name, found, flush=True)
            kinds[kind][name] = {"title": family.title, "class": family.cls, "methods": found}
    return {"steps": STEPS, "kinds": kinds}


def added(old: dict[str, Any], new: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """The old record with what the new one says of ``methods``, and of what commit that is."""
    for kind in ("families", "kinds"):
        _add(old.get(kind, {}), new.get(kind, {}))
    own = {method: {"commit": new["commit"], "machine": new["machine"]} for method in methods}
    return old | {"later": old.get("later", {}) | own}


def _add(old: dict[str, Any], new: dict[str, Any]) -> None:
    for name, entry in new.items():
        if "methods" in entry:
            old[name]["methods"] |= entry["methods"]
        else:
            _add(old[name], entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("pipelines", "models"))
    parser.add_argument("--methods", nargs="+", default=[], help="only these; of others the record stays")
    asked = parser.parse_args()
    what = asked.what
    found = {"pipelines": pipelines, "models": models}[what](asked.methods)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = {
        "steps": found.pop("steps"), "commit": commit, "machine": f"{platform.system()} {platform.machine()}", **found,
    }  # fmt: skip
    path = ROOT / "results" / what / "pairs.json"
    if asked.methods:
        record = added(json.loads(path.read_text(encoding="utf-8")), record, asked.methods)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
