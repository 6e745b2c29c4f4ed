"""Claims, arms and costs of a proof."""

from __future__ import annotations

from collections import Counter
from typing import Any

from docgen.figures import COSTS, VERDICTS, metric_name, number, spread, table, where
from docgen.sources import Sources


def verdict_cell(sources: Sources, slug: str) -> str:
    """How many claims hold, fail and are unresolved, level by level."""
    if slug not in sources.files:
        return "planned"
    if not (claims := sources.claims(slug)):
        return "not proven yet"
    parts = []
    for level in dict.fromkeys(claim["level"] for claim in claims):
        counts = Counter(claim["verdict"] for claim in claims if claim["level"] == level)
        parts.append(f"{level}: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]))
    return "; ".join(parts)


def first_claim(sources: Sources, slug: str) -> str:
    """The two sides of the first claim that was measured."""
    if not (claims := [c for c in sources.claims(slug) if c["verdict"] != "not measured"]):
        return ""
    claim = claims[0]
    sides = [f"{side} {spread(claim['arms'][side])}" for side in (claim["left"], claim["right"]) if side]
    return f"{metric_name(claim['metric'], claim['floor'])}: " + ", ".join(sides)


def by_world(claims: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(level, world) -> its claims, in their order."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for claim in claims:
        groups.setdefault((claim["level"], claim["world"]), []).append(claim)
    return groups


def claims_and_arms(sources: Sources, slug: str) -> str:
    """For each world: every claim with its verdict, and a table of the arms."""
    parts = []
    for (level, world), here in by_world(sources.claims(slug)).items():
        result, floor = here[0]["result"], here[0]["floor"]
        seeds = ", ".join(map(str, result["seeds"]))
        note = (result.get("notes") or {}).get(world, "")
        said = [
            f"- {VERDICTS[claim['verdict']]}: {claim['statement']} ({claim['paper']}{'; ' if claim['paper'] else ''}"
            f"{metric_name(claim['metric'], floor)}: {claim['margin']}){untrained(claim)}"
            for claim in here
        ]
        parts += [f"**{level.capitalize()} level**, world `{world}`, seeds {seeds}", "\n".join(said)]
        parts += [note] if note else []
        if any(claim["arms"] for claim in here):
            parts += [arm_table(here, floor), f"Measured at {where(result)}."]
    return "\n\n".join(parts) or "No result has been recorded yet."


def untrained(claim: dict[str, Any]) -> str:
    """Which arms a claim still waits for."""
    names = ", ".join(f"`{name}`" for name in claim.get("unmeasured", ()))
    return f"; not run: {names}" if names else ""


def arm_table(claims: list[dict[str, Any]], floor: dict[str, Any]) -> str:
    """One row per arm, one column per metric that the claims use; below, the bench's floor."""
    metrics = {claim["metric"]: claim["arms"] for claim in claims}
    names = list(dict.fromkeys(name for claim in claims for name in (*claim["arms"], *claim.get("unmeasured", ()))))
    rows = [[name, *(spread(measured.get(name)) for measured in metrics.values())] for name in names]
    if any(metric in floor for metric in metrics):
        rows.append(["the bench's floor", *(number(floor.get(metric)) for metric in metrics)])
    return table(["arm", *(metric_name(metric, floor) for metric in metrics)], rows)


def costs(sources: Sources, slug: str) -> str:
    """For each world a table of what the arms cost, means over seeds."""
    parts = []
    for (level, world), here in by_world(sources.claims(slug)).items():
        arms = {name: arm.get("cost") or {} for claim in here for name, arm in claim["arms"].items()}
        if not arms:
            continue
        rows = [[name, *(number(cost.get(key)) for key in COSTS)] for name, cost in arms.items()]
        parts += [f"**{level.capitalize()} level**, world `{world}`", table(["arm", *COSTS.values()], rows)]
    if not parts:
        return "No result has been recorded yet."
    said = (
        "Means over seeds, at batch 1. The arms were measured at different times on a machine that may have had other "
    )
    return "\n\n".join([f"{said}work: take seconds and milliseconds as orders of magnitude.", *parts])
