"""The methods, here and planned, as a table. Nothing heavy is imported for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def methods_table() -> Table:
    """Every method of the catalogue and of installed packages."""
    from importlib.metadata import entry_points

    import yaml
    from rich.table import Table

    package = Path(__file__).parent
    files = (package / "methods").glob("*/*.py")
    here = {path.stem.replace("_", "-") for path in files if path.stem != "__init__"}
    table = Table("method", "wing", "arXiv", "", "what it is for", box=None, header_style="bold", pad_edge=False)
    entries = yaml.safe_load((package / "catalogue.yaml").read_text(encoding="utf-8"))
    entries += [_entry_of(slug) for slug in sorted(here - {entry["slug"] for entry in entries})]
    for entry in sorted(entries, key=lambda entry: entry["slug"] not in here):
        style = "" if entry["slug"] in here else "dim"
        link = f"[link=https://arxiv.org/abs/{entry['arxiv']}]{entry['arxiv']}[/link]"
        state = "" if entry["slug"] in here else "planned"
        table.add_row(entry["slug"], entry["wing"], link, state, entry["purpose"], style=style)
    for point in entry_points(group="stillroom.methods"):
        table.add_row(point.name, "plug-in", "", "", point.dist.name if point.dist else point.value)
    return table


def _entry_of(slug: str) -> dict[str, str]:
    """A method that is not in the catalogue describes itself: the first sentence of its docstring."""
    import inspect

    from stillroom.method import get_method

    method = get_method(slug)
    purpose = inspect.cleandoc(method.__doc__ or "").split(". ")[0].rstrip(".").replace("\n", " ")
    return {"slug": slug, "arxiv": method.paper.arxiv, "wing": method.wing, "purpose": purpose}
