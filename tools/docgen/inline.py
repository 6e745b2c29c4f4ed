"""Single figures inside hand-written sentences, and the verdicts that such sentences rest on.

    It takes <!-- value: fashion / teacher / nfe -->38<!-- end --> calls.
    <!-- rests on: fashion/near-teacher fails, ring/ttur holds -->

Forms, each ended by ``<!-- end -->``. WORLD / ARM / KEY may be preceded by ``METHOD /``, which is the page's own where
it is left out; KEY is a metric of the proof, a cost (``nfe``, ``params``, ``seconds``, ``minutes``, ``latency_ms``)
or, with ``floor`` as ARM, a number of the bench's floor.

    value: WORLD / ARM / KEY                the mean over seeds
    percent: WORLD / ARM / KEY              the same as a percentage
    spread: WORLD / ARM / KEY               mean and standard deviation
    ratio: WORLD / ARM / KEY over ARM       one arm's mean as a multiple of another's
    benchmark: NAME / ROW / COLUMN          of results/benchmarks/, ROW by its first cell

``rests on`` writes nothing: when a claim no longer has the verdict that a sentence was written for, the generator stops
and names the page.
"""

from __future__ import annotations

import re

from docgen.figures import number, spread
from docgen.sources import DocsError, Page, Sources

FIGURE = re.compile(r"(<!-- (value|percent|spread|ratio|benchmark): (.+?) -->)[^<]*(<!-- end -->)")
RESTS = re.compile(r"<!-- rests on: (.+?) -->", re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def fill(text: str, sources: Sources, page: Page) -> str:
    """The text with every inline figure made anew. Raises DocsError for a figure that is not there, and for a sentence
    that rests on another verdict than the results give."""
    for rests in RESTS.finditer(text):
        for condition in rests[1].split(","):
            check(condition.strip(), sources, page)
    return FIGURE.sub(lambda found: f"{found[1]}{figure(found[2], found[3], sources, page)}{found[4]}", text)


def figure(kind: str, asked: str, sources: Sources, page: Page) -> str:
    if kind == "benchmark":
        return benchmark(asked, sources)
    asked, _, other = asked.partition(" over ")
    slug, world, arm, key = address(asked, page)
    mean = sources.value(slug, world, arm, key)
    if kind == "ratio":
        ratio = mean / sources.value(slug, world, other.strip(), key)
        return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
    if kind == "percent":
        return f"{100 * mean:.3g} %"
    return spread(sources.arm(slug, world, arm, key)) if kind == "spread" else number(mean)


def address(asked: str, page: Page) -> tuple[str, str, str, str]:
    """METHOD, WORLD, ARM, KEY."""
    parts = [part.strip() for part in asked.split(" / ")]
    if len(parts) == 3 and page.slug:
        parts.insert(0, page.slug)
    if len(parts) != 4:
        raise DocsError(f"{page.name}: a figure is named METHOD / WORLD / ARM / KEY, not {asked!r}")
    slug, world, arm, key = parts
    return slug, world, arm, key


def benchmark(asked: str, sources: Sources) -> str:
    name, row, column = (part.strip() for part in asked.split(" / "))
    for record in sources.benchmarks:
        if record["name"] == name:
            for found in record["rows"]:
                if str(next(iter(found.values()))) == row and column in found:
                    return number(found[column])
    raise DocsError(f"no benchmark has {asked!r}")


def check(condition: str, sources: Sources, page: Page) -> None:
    """``[METHOD/]WORLD/CLAIM VERDICT``."""
    address, _, verdict = condition.partition(" ")
    *slug, world, name = address.split("/")
    found = sources.claim(slug[0] if slug else page.slug, world, name)["verdict"]
    if found != verdict:
        raise DocsError(f"{page.name}: a sentence rests on {address} being {verdict!r}; the results say {found!r}")


def plain(text: str) -> str:
    """Text to be shown on another page: without comments, and links as the words that they stand on."""
    return LINK.sub(r"\1", COMMENT.sub("", text))
