"""The Python interface, which method runs on which family of models, and the recorded benchmarks."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from docgen.figures import VERDICTS, number, table, where
from docgen.sources import Page, Sources


def block_benchmarks(sources: Sources, page: Page) -> str:
    if not sources.benchmarks:
        return "No benchmark has been recorded yet."
    sections = []
    for bench in sources.benchmarks:
        lines = [f"### {bench['name']}", "", bench["statement"], ""]
        if bench.get("rows"):
            lines += [rows_of(bench), ""]
        facts = [f"Verdict: {VERDICTS.get(bench['verdict'], bench['verdict'])}"] if bench.get("verdict") else []
        facts += [f"`{bench['command']}`"] if bench.get("command") else []
        facts += [where(bench)]
        sections.append("\n".join([*lines, " · ".join(facts)]))
    return "\n\n".join(sections)


def block_student(sources: Sources, page: Page) -> str:
    """The shipped text-to-image student beside its teachers, in the words of a report's first line, and in a table."""
    from stillroom.report.rows import in_one_line  # found by Sources.classes

    bench = next((bench for bench in sources.benchmarks if bench["name"] == "Text to image"), None)
    if bench is None:
        return "Not measured yet."
    *teachers, student = bench["rows"]
    name = {key: next(column for column in student if column.startswith(key)) for key in ("SceneEval", "FD")}
    labels = {"SceneEval": {"label": "SceneEval"}, "FD": {"label": "Fréchet distance", "better": "lower"}}
    everyone = {row["model"]: row for row in teachers} | {"student": student}
    line = in_one_line(
        {
            who: {"params": row["parameters"], "latency_ms": {"1": row["latency, batch 1, ms"]}}
            for who, row in everyone.items()
        }
        | {
            "teachers": [row["model"] for row in teachers],
            "metrics": [{"key": key, "name": key, **label} for key, label in labels.items()],
            "scores": {who: {key: row[column] for key, column in name.items()} for who, row in everyone.items()},
        }
    )
    return f"{line}\n\n{rows_of(bench)}"


def rows_of(bench: dict[str, Any]) -> str:
    head = list(dict.fromkeys(key for row in bench["rows"] for key in row))
    return table(head, [[number(row.get(key)) for key in head] for row in bench["rows"]])


def block_gpu(sources: Sources, page: Page) -> str:
    """Whether tools/gpu_check.py was ever run on a device, and where its table stands."""
    found = next((bench for bench in sources.benchmarks if bench["name"] == "GPU self-check"), None)
    if found is None:
        return "Not run on a GPU yet: `make gpu` has recorded nothing, and all that is said of speed here is of CPUs."
    good = sum(row["outcome"] == "ok" for row in found["rows"])
    return (
        f"Run on {found['machine']}: {good} of {len(found['rows'])} parts ok "
        f"([table]({page.link('docs/evaluation.md')}#gpu-self-check))."
    )


def block_pipelines(sources: Sources, page: Page) -> str:
    """Which method runs on which family of pipelines, as tools/pairs.py found it."""
    record = json.loads((sources.root / "results" / "pipelines" / "pairs.json").read_text(encoding="utf-8"))
    said = f"✅: trained for {record['steps']} steps on a tiny pipeline of that class, with finite weights that moved."
    return f"{pair_table(record['families'], 'diffusers')}\n\n{said} {where(record)}{later(record)}"


def block_models(sources: Sources, page: Page) -> str:
    """Which method runs on which family of transformers, as tools/pairs.py found it."""
    record = json.loads((sources.root / "results" / "models" / "pairs.json").read_text(encoding="utf-8"))
    titles = {
        "classifiers": "Image classifiers",
        "encoders": "Image encoders",
        "texts": "Text encoders",
    }
    tables = [
        f"### {titles[kind]}\n\n{pair_table(families, 'transformers')}" for kind, families in record["kinds"].items()
    ]
    said = (
        f"✅: trained for {record['steps']} steps with a tiny model of that class as teacher, with weights that moved; "
        "transformers alone reads the student's folder, and answers as the student does, bit for bit. Else why not."
    )
    return "\n\n".join([*tables, f"{said} {where(record)}{later(record)}"])


def later(record: dict[str, Any]) -> str:
    """Where methods were tried that joined a record."""
    return "".join(f"; `{method}`: {where(found)}" for method, found in record.get("later", {}).items())


def pair_table(families: dict[str, Any], library: str) -> str:
    """A row for each family, a column for each method."""
    methods = list(next(iter(families.values()))["methods"])
    rows = [
        [
            entry["title"],
            ", ".join(f"`{name}`" for name in entry.get("pipelines") or [entry["class"]]),
            *(entry["methods"][method].replace("runs", "✅", 1) for method in methods),
        ]
        for entry in families.values()
    ]
    return table(["family", f"{library}' class", *(f"`{method}`" for method in methods)], rows)


def block_api(sources: Sources, page: Page) -> str:
    """The public functions; what every finished model has; and the class of each task's models, with the methods that
    it explains itself."""
    import stillroom
    from stillroom.task import tasks

    functions = (stillroom.distill, stillroom.load, stillroom.export, stillroom.plan)
    parts = [described(f"stillroom.{function.__name__}", function, "##") for function in functions]
    parts.append("## stillroom.methods()\n\nThe class of every method, by slug; also the package that they lie in.")
    parts.append(
        "## Finished models\n\nWhat `distill` and `load` give back is of one of these classes. All have "
        "`save(folder)`, `parameters` (how many the network has) and `nfe` (network calls for one answer)."
    )
    for kind in dict.fromkeys(found.model for found in tasks().values()):
        own = [
            (name, f)
            for name, f in vars(kind).items()
            if inspect.isfunction(f) and not name.startswith("_") and not any(name in vars(b) for b in kind.__mro__[1:])
        ]
        parts.append(f"### {kind.__name__}\n\n{plain(kind.__doc__)}")
        parts += [described(name, function, "####") for name, function in own]
    errors = (stillroom.UserError, stillroom.TrainingDiverged)
    parts += [f"## stillroom.{error.__name__}\n\n{plain(error.__doc__)}" for error in errors]
    return "\n\n".join(parts)


def described(name: str, function: Any, level: str) -> str:
    signature = str(inspect.signature(function)).replace("(self, ", "(").replace("(self)", "()")
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)  # annotations are texts
    return f"{level} {name}\n\n```text\n{name}{signature}\n```\n\n{plain(function.__doc__)}"


def plain(text: str | None) -> str:
    """A docstring as Markdown: references as code, code in single quotes, arguments as a list."""
    text = re.sub(r":[a-z]+:`~?([\w.]+)`", r"``\1``", inspect.cleandoc(text or ""))
    return re.sub(r"^(\w+(?:, \w+)*): ", r"- `\1`: ", re.sub(r"``(.+?)``", r"`\1`", text), flags=re.MULTILINE)
