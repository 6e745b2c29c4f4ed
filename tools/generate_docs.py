"""Write the measured parts of README.md and docs/ from the catalogue, the method classes and results/.

What stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is written by this program and never by hand.

    python tools/generate_docs.py            rewrite
    python tools/generate_docs.py --check    exit 1 if a file does not say what the results say
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
LEVELS = ("image", "text", "mechanism")
VERDICTS = {"holds": "✅ holds", "fails": "❌ fails", "unresolved": "➖ unresolved"}


class Sources:
    """What the documents are made from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        package = root / "src" / "stillroom"
        self.catalogue: list[dict[str, Any]] = yaml.safe_load((package / "catalogue.yaml").read_text(encoding="utf-8"))
        self.implemented = {
            p.stem.replace("_", "-") for p in (package / "methods").glob("*/*.py") if p.stem != "__init__"
        }
        uncatalogued = self.implemented - {entry["slug"] for entry in self.catalogue}
        self.catalogue += [self.entry_of(slug) for slug in sorted(uncatalogued)]
        self.results: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((root / "results").glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            self.results.setdefault(result["method"], []).append(result)
        self.benchmarks = [
            json.loads(p.read_text(encoding="utf-8")) for p in sorted((root / "results" / "benchmarks").glob("*.json"))
        ]

    def classes(self) -> dict[str, Any]:
        sys.path.insert(0, str(self.root / "src"))
        from stillroom.method import methods

        return methods()

    def entry_of(self, slug: str) -> dict[str, Any]:
        """A method that was never planned describes itself: the first sentence of its docstring."""
        cls = self.classes()[slug]
        purpose = inspect.cleandoc(cls.__doc__ or "").split(". ")[0].rstrip(".")
        return {"slug": slug, "arxiv": cls.paper.arxiv, "wing": cls.wing, "purpose": purpose}

    def claims(self, slug: str) -> list[dict[str, Any]]:
        """All claims of a method, those on the bench first, each with its ``floor`` and ``result``."""
        found = [
            claim | {"floor": (result.get("floor") or {}).get(claim["world"]) or {}, "result": result}
            for result in self.results.get(slug, [])
            for claim in result["claims"]
        ]
        return sorted(found, key=lambda claim: LEVELS.index(claim["level"]))


# --- figures ----------------------------------------------------------------------------------------------------------
def number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(arm: dict[str, Any]) -> str:
    if arm["mean"] is None:
        return "diverged"
    mean, sd = number(arm["mean"]), arm.get("sd")
    return mean if sd is None or len(arm["values"]) < 2 else f"{mean} ± {number(sd)}"


def cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows])


