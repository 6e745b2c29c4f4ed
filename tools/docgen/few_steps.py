"""The page that compares the methods for few steps: what their wings' pages say of them beside what was measured.

What a method reads, in how many steps it draws and what it keeps in memory stands in the table by hand at the top of
its wing's page; distance, calls and times are those of its proof on one bench.
"""

from __future__ import annotations

import re
from typing import Any

from docgen.figures import number, spread, table
from docgen.sources import DocsError, Page, Sources

WINGS = ("trajectory", "score")
BENCH, DISTANCE = "fashion", "fd"
COLUMNS = ("needs real images", "steps", "networks beside the teacher")
"""Headings in a wing's table."""
SCALE = ("dmd2", "teacher")
"""Whose proof has the arms of the teacher itself."""


def block_fewsteps(sources: Sources, page: Page) -> str:
    """A row for each method of these wings and each of its own arms; methods without arms say that they were not
    measured."""
    head = ["method", "needs real images", "steps", "networks beside the teacher", "FD", "times the teacher's"]
    head += ["calls", "training, s", "latency, ms"]
    of_teacher = known(sources, *SCALE)
    rows = [
        ["the teacher itself", "", "", "", *measured(of_teacher, of_teacher)],
        ["the teacher, one step", "", "", "", *measured(known(sources, SCALE[0], "teacher-1"), of_teacher)],
    ]
    for wing in WINGS:
        told = facts(sources, wing)
        for slug in sources.implemented:
            if sources.entry(slug)["wing"] != wing:
                continue
            if slug not in told and "title" not in sources.entry(slug):  # in no catalogue: it need not be in the table
                continue
            if slug not in told:
                raise DocsError(f"docs/wings/{wing}.md: the table at its top has no row for {slug}")
            link = f"[{slug}]({page.link(f'docs/methods/{slug}.md')})"
            for name in own_arms(sources, slug) or [slug]:
                arm = known(sources, slug, name)
                said = link if name == slug else f"{link}, {name.removeprefix(slug).strip('-, ')}"
                rows.append([said, *told[slug], *measured(arm, of_teacher)])
    return table(head, rows)


def facts(sources: Sources, wing: str) -> dict[str, list[str]]:
    """What the first table of a wing's page says of each method, by slug."""
    path = sources.root / "docs" / "wings" / f"{wing}.md"
    found: dict[str, list[str]] = {}
    places: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            places = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if all(name in cells for name in COLUMNS):
            places = [cells.index(name) for name in COLUMNS]
        elif places and (slug := re.match(r"\[([a-z0-9-]+)\]", cells[0])):
            found[slug[1]] = [cells[place] for place in places]
    if not found:
        raise DocsError(f"docs/wings/{wing}.md: no table with the columns {', '.join(COLUMNS)}")
    return found


def own_arms(sources: Sources, slug: str) -> list[str]:
    """The arms on the bench that are the method itself: those that bear its name, and those of several steps."""
    return [name for name in arms(sources, slug) if name.startswith(slug) or re.search(r"\b\d+[- ]steps?$", name)]


def known(sources: Sources, slug: str, name: str) -> dict[str, Any] | None:
    return arms(sources, slug).get(name)


def arms(sources: Sources, slug: str) -> dict[str, dict[str, Any]]:
    """What was measured of a method's arms on the bench, by name; of those that were not run at every seed, after all
    others, with the ``seeds`` that there are."""
    claims = [c for c in sources.claims(slug) if c["world"] == BENCH and c["metric"] == DISTANCE]
    found = {name: arm for claim in claims for name, arm in claim["arms"].items()}
    for result in sources.results.get(slug, []):
        for name, arm in result.get("partly", {}).get(BENCH, {}).items():
            found.setdefault(name, arm[DISTANCE] | {"seeds": arm["seeds"]})
    return found


def measured(arm: dict[str, Any] | None, of_teacher: dict[str, Any] | None) -> list[str]:
    if arm is None:
        return ["not measured", "", "", "", ""]
    cost = arm.get("cost") or {}
    ratio = arm["mean"] / of_teacher["mean"] if arm["mean"] and of_teacher and of_teacher["mean"] else None
    trained = cost.get("seconds") if cost.get("steps") else None
    shown = [f"{ratio:.2g}" if ratio else "–", number(cost.get("nfe")), number(trained), number(cost.get("latency_ms"))]
    seeds = [str(seed) for seed in arm.get("seeds", ())]
    only = f", seed{'s' * (len(seeds) > 1)} {' and '.join(seeds)} alone" if seeds else ""
    return [spread(arm) + only, *shown]
