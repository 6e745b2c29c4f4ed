"""The generated parts of docs/methods/<slug>.md, and the first draft of such a page."""

from __future__ import annotations

from typing import Any

from docgen import measured, papers
from docgen.figures import number, table
from docgen.sources import Page, Sources

SECTIONS = (
    "What it is for",
    "When to choose it, and when not",
    "Formulas and code",
    "Quick use",
    "Turns and options",
    "Health numbers",
    "Deviations from the paper",
    "Measured",
    "Cost",
)
"""Of every method's page, in this order."""

TO_WRITE = "(To be written.)"
GENERATED = {
    "Turns and options": ("turns", "options"),
    "Health numbers": ("health",),
    "Measured": ("measured",),
    "Cost": ("cost",),
}


def draft(slug: str) -> str:
    """A page with every section and generated part, the rest to be written by hand."""
    lines = [f"# {slug}", "", *empty("card"), "", f"**In short.** {TO_WRITE}", ""]
    for section in SECTIONS:
        lines += [f"## {section}", ""]
        for block in GENERATED.get(section, ()):
            lines += [*empty(block), ""]
        lines += [] if section in GENERATED else [TO_WRITE, ""]
    return "\n".join(lines).rstrip() + "\n"


def empty(block: str) -> list[str]:
    return [f"<!-- generated: {block} -->", "<!-- end -->"]


def block_card(sources: Sources, page: Page) -> str:
    """Paper, code, commands."""
    cls = sources.classes[page.slug]
    paper, file = cls.paper, sources.files[page.slug].relative_to(sources.root).as_posix()
    venue = f", {paper.venue}" if paper.venue else ""
    authors = f" · authors' code: [{paper.code}](https://github.com/{paper.code})" if paper.code else ""
    wing = f"docs/wings/{cls.wing}.md"
    said = f"[{cls.wing}]({page.link(wing)})" if (sources.root / wing).exists() else cls.wing
    return (
        f"Paper: [{paper.title}]({paper.url}) ({paper.year}{venue}){authors}  \n"
        f"Here: [{file}]({page.link(file)}) · wing {said} · task `{cls.task}`  \n"
        f"Commands: `stillroom run {page.slug}` · `stillroom prove {page.slug}` · `stillroom methods {page.slug}`"
        f"{paper_settings(sources, page)}"
    )


def paper_settings(sources: Sources, page: Page) -> str:
    """A line of the recipes for public models, where there are some."""
    names = ", ".join(f"`{name}`" for name in papers.by_method(sources).get(page.slug, []))
    return f"  \n[The paper's settings]({page.link(papers.PAGE)}): {names}" if names else ""


def block_turns(sources: Sources, page: Page) -> str:
    """Who trains what, how often, in the order of a step; and what must be set for a turn to exist."""
    every = sources.classes[page.slug].turns_for(object())  # something without options switches nothing off
    if not every:
        return "It trains nothing."
    head = ["turn", "trains", "every", "optimizer by default"]
    rows = [[f"`{t.name}`", ", ".join(t.trains), rhythm(t.every), optimizer(t.optim)] for t in every]
    if any(t.when for t in every):
        head.append("only with")
        rows = [[*row, ", ".join(f"`{name}`" for name in t.when)] for row, t in zip(rows, every, strict=True)]
    said = "Turns, in the order of a step:"
    if len(head) > 4:
        said = (
            "Turns, in the order of a step. A turn is left out where what stands under *only with* (options, or what "
        )
        said += "the method's file derives from them and from what it is given) is zero or false:"
    return f"{said}\n\n{table(head, rows)}"


def rhythm(every: int | str) -> str:
    return f"`{every}` steps" if isinstance(every, str) else "step" if every == 1 else f"{every} steps"


def optimizer(optim: Any) -> str:
    changed = {k: v for k, v in vars(optim).items() if k != "name" and v != getattr(type(optim)(), k)}
    return ", ".join([optim.name, f"lr {optim.lr:g}", *(f"{k} {v}" for k, v in changed.items() if k != "lr")])


def block_options(sources: Sources, page: Page) -> str:
    """Every option with its default, what is allowed, and what it means."""
    cls = sources.classes[page.slug]
    from stillroom.report.tables import options_of  # found by Sources.classes

    rows = [[f"`{o.name}`", f"`{o.default}`" if o.default else "", o.allowed, o.meaning] for o in options_of(cls)]
    if not rows:
        return "It has no options."
    head = ["option", "default", "allowed", "meaning"]
    said = "Options, `options.NAME` in a recipe, a keyword argument in Python. Defaults are those of the class; the "
    return f"{said}shipped recipe may set others.\n\n" + table(head, rows)


def block_health(sources: Sources, page: Page) -> str:
    """What each logged number means, and where it lay in the proof."""
    meanings: dict[str, str] = getattr(sources.classes[page.slug], "health", {})
    bands: dict[str, list[float]] = {}
    for result in sources.results.get(page.slug, []):
        bands |= {k.removeprefix("health/"): v for k, v in (result.get("health") or {}).items() if "health/" in k}
    names = list(dict.fromkeys([*meanings, *bands]))
    if not names:
        return "It logs the losses and gradient norms of its turns, and nothing else."
    rows = [[f"`{name}`", meanings.get(name, ""), band(bands.get(name))] for name in names]
    return table(["`health/...`", "what it is", "in the proof"], rows)


def band(values: list[float] | None) -> str:
    return "" if values is None else " to ".join(number(value) for value in values)


def block_measured(sources: Sources, page: Page) -> str:
    return measured.claims_and_arms(sources, page.slug)


def block_cost(sources: Sources, page: Page) -> str:
    return measured.costs(sources, page.slug)
