"""README's table, the index by purpose (docs/methods.md) and the pages of the wings.

Their lines come from the methods' own pages: the paragraph that begins with ``**In short.**``, and the table below
``### The paper's number beside ours``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from docgen import measured
from docgen.figures import table
from docgen.inline import plain
from docgen.method_pages import TO_WRITE
from docgen.sources import DocsError, Page, Sources

INDEX = "docs/methods.md"
IN_SHORT = re.compile(r"^\*\*In short\.\*\* (.+?)\n\n", re.DOTALL | re.MULTILINE)
BESIDE = re.compile(r"^### The paper's number beside ours\n(.*?)(?=^#|\Z)", re.DOTALL | re.MULTILINE)


def in_short(sources: Sources, slug: str) -> str:
    """The method's verdict in words; counted verdicts where its page has none yet."""
    found = IN_SHORT.search(sources.pages.get(slug, ""))
    words = " ".join(plain(found[1]).split()) if found else TO_WRITE
    return words if words != TO_WRITE else f"{measured.verdict_cell(sources, slug)}."


def purposes(sources: Sources) -> Iterator[tuple[str, list[str]]]:
    """The headings of docs/methods.md, each with the methods that its index block names."""
    path = sources.root / INDEX
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    named: set[str] = set()
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        slugs = [slug for found in re.findall(r"<!-- generated: index (.+?) -->", part) for slug in found.split()]
        if slugs:
            yield part.splitlines()[0], slugs
        named |= set(slugs)
    if rest := [slug for slug in sources.implemented if slug not in named]:
        yield "Not sorted yet", rest


def block_index(sources: Sources, page: Page, *slugs: str) -> str:
    """A list of methods: what each is for, and its verdict in words."""
    return "\n".join(line(sources, page, slug) for slug in slugs)


def line(sources: Sources, page: Page, slug: str) -> str:
    if slug not in sources.files:
        raise DocsError(f"{page.name}: the index names {slug!r}, which is not here")
    purpose = sources.entry(slug)["purpose"]
    return f"- **[{slug}]({page.link(f'docs/methods/{slug}.md')})**: {purpose}. *{in_short(sources, slug)}*"


def block_unsorted(sources: Sources, page: Page) -> str:
    """Methods that no index block names."""
    rest = [slugs for title, slugs in purposes(sources) if title == "Not sorted yet"]
    return f"## Not sorted yet\n\n{block_index(sources, page, *rest[0])}" if rest else ""


def block_methods(sources: Sources, page: Page) -> str:
    """One row for each method that is here, by purpose."""
    rows = []
    for title, slugs in purposes(sources):
        for slug in slugs:
            link = f"[{slug}]({page.link(f'docs/methods/{slug}.md')})"
            said = [in_short(sources, slug), *waiting(sources, slug)]
            rows.append([f"**{title}**" if slug == slugs[0] else "", link, " ".join(said)])
    return table(["to get", "method", "what was measured here"], rows)


def waiting(sources: Sources, slug: str) -> list[str]:
    """How many of a method's claims were not measured, in words; nothing where all were."""
    claims = sources.claims(slug)
    count = sum(claim["verdict"] == "not measured" for claim in claims)
    return [f"Not measured yet: {count} of its {len(claims)} claims."] if count else []


def block_unmeasured(sources: Sources, page: Page) -> str:
    """Every claim that has no verdict since arms were not run."""
    claims = [(slug, claim) for slug in sources.implemented for claim in sources.claims(slug)]
    rows = [
        f"- [{slug}]({page.link(f'docs/methods/{slug}.md')}), {claim['level']} level, world `{claim['world']}`: "
        f"{claim['statement']}{measured.untrained(claim)}"
        for slug, claim in claims
        if claim["verdict"] == "not measured"
    ]
    if not rows:
        return f"All {len(claims)} claims of the proofs were measured."
    said = f"{len(rows)} of the {len(claims)} claims of the proofs have no verdict yet, since arms were not "
    return "\n".join([f"{said}run:", "", *rows])


def block_planned(sources: Sources, page: Page) -> str:
    """The methods that are not here yet, folded."""
    planned = [entry for entry in sources.catalogue if entry["slug"] not in sources.files]
    base = [entry["slug"] for entry in planned if entry.get("foundation")]
    rows = [
        [e["slug"], f"[{e['arxiv']}](https://arxiv.org/abs/{e['arxiv']})", e["wing"], e["purpose"]] for e in planned
    ]
    also = f", and {' and '.join(base)}, on which some of them build" if base else ""
    summary = f"<summary>{len(planned) - len(base)} more are planned{also}</summary>"
    return f"<details>\n{summary}\n\n{table(['method', 'paper', 'wing', 'what it is for'], rows)}\n\n</details>"


def block_count(sources: Sources, page: Page) -> str:
    small = [slug for slug in sources.implemented if sources.entry(slug).get("small")]
    whole = [slug for slug in sources.implemented if slug not in small]
    total = sum(not (entry.get("foundation") or entry.get("small")) for entry in sources.catalogue)
    proven = sum(bool(sources.results.get(slug)) for slug in whole)
    beside = f" Beside them are {len(small)} small ones, to compare with: {', '.join(small)}." if small else ""
    return f"{total} methods in all: {len(whole)} are here, {proven} of them with measured results.{beside}"


def block_wing(sources: Sources, page: Page, wing: str) -> str:
    """The wing's methods: verdicts, and the two sides of each one's first claim."""
    rows = [
        [
            f"[{slug}]({page.link(f'docs/methods/{slug}.md')})",
            measured.verdict_cell(sources, slug),
            measured.first_claim(sources, slug),
        ]
        for slug in sources.implemented
        if sources.entry(slug)["wing"] == wing
    ]
    return table(["method", "claims", "first claim: its two sides"], rows)


def block_beside(sources: Sources, page: Page, wing: str) -> str:
    """The wing's tables of the papers' numbers beside ours, in one."""
    head: list[str] = []
    rows = []
    for slug in sources.implemented:
        found = BESIDE.search(sources.pages.get(slug, ""))
        if sources.entry(slug)["wing"] != wing or not found:
            continue
        lines = [line for line in plain(found[1]).splitlines() if line.startswith("|")]
        head, _, *cells = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
        rows += [[f"[{slug}]({page.link(f'docs/methods/{slug}.md')})", *row] for row in cells]
    return table(["method", *head], rows) if rows else "No page of this wing gives a number of its paper."
