"""The page of the papers' settings: each recipe for a public model with its source, and what it takes by the plans."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from docgen.figures import number, table
from docgen.sources import DocsError, Page, Sources

RECORD = "The papers' settings, planned"
FOLDER = "src/stillroom/recipes/papers"
PAGE = "docs/papers.md"


def recipe_files(sources: Sources) -> dict[str, Path]:
    """Name -> file of every such recipe."""
    return {f"papers/{path.stem}": path for path in sorted((sources.root / FOLDER).glob("*.yaml"))}


def by_method(sources: Sources) -> dict[str, list[str]]:
    """Slug -> names of its recipes, methods in the order of the catalogue."""
    files, found = recipe_files(sources), {slug: list[str]() for slug in sources.implemented}
    for name, path in files.items():
        found[method_of(path, files)].append(name)
    return {slug: names for slug, names in found.items() if names}


def method_of(path: Path, files: dict[str, Path]) -> str:
    text = path.read_text(encoding="utf-8")
    if said := re.search(r"^method: (\S+)$", text, re.MULTILINE):
        return said[1]
    base = re.search(r"^base: (\S+)$", text, re.MULTILINE)
    if base is None or base[1] not in files:
        raise DocsError(f"{path.name} names neither a method nor a recipe of a paper")
    return method_of(files[base[1]], files)


def said_of(path: Path) -> str:
    """What the comment at the head of a recipe says, in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    return " ".join(head)


def block_papers(sources: Sources, page: Page) -> str:
    """For each method: its recipes' sources, and a table of what they take."""
    record = next((bench for bench in sources.benchmarks if bench["name"] == RECORD), None)
    plans = {plan["recipe"]: plan for plan in record["plans"]} if record else {}
    files, parts = recipe_files(sources), []
    for slug, names in by_method(sources).items():
        parts.append(f"## {slug}\n\n[What it does]({page.link(f'docs/methods/{slug}.md')}).")
        told = [f"- [`{name}`]({page.link(f'{FOLDER}/{files[name].name}')}): {said_of(files[name])}" for name in names]
        parts.append("\n".join(told))
        parts.append(plan_table([plans[name] for name in names if name in plans]) or "No plan has been recorded yet.")
    return "\n\n".join(parts)


def plan_table(plans: list[dict[str, Any]]) -> str:
    if not plans:
        return ""
    head = ["recipe", "batch, of micro-batches", "weights, trained of all", "memory of a step, of the run"]
    head += ["FLOPs of a step"]
    sizes = list(dict.fromkeys(size for plan in plans for size in plan["devices"]))
    head += [f"one device of {size}" for size in sizes]
    rows = [
        [
            f"`{plan['recipe']}`",
            f"{number(plan['batch'])}, of {number(plan['micro_batch'])}",
            f"{scaled(plan['trained'])} of {scaled(plan['parameters'])}",
            f"{scaled(plan['step'])}B, {scaled(plan['total'])}B",
            scaled(plan["flops_per_step"]),
            *(device(plan["devices"].get(size)) for size in sizes),
        ]
        for plan in plans
    ]
    return table(head, rows)


def device(found: dict[str, Any] | None) -> str:
    """What must be set on a device, and what the plan takes then."""
    if found is None:
        return "not tried yet"
    typed = " ".join(f"`{shlex.quote(argument)}`" for argument in found["arguments"])
    then = f"{scaled(found['total'])}B"
    if not found["fits"]:
        return f"too little with all that is known here: {then} by {typed}" if typed else f"too little: {then}"
    return f"{then} by {typed}" if typed else "as it is"


def scaled(value: float) -> str:
    """1.23 G; a unit may follow."""
    place, units = 0, ("", "k", "M", "G", "T", "P", "E")
    while abs(value) >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {units[place]}"
