"""Tables for the terminal."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from stillroom.method import Method, get_method, option_fields
from stillroom.recipe import papers
from stillroom.report.rows import facts
from stillroom.values import describe, describe_limits


def comparison(folders: Sequence[Path]) -> Table:
    """One column per run: quality beside the floor, speed, size, training cost."""
    runs = [facts(folder) for folder in folders]
    table = Table("", *(run["name"] for run in runs), header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = list(dict.fromkeys((group, label) for run in runs for group, label in run["rows"]))
    last = ""
    for group, label in rows:
        if last and group != last:
            table.add_section()
        last = group
        table.add_row(label, *(run["rows"].get((group, label), "–") for run in runs))
    return table


class Option(NamedTuple):
    """A method's option in words."""

    name: str
    default: str
    allowed: str
    meaning: str


def options_of(method: type[Method]) -> list[Option]:
    """Every option of a method; its meaning is the comment beside it, or the lines of comment above it."""
    kinds = typing.get_type_hints(method.Options)
    lines = inspect.getsource(method.Options).splitlines()
    found = []
    for name, field in option_fields(method).items():
        default = field.default_factory() if callable(field.default_factory) else field.default
        allowed = describe(kinds[name]) + describe_limits(field.metadata)
        found.append(Option(name, _short(default), allowed, _remark(lines, name)))
    return found


def _remark(lines: Sequence[str], name: str) -> str:
    at = next((i for i, line in enumerate(lines) if re.match(rf" *{name}: ", line)), None)
    if at is None:  # inherited from another class
        return ""
    if beside := re.search(r"  # (.*)$", lines[at]):
        return beside[1]
    above: list[str] = []
    while at and (comment := re.match(r" *# (.*)$", lines[at := at - 1])):
        above.insert(0, comment[1])
    return " ".join(above)


def options_table(slug: str) -> Table:
    """Every recipe key of a method: its options and the optimizers of its turns."""
    method = get_method(slug)
    title = f"{slug}: {method.paper.title}\n{method.paper.url}\n"
    table = Table(box=None, header_style="bold", pad_edge=False, title=title)
    table.add_column("recipe key", no_wrap=True)  # to be typed: never cut
    for head in ("default", "allowed", ""):
        table.add_column(head, overflow="fold")
    table.title_justify = table.caption_justify = "left"
    if names := papers(slug):
        table.caption = f"\nwith the paper's settings, on public models: {', '.join(names)}"
    for option in options_of(method):
        table.add_row(f"options.{option.name}", option.default, option.allowed, escape(option.meaning))
    for turn in method.turns_for(method.Options()):
        optim = f"{turn.optim.name}, lr {turn.optim.lr:g}"
        table.add_row(f"engine.optim.{turn.name}", optim, "a mapping", f"trains {', '.join(turn.trains)}")
    return table


def export_table(exported: Mapping[str, Any]) -> Table:
    """One row per file of an export: size, largest error, and its speed as a multiple of eager's, by batch."""
    files = exported["files"]
    batches = list(dict.fromkeys(row["batch"] for file in files.values() for row in file["latency"]))
    scores = list(dict.fromkeys(key for file in files.values() for key in file.get("scores", {}) if key != "n"))
    head = ["file", "MB", "max abs error", *(f"batch {batch}, ms (x eager)" for batch in batches), *scores]
    table = Table(*head, header_style="bold")
    for name, file in files.items():
        timed = {row["batch"]: f"{row['exported_ms']:.2f} ({row['ratio']:.2f}x)" for row in file["latency"]}
        scored = [f"{file['scores'][key]:.4f}" if "scores" in file else "–" for key in scores]
        error = f"{file['parity']['max_abs_error']:.2g}"
        table.add_row(name, f"{file['bytes'] / 1e6:.2f}", error, *(timed.get(b, "–") for b in batches), *scored)
    return table


def _short(default: Any) -> str:
    """A default as a recipe would say it: of a nested record, its kind and what differs from the record's defaults."""
    if not dataclasses.is_dataclass(default):
        return str(default).lower() if isinstance(default, bool) else str(default)
    first, *others = dataclasses.fields(default)
    changed = [f"{f.name} {value}" for f in others if (value := getattr(default, f.name)) != f.default]
    return ", ".join([str(getattr(default, first.name)), *changed])
