"""What a run's result says, in words and rows: for the report, the card and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.evaluation.scores import Score
from stillroom.report.log import read_recipe, read_result

SAME = 0.05
"""Relative difference up to which a student is called as good as its teacher, and not called smaller or faster."""


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


def metrics(result: dict[str, Any]) -> list[Score]:
    """The scores that the student has, in the order in which its task shows them."""
    student = result.get("scores", {}).get("student", {})
    return [score for entry in result.get("metrics", ()) if (score := Score.from_dict(entry)).key in student]


def in_one_line(result: dict[str, Any]) -> str:
    """Whether the student is smaller, faster and as good as its teacher, and in the same breath what it is not: the
    first line of report, card and terminal. Of several teachers, the one meant is the best by the first score that has
    a label. What was not measured of both is left out; empty where nothing was."""
    names, scores, which = teachers(result), result.get("scores", {}), "first"
    who = next((name for name in names if result.get(name)), "")
    for score in [score for score in metrics(result) if score.label][:1]:
        if known := [name for name in names if _finite(scores.get(name, {}).get(score.key))]:
            who = max(known, key=lambda name: _sign(score) * scores[name][score.key])
            which = "better" if len(names) == 2 else "best"
    told = _told(result, who)
    true = [f"{what} ({how})" for holds, what, how in told if holds]
    untrue = [f"not {what} ({how})" for holds, what, how in told if not holds]
    if not told:
        return ""
    beside = "its teacher" if len(names) == 1 else f"{who}, the {which} of its teachers,"
    return f"Beside {beside} the student is {'; it is '.join(listed(part) for part in (true, untrue) if part)}."


def _told(result: dict[str, Any], who: str) -> list[tuple[bool, str, str]]:
    """Whether it holds, what, and by which numbers: size, speed, quality of the student beside the teacher ``who``."""
    student, teacher, scores = result.get("student", {}), result.get(who, {}), result.get("scores", {})
    told = []
    if student.get("params") and teacher.get("params"):
        ratio = student["params"] / teacher["params"]
        times = "as many parameters" if number(ratio) == "1" else f"{number(ratio)} times the parameters"
        told.append((ratio <= 1 - SAME, "smaller", times))
    for batch in ("1", "32"):
        mine, theirs = (part.get("latency_ms", {}).get(batch) for part in (student, teacher))
        if mine and theirs:
            ratio = theirs / mine
            told.append((ratio >= 1 + SAME, f"faster at batch {batch}", f"{number(ratio)} times the speed"))
    for score in metrics(result):
        mine, theirs = (scores.get(part, {}).get(score.key) for part in ("student", who))
        if score.label and _finite(theirs):
            gain = _sign(score) * (mine - theirs) / (abs(theirs) or 1) if _finite(mine) else -math.inf
            against = f"{score.label} {number(mine)} against {number(theirs)}"
            told.append((gain >= -SAME, "better" if gain > SAME else "as good", against))
    return told


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _sign(score: Score) -> int:
    return 1 if score.better == "higher" else -1


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def score_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The score table: ``name`` (with extractor and N), ``better``, ``student``, each teacher, ``floor``."""
    scores = result.get("scores", {})
    return [
        {
            "key": score.key,
            "name": score.name,
            "better": score.arrow,
            **{who: number(scores.get(who, {}).get(score.key)) for who in ("student", *teachers(result), "floor")},
        }
        for score in metrics(result)
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
    seen = f"{str(result.get('things', 'images')).capitalize()} seen"
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
    rows = {("what", key): str(recipe[key]) for key in ("method", "student", "teacher", "data") if recipe.get(key)}
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
    for score in metrics(result):
        if key := score.key if score.label else "":
            beside = [f"{who} {number(scores[who][key])}" for who in (*names, "floor") if key in scores.get(who, {})]
            tiles.append({"value": number(scores["student"][key]), "label": score.label, "note": ", ".join(beside)})
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
