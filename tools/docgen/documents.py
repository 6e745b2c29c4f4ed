"""Finds the generated parts of a document and writes them anew.

What stands between ``<!-- generated: NAME [ARGUMENT ...] -->`` and ``<!-- end -->`` is made by the
function of that name; single figures inside sentences are explained in ``docgen.inline``. All else is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from docgen import evidence, few_steps, indexes, inline, method_pages, papers, reference
from docgen.sources import DocsError, Page, Sources

BLOCK = re.compile(r"(<!-- generated: ([a-z0-9 -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCKS: dict[str, Callable[..., str]] = {
    name.removeprefix("block_"): function
    for module in (method_pages, indexes, evidence, few_steps, papers, reference)
    for name, function in vars(module).items()
    if name.startswith("block_")
}


def regenerate(text: str, sources: Sources, page: Page) -> str:
    """The text with every generated part made anew. Raises DocsError for a part that nothing makes."""

    def made(found: re.Match[str]) -> str:
        name, *arguments = found[2].split()
        if name not in BLOCKS:
            raise DocsError(f"{page.name}: nothing makes {name!r}; there are {', '.join(sorted(BLOCKS))}")
        block = BLOCKS[name](sources, page, *arguments)
        return f"{found[1]}{block}{chr(10) if block else ''}{found[3]}"

    return inline.fill(BLOCK.sub(made, text), sources, page)


def documents(sources: Sources) -> dict[Path, str]:
    """Path -> text as it should be, of README.md and of every page in docs/. A method without a page gets a draft of
    one. Pages of methods are made first: the indexes take lines from them."""
    docs, texts = sources.root / "docs", {}
    for slug in sources.implemented:
        path = docs / "methods" / f"{slug}.md"
        text = path.read_text(encoding="utf-8") if path.exists() else method_pages.draft(slug)
        texts[path] = sources.pages[slug] = regenerate(text, sources, Page(path, sources.root))
    for path in [sources.root / "README.md", *sorted(docs.rglob("*.md"))]:
        if path not in texts:
            texts[path] = regenerate(path.read_text(encoding="utf-8"), sources, Page(path, sources.root))
    return texts
