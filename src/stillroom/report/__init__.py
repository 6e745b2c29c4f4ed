"""A run's report: one self-contained HTML file, made only from what lies in the run's folder."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from stillroom.files import write
from stillroom.report.log import read_metrics, read_recipe, read_result
from stillroom.report.rows import headline, in_one_line, score_rows, speed_rows, teachers, training_rows


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run's folder, finished or not, and return its path.

    Raises UserError if the folder is no run or one of its files is damaged.
    """
    from jinja2 import ChoiceLoader, DictLoader, Environment, PackageLoader, StrictUndefined

    from stillroom.report.doctor import examine
    from stillroom.report.plots import figures

    recipe, result, rows = read_recipe(run_dir), read_result(run_dir), read_metrics(run_dir)
    part = task_part(str(result.get("task", "")))
    own = {"task.html": part.read_text(encoding="utf-8")} if part is not None else {}
    environment = Environment(
        loader=ChoiceLoader([DictLoader(own), PackageLoader("stillroom.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("task.html" if own else "template.html").render(
        name=result.get("name", run_dir.name),
        recipe=recipe,
        recipe_text=(run_dir / "recipe.yaml").read_text(encoding="utf-8"),
        result=result,
        names=result.get("rows", []),
        paper=_paper(str(recipe.get("method"))),
        first=in_one_line(result),
        tiles=headline(result),
        samples=_samples(run_dir, result),
        teachers=teachers(result),
        scores=score_rows(result),
        speeds=speed_rows(result),
        training=training_rows(result),
        findings=examine(run_dir),
        figures=figures(rows, recipe),
    )
    path = run_dir / "report.html"
    write(path, page)
    return path


def task_part(name: str) -> Path | None:
    """The template of a task's own part of the page; None for a task that has none, or is not installed here."""
    from stillroom.task import tasks

    found = tasks().get(name)
    return found.report_part() if found is not None else None


def _paper(method: str) -> dict[str, Any] | None:
    """Title and arXiv id from the catalogue; a plug-in's method has none there."""
    import yaml

    catalogue = yaml.safe_load((Path(__file__).parents[1] / "catalogue.yaml").read_text(encoding="utf-8"))
    return next((entry for entry in catalogue if entry["slug"] == method), None)


def _samples(run_dir: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    also = result.get("also", {})
    for who in (*teachers(result), "student", *also):
        path = run_dir / "samples" / f"{who}.png"
        if path.is_file():
            nfe = also.get(who) or result.get(who, {}).get("nfe")
            calls = f"{nfe} network evaluation{'s' if nfe > 1 else ''} per image" if nfe else ""
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            found.append({"who": who, "calls": calls, "src": f"data:image/png;base64,{data}"})
    return found