def verdict_cell(sources: Sources, slug: str) -> str:
    if slug not in sources.implemented:
        return "planned"
    if not (claims := sources.claims(slug)):
        return "not proven yet"
    parts = []
    for level in dict.fromkeys(claim["level"] for claim in claims):
        counts = Counter(claim["verdict"] for claim in claims if claim["level"] == level)
        parts.append(f"{level}: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]))
    return "; ".join(parts)


def metric_name(metric: str, floor: dict[str, Any]) -> str:
    """A distance in a feature space is named after its extractor and sample size."""
    if "extractor" not in floor:
        return metric.replace("_", " ")
    word = metric.upper() if metric in ("fd", "kid") else metric.replace("_", " ")
    return f"{word}-{floor['extractor']}, N={floor['n']}"


def figure_cell(sources: Sources, slug: str) -> str:
    """The two sides of the first claim."""
    if not (claims := sources.claims(slug)):
        return ""
    claim = claims[0]
    sides = [f"{side} {spread(claim['arms'][side])}" for side in (claim["left"], claim["right"]) if side]
    return f"{metric_name(claim['metric'], claim['floor'])}: " + ", ".join(sides)


# --- blocks -----------------------------------------------------------------------------------------------------------
def block_methods(sources: Sources) -> str:
    rows = []
    for entry in sources.catalogue:
        slug = entry["slug"]
        name = f"[{slug}](docs/methods.md#{slug})" if slug in sources.implemented else slug
        paper = f"[{entry['arxiv']}](https://arxiv.org/abs/{entry['arxiv']})"
        rows.append(
            [name, paper, entry["wing"], entry["purpose"], verdict_cell(sources, slug), figure_cell(sources, slug)]
        )
    return table(["method", "paper", "wing", "what it is for", "verdict", "measured"], rows)


def block_count(sources: Sources) -> str:
    total = sum(not entry.get("foundation") for entry in sources.catalogue)
    proven = sum(bool(sources.results.get(slug)) for slug in sources.implemented)
    return f"{total} methods in all: {len(sources.implemented)} are here, {proven} of them with measured results."


def block_benchmarks(sources: Sources) -> str:
    if not sources.benchmarks:
        return "No benchmark has been recorded yet."
    sections = []
    for bench in sources.benchmarks:
        lines = [f"### {bench['name']}", "", bench["statement"], ""]
        if bench.get("rows"):
            head = list(dict.fromkeys(key for row in bench["rows"] for key in row))
            lines += [table(head, [[number(row.get(key)) for key in head] for row in bench["rows"]]), ""]
        facts = [f"Verdict: {VERDICTS.get(bench['verdict'], bench['verdict'])}"] if bench.get("verdict") else []
        facts += [f"`{bench['command']}`"] if bench.get("command") else []
        facts += [where(bench)]
        sections.append("\n".join([*lines, " · ".join(facts)]))
    return "\n\n".join(sections)


def where(record: dict[str, Any]) -> str:
    """Commit and machine; both may be lists, where arms were measured at several times."""
    commits, machines = (record.get(key) or [] for key in ("commit", "machine"))
    commits = [commits] if isinstance(commits, str) else commits
    machines = [machines] if isinstance(machines, str) else machines
    named = ", ".join(f"`{commit[:12]}`" for commit in commits)
    return " · ".join(filter(None, [f"commit {named}" if named else "", *map(cell, machines)]))


def block_method_pages(sources: Sources) -> str:
    known = sources.classes()
    purposes = {entry["slug"]: entry["purpose"] for entry in sources.catalogue}
    order = [entry["slug"] for entry in sources.catalogue if entry["slug"] in sources.implemented]
    return "\n\n".join(method_page(sources, known[slug], purposes[slug]) for slug in order)


def method_page(sources: Sources, cls: Any, purpose: str) -> str:
    slug, paper = cls.slug, cls.paper
    file = Path(inspect.getfile(cls)).relative_to(sources.root)
    venue = f", {paper.venue}" if paper.venue else ""
    lines = [
        f"## {slug}",
        "",
        f"[{paper.title}]({paper.url}) ({paper.year}{venue}). For {purpose}.",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        f"[{file}](../{file}) · `stillroom run {slug}` · `stillroom prove {slug}`",
        "",
        "**Turns**, in the order of a step:",
        "",
        table(
            ["turn", "trains", "every", "optimizer"],
            [
                [t.name, ", ".join(t.trains), option_or_steps(t.every), optimizer(t.optim)]
                for t in cls.turns_for(cls.Options())
            ],
        ),
        "",
    ]
    from stillroom.report.tables import options_of  # found by Sources.classes

    if options := options_of(cls):
        rows = [[f"`{o.name}`", f"`{o.default}`" if o.default else "", o.allowed, o.meaning] for o in options]
        lines += ["**Options**", "", table(["option", "default", "allowed", "meaning"], rows), ""]
    return "\n".join([*lines, *claim_lines(sources, slug)]).rstrip()


def option_or_steps(every: int | str) -> str:
    return f"`{every}` steps" if isinstance(every, str) else "step" if every == 1 else f"{every} steps"


def optimizer(optim: Any) -> str:
    changed = {k: v for k, v in vars(optim).items() if k != "name" and v != getattr(type(optim)(), k)}
    return ", ".join([optim.name, f"lr {optim.lr:g}", *(f"{k} {v}" for k, v in changed.items() if k != "lr")])


def claim_lines(sources: Sources, slug: str) -> list[str]:
    claims = sources.claims(slug)
    if not claims:
        return ["No result has been recorded yet."]
    lines = []
    for level, world in dict.fromkeys((claim["level"], claim["world"]) for claim in claims):
        here = [claim for claim in claims if (claim["level"], claim["world"]) == (level, world)]
        result, floor = here[0]["result"], here[0]["floor"]
        seeds = ", ".join(map(str, result["seeds"]))
        note = (result.get("notes") or {}).get(world, "")
        lines += [f"**Measured, {level} level** (world `{world}`, seeds {seeds}; {where(result)})", ""]
        lines += [
            f"- {VERDICTS[claim['verdict']]}: {claim['statement']} ({claim['paper']}{'; ' if claim['paper'] else ''}"
            f"{metric_name(claim['metric'], floor)}: {claim['margin']})"
            for claim in here
        ]
        lines += ["", *([note, ""] if note else []), arm_table(here, floor), ""]
    return lines


def arm_table(claims: list[dict[str, Any]], floor: dict[str, Any]) -> str:
    """One row per arm: every metric that the claims use, then the costs; below, the floor of real data."""
    metrics = {claim["metric"]: claim["arms"] for claim in claims}
    arms: dict[str, dict[str, Any]] = {name: arm for claim in claims for name, arm in claim["arms"].items()}
    costs = list(dict.fromkeys(key for arm in arms.values() for key in arm.get("cost") or {}))
    rows = [
        [
            name,
            *(spread(measured[name]) if name in measured else "–" for measured in metrics.values()),
            *(number((arm.get("cost") or {}).get(key)) for key in costs),
        ]
        for name, arm in arms.items()
    ]
    if floor:
        rows.append(["real data (floor)", *(number(floor.get(metric)) for metric in metrics), *("" for _ in costs)])
    return table(["arm", *(metric_name(metric, floor) for metric in metrics), *costs], rows)


def block_pipelines(sources: Sources) -> str:
    """Which method runs on which family of pipelines, as tools/pairs.py found it."""
    record = json.loads((sources.root / "results" / "pipelines" / "pairs.json").read_text(encoding="utf-8"))
    said = f"✅: trained for {record['steps']} steps on a tiny pipeline of that class, with finite weights that moved."
    return f"{pair_table(record['families'], 'diffusers')}\n\n{said} {where(record)}"


def block_models(sources: Sources) -> str:
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
    return "\n\n".join([*tables, f"{said} {where(record)}"])


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


def block_api(_: Sources) -> str:
    """The public functions, and the classes of what ``load`` gives back with the methods that they add."""
    import stillroom
    from stillroom.tasks.class_images.model import ImageGenerator
    from stillroom.tasks.classify.model import ImageClassifier
    from stillroom.tasks.classify_text.model import TextClassifier
    from stillroom.tasks.encode.model import ImageEncoder
    from stillroom.tasks.pipelines.model import PipelineGenerator
    from stillroom.tasks.text_images.model import TextImageGenerator

    kinds = (ImageGenerator, TextImageGenerator, PipelineGenerator, ImageClassifier, TextClassifier, ImageEncoder)
    parts = [described(f"stillroom.{f.__name__}", f, "##") for f in (stillroom.distill, stillroom.load)]
    parts.append("## stillroom.methods()\n\nThe class of every method, by slug; also the package that they lie in.")
    for kind in kinds:
        own = [(name, f) for name, f in vars(kind).items() if inspect.isfunction(f) and not name.startswith("_")]
        parts.append(f"## {kind.__name__}\n\n{plain(kind.__doc__)}")
        parts += [described(name, function, "###") for name, function in own]
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


BLOCKS: dict[str, Callable[[Sources], str]] = {
    "methods": block_methods,
    "count": block_count,
    "benchmarks": block_benchmarks,
    "pipelines": block_pipelines,
    "models": block_models,
    "method-pages": block_method_pages,
    "api": block_api,
}


# --- files ------------------------------------------------------------------------------------------------------------
def regenerate(text: str, sources: Sources) -> str:
    """The text with each generated block made anew. An unknown block name raises KeyError."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](sources)}\n{found[3]}", text)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    sources, stale = Sources(root), []
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if (new := regenerate(text, sources)) != text:
            stale.append(str(path.relative_to(root)))
            if not check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'does not say what the results say; run `make docs`' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
