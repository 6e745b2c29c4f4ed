"""Across all methods: the papers' numbers beside ours, and what did not show, with the reasons.

Both are collected from the pages of the methods: the table below ``### The paper's number beside ours``, and the
paragraphs that say why claims fail or are unresolved:

    <!-- why: fashion/two-heads fails, digits/captions unresolved -->
    The teacher is right too often ...

The generator stops where a method has no such table, where a number of a paper lacks its place or its reason, and where
a claim fails or is unresolved and no paragraph says why, or says it of another verdict. Drafts are passed over.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from docgen import inline
from docgen.figures import VERDICTS, metric_name, number, table
from docgen.indexes import BESIDE
from docgen.method_pages import TO_WRITE
from docgen.sources import DocsError, Page, Sources

PLACE = re.compile(
    r"\b(table|fig(ure)?|section|abstract|appendix|README|project page|notebook|reviews|ablation)\b", re.IGNORECASE
)
"""Where in a paper, or beside it, a number stands."""
WHY = re.compile(r"<!-- why: (.+?) -->\s*(.+?)(?=\n\n|\Z)", re.DOTALL)
OPEN = ("fails", "unresolved")
"""Verdicts that need a reason."""
COUNTED = {"holds": "hold", "fails": "fail", "unresolved": "are unresolved", "not measured": "were not measured"}


def written(sources: Sources) -> list[str]:
    """The methods whose pages are no drafts any more."""
    return [slug for slug in sources.implemented if TO_WRITE not in sources.pages.get(slug, "")]


def block_numbers(sources: Sources, page: Page) -> str:
    """The tables of all methods in one."""
    rows = []
    for slug in written(sources):
        found = BESIDE.search(sources.pages.get(slug, ""))
        lines = [line for line in inline.plain(found[1]).splitlines() if line.startswith("|")] if found else []
        if len(lines) < 3:
            raise DocsError(f"docs/methods/{slug}.md gives no number of its paper beside ours")
        for line in lines[2:]:
            what, theirs, ours, why = (part.strip() for part in line.strip("|").split("|"))
            if not PLACE.search(f"{what} {theirs}") or not why:
                said = f"docs/methods/{slug}.md, {what!r}: the paper's number needs its place (a table, a figure, a "
                raise DocsError(f"{said}section), and a reason why ours cannot be compared")
            rows.append([f"[{slug}]({page.link(f'docs/methods/{slug}.md')})", what, theirs, ours, why])
    return table(["method", "what", "in the paper", "here", "why they cannot be compared"], rows)


def block_verdicts(sources: Sources, page: Page) -> str:
    """How many claims of all methods hold, fail, are unresolved and were not measured."""
    counts = Counter(claim["verdict"] for slug in sources.implemented for claim in sources.claims(slug))
    told = ", ".join(f"{counts[verdict]} {words}" for verdict, words in COUNTED.items() if counts[verdict])
    return f"Of {counts.total()} claims {told}."


def block_shortfalls(sources: Sources, page: Page) -> str:
    """Method by method, every claim that fails or is unresolved, with its numbers and the reason."""
    parts = []
    for slug in written(sources):
        told = [part for conditions, text in whys(sources, slug) for part in said(sources, slug, conditions, text)]
        if told:
            parts += [
                f"### {slug}\n\n[What it does and all that was measured]({page.link(f'docs/methods/{slug}.md')})."
            ]
            parts += told
    return "\n\n".join(parts) or "All claims that were measured hold."


def whys(sources: Sources, slug: str) -> list[tuple[list[str], str]]:
    """Conditions (``WORLD/CLAIM VERDICT``) and text of each paragraph. Raises DocsError for a claim that none names."""
    name = f"docs/methods/{slug}.md"
    found = [
        ([part.strip() for part in named.split(",")], reason)
        for named, reason in WHY.findall(sources.pages.get(slug, ""))
    ]
    named = {condition for conditions, _ in found for condition in conditions}
    known = {f"{c['world']}/{c['id']} {c['verdict']}" for c in sources.claims(slug) if c["verdict"] in OPEN}
    if missing := sorted(known - named):
        cure = f"write a paragraph there that begins with <!-- why: {', '.join(missing)} -->"
        raise DocsError(f"{name} does not say why {', '.join(missing)}; {cure}")
    if stale := sorted(named - known):
        raise DocsError(
            f"{name} says why {', '.join(stale)}, which the results do not say; look at the paragraph again"
        )
    return found


def said(sources: Sources, slug: str, conditions: list[str], text: str) -> list[str]:
    """The claims that a paragraph is about, as a list, and the paragraph."""
    claims = [sources.claim(slug, *condition.partition(" ")[0].split("/")) for condition in conditions]
    lines = [
        f"- {VERDICTS[c['verdict']]}: {c['statement']} ({c['level']} level, world `{c['world']}`; "
        f"{metric_name(c['metric'], c['floor'])}: {c['margin']}): {sides(c)}"
        for c in claims
    ]
    return ["\n".join(lines), " ".join(inline.plain(text).split())]


def sides(claim: dict[str, Any]) -> str:
    """The values of its two arms, seed by seed."""
    values = [claim["arms"][side]["values"] for side in (claim["left"], claim["right"]) if side]
    return " against ".join(", ".join(map(number, side)) for side in values)
