"""What the papers' settings take on the public models' own sizes, and what to change on one device of 24 and of 80 GB.

    python benchmarks/paper_plans.py                      every recipe in recipes/papers/
    python benchmarks/paper_plans.py papers/dmd2-sdxl     only this one, the others stay as they are

Plans alone: networks are made from their configs, without weights, and nothing is trained or measured. A device is
taken to hold what leaves a tenth of its memory free, for what no plan knows. The changes are tried one upon the other,
those first that leave the trained weights as they are, until it fits; those that cannot be enough, by what is there
all the time, together with the next ones. Writes results/benchmarks/paper-plans.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.errors import UserError
from stillroom.files import write
from stillroom.planning import Plan, plan
from stillroom.proofs.runner import commit, machine
from stillroom.recipe import Recipe, papers

RECORD = Path(os.environ.get("STILLROOM_RESULTS", "results")) / "benchmarks" / "paper-plans.json"
DEVICES = {"24 GB": 24e9, "80 GB": 80e9}
ROOM = 0.9
"""Of a device's memory, the part that a plan may fill."""


def steps(recipe: Recipe) -> list[tuple[str, ...]]:
    """The changes, in order, each as arguments of the command line. What a recipe has already is left out."""
    engine, found = recipe.engine, []
    if not engine.activation_checkpointing:
        found.append(("engine.activation_checkpointing=true",))
    if engine.accumulate < engine.batch:
        found.append((f"engine.accumulate={engine.batch}",))
    found.append(("engine.offload=true",))
    if engine.precision != "bf16":
        found.append(("engine.precision=bf16",))
    found.append(("engine.optim.all.name=adamw8bit",))
    if engine.ema:
        found.append(("engine.export=student", "engine.ema=[]"))
    roles = [role for role in ("fake", "student") if role in recipe.trained() and role not in recipe.lora]
    found += [(f"lora.{role}={{rank: 64}}",) for role in roles]
    return found


def planned(recipe: Recipe) -> Plan | None:
    """None where a method or its networks cannot be run so."""
    try:
        return plan(recipe)
    except (UserError, ValueError):  # ValueError: batch norm's, of a micro-batch of one row
        return None


def least(found: Plan, changes: Sequence[tuple[str, ...]]) -> float:
    """Bytes that the plan takes at least with these changes: what is there all the time and, at the update, the
    gradients. Adapters change all of it."""
    most = 0.0
    for turn in found.turns:
        kept: list[float] = [turn.weights, turn.optimizer, turn.averages]
        gradients = min(turn.gradients, turn.total - sum(kept))
        for argument in (argument for change in changes for argument in change):
            if argument.startswith("lora."):
                return 0.0
            if argument.startswith("engine.offload"):
                kept[0] -= min(kept[0], 4 * turn.frozen)
            elif argument.endswith("adamw8bit"):
                kept[1] /= 4
            elif argument.startswith("engine.ema"):
                kept[2] = 0.0
        most = max(most, sum(kept) + gradients)
    return most


def fitted(recipe: Recipe, first: Plan) -> dict[str, dict[str, Any]]:
    """For each device the arguments with which it holds the plan, and the plan's bytes; ``fits``: whether it does.
    Changes that cannot be enough by themselves are made together with the next ones."""
    found: dict[str, dict[str, Any]] = {}
    at, best, arguments = recipe, first, list[str]()
    todo, alone = steps(recipe), 0
    for name, size in sorted(DEVICES.items(), key=lambda item: -item[1]):
        while best.total > ROOM * size and todo:
            together = [todo.pop(0)]
            while todo and not alone and least(best, together) > ROOM * size:
                together.append(todo.pop(0))
            alone = max(0, alone - 1)
            told = [argument for change in together for argument in change]
            tried = at.changed(*told)
            made = planned(tried)
            if made is not None and made.total < best.total:
                at, best = tried, made
                arguments += told
            elif len(together) > 1:  # one of them cannot be made here, or takes more
                todo, alone = together + todo, len(together)
        found[name] = {"arguments": list(arguments), "total": best.total, "fits": best.total <= ROOM * size}
    return found


def row(name: str, first_only: bool) -> dict[str, Any]:
    started = time.perf_counter()
    recipe = Recipe.load(name)
    first = plan(recipe)
    trained = max(turn.trained for turn in first.turns)
    networks = max(turn.trained + turn.frozen for turn in first.turns)
    engine = recipe.engine
    return {
        "recipe": name,
        "method": recipe.method,
        "teacher": recipe.teacher,
        "student": recipe.student,
        "batch": engine.batch,
        "micro_batch": engine.batch // engine.accumulate,
        "steps": engine.steps,
        "trained": trained,
        "parameters": networks,
        "step": max(turn.total for turn in first.turns),
        "total": first.total,
        "flops_per_step": first.flops,
        "devices": {} if first_only else fitted(recipe, first),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="by name; default: all")
    parser.add_argument("--as-is", action="store_true", help="the recipe as it is alone, no device")
    asked = parser.parse_args()
    chosen = asked.recipes or papers()
    known = json.loads(RECORD.read_text())["plans"] if RECORD.is_file() else []
    rows = {found["recipe"]: found for found in known if found["recipe"] in papers()}
    for name in chosen:
        rows[name] = row(name, asked.as_is)
        print(name, f"{rows[name]['total'] / 1e9:.1f} GB", rows[name]["seconds"], "s", flush=True)
        record = {
            "name": "The papers' settings, planned",
            "statement": "Plans of the recipes in recipes/papers/, on the public models' own sizes; docs/papers.md has "
            "them.",
            "command": "python benchmarks/paper_plans.py",
            "commit": commit(),
            "machine": machine(),
            "room": ROOM,
            "plans": [rows[key] for key in sorted(rows)],
        }
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        write(RECORD, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
