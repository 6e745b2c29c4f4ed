"""A run's report: one self-contained HTML file, made only from what lies in the run's folder."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from stillroom.files import write
from stillroom.report.log import read_metrics, read_recipe, read_result

ARROWS = {
    "sceneeval": "↑", "sceneeval_single": "↑", "sceneeval_two": "↑", "sceneeval_counting": "↑",
    "sceneeval_colours": "↑", "sceneeval_position": "↑", "sceneeval_attribution": "↑",
    "fd": "↓", "kid": "↓", "precision": "↑", "recall": "↑", "density": "↑", "coverage": "↑", "class_agreement": "↑",
    "class_histogram_tv": "↓", "accuracy": "↑", "nll": "↓", "ece": "↓",
    "probe": "↑", "knn": "↑", "tuned": "↑", "probe_occluded": "↑", "probe_noisy": "↑", "agreement": "↑", "cka": "↑",
    "kl": "↓",
}  # fmt: skip
"""The scores that are shown, and which way is better."""
PLAIN_NAMES = {"class_agreement": "Class agreement", "class_histogram_tv": "Class histogram, total variation"}


def number(value: Any) -> str:
    """Three significant digits, thousands separated; a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def amount(value: float | None) -> str:
    """1,234,567 as 1.23 M."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def teachers(result: dict[str, Any]) -> list[str]:
    """What the run's teachers are called in its result."""
    return list(result.get("teachers", ["teacher"]))


def score_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The score table: ``name`` (with extractor and N), ``better``, ``student``, each teacher, ``floor``."""
    scores, names = result.get("scores", {}), result.get("score_names", {})
    student = scores.get("student", {})
    return [
        {
            "key": key,
            "name": names.get(key) or PLAIN_NAMES.get(key, key),
            "better": arrow,
            **{who: number(scores.get(who, {}).get(key)) for who in ("student", *teachers(result), "floor")},
        }
        for key, arrow in ARROWS.items()
        if key in student
    ]


def speed_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """What a sample costs: ``name``, ``student``, each teacher."""
    parts = {who: result.get(who, {}) for who in ("student", *teachers(result))}
    rows: list[dict[str, str]] = []

    def add(name: str, form: Any, *path: str) -> None:
        values: dict[str, Any] = {}
        for who, part in parts.items():
            value: Any = part
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            values[who] = value
        if any(value is not None for value in values.values()):
            rows.append({"name": name, **{who: form(value) for who, value in values.items()}})

    add("Network evaluations per sample", number, "nfe")
    add("Latency, batch 1 (median)", milliseconds, "latency_ms", "1")
    add("Latency, batch 32 (median)", milliseconds, "latency_ms", "32")
    add("Parameters", amount, "params")
    add("Multiply-accumulates per sample", amount, "macs")
    return rows


def training_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    cost = result.get("cost", {})
    seen = "Texts seen" if result.get("task") == "classify-text" else "Images seen"
    rows = [("Steps", number(cost.get("step"))), (seen, number(cost.get("images")))]
    rows += [("Training time", duration(cost.get("seconds"))), ("Seed", str(result.get("seed", "–")))]
    return rows


def facts(folder: Path) -> dict[str, Any]:
    """A finished run for a comparison: ``name`` and ``rows``: ``{(group, label): text}``.

    Raises UserError if the run is not finished.
    """
    from stillroom.errors import UserError

    recipe, result = read_recipe(folder), read_result(folder)
    if not result:
        raise UserError(f"run {folder} is not finished", cure=f"stillroom run --resume {folder}")
    rows = {("what", "method"): str(recipe.get("method")), ("what", "teacher"): str(recipe.get("teacher"))}
    rows["what", "data"] = str(recipe.get("data"))
    names = teachers(result)
    for row in score_rows(result):
        beside = ", ".join(f"{who} {row[who]}" for who in (*names, "floor") if row[who] != "–")
        rows["quality", f"{row['name']} {row['better']}"] = row["student"] + (f"  ({beside})" if beside else "")
    for row in speed_rows(result):
        beside = ", ".join(f"{who} {row[who]}" for who in names if row[who] != "–")
        rows["speed", row["name"]] = row["student"] + (f"  ({beside})" if beside else "")
    rows |= {("training", name): value for name, value in training_rows(result)}
    return {"name": result.get("name", folder.name), "rows": rows}


def headline(result: dict[str, Any]) -> list[dict[str, str]]:
    """The four numbers at the top: ``value``, ``label``, ``note``."""
    tiles = []
    scores, student, names = result.get("scores", {}), result.get("student", {}), teachers(result)
    for key, label in (
        ("sceneeval", "SceneEval"),
        ("fd", "Fréchet distance"),
        ("accuracy", "Accuracy"),
        ("probe", "Linear probe"),
    ):
        if key in scores.get("student", {}):
            beside = [f"{who} {number(scores[who][key])}" for who in (*names, "floor") if key in scores.get(who, {})]
            tiles.append({"value": number(scores["student"][key]), "label": label, "note": ", ".join(beside)})
    if student.get("nfe"):
        note = ", ".join(f"{who} {result[who]['nfe']}" for who in names if result.get(who, {}).get("nfe"))
        tiles.append(
            {
                "value": str(student["nfe"]),
                "label": "network evaluations" if student["nfe"] > 1 else "network evaluation",
                "note": note,
            }
        )
    mine = student.get("latency_ms", {}).get("1")
    theirs = {who: found for who in names if (found := result.get(who, {}).get("latency_ms", {}).get("1"))}
    if mine and theirs:
        who, fastest = min(theirs.items(), key=lambda item: item[1])
        other = "the teacher" if len(names) == 1 else who
        tiles.append(
            {
                "value": f"{fastest / mine:.3g}×",
                "label": f"faster than {other}" if fastest >= mine else f"the speed of {other}",
                "note": f"{milliseconds(mine)} against {milliseconds(fastest)}",
            }
        )
    cost = result.get("cost", {})
    if "seconds" in cost:
        tiles.append(
            {"value": duration(cost["seconds"]), "label": "of training", "note": f"{number(cost.get('step'))} steps"}
        )
    return tiles


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run's folder, finished or not, and return its path.

    Raises UserError if the folder is no run or one of its files is damaged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from stillroom.report.doctor import examine
    from stillroom.report.plots import figures

    recipe, result, rows = read_recipe(run_dir), read_result(run_dir), read_metrics(run_dir)
    environment = Environment(
        loader=PackageLoader("stillroom.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        name=result.get("name", run_dir.name),
        recipe=recipe,
        recipe_text=(run_dir / "recipe.yaml").read_text(encoding="utf-8"),
        result=result,
        paper=_paper(str(recipe.get("method"))),
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


def _paper(method: str) -> dict[str, Any] | None:
    """Title and arXiv id from the catalogue; a plug-in's method has none there."""
    import yaml

    catalogue = yaml.safe_load((Path(__file__).parents[1] / "catalogue.yaml").read_text(encoding="utf-8"))
    return next((entry for entry in catalogue if entry["slug"] == method), None)


def _samples(run_dir: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for who in (*teachers(result), "student"):
        path = run_dir / "samples" / f"{who}.png"
        if path.is_file():
            nfe = result.get(who, {}).get("nfe")
            calls = f"{nfe} network evaluation{'s' if nfe > 1 else ''} per image" if nfe else ""
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            found.append({"who": who, "calls": calls, "src": f"data:image/png;base64,{data}"})
    return found
