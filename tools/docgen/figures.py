"""Numbers, tables and verdicts as text."""

from __future__ import annotations

from typing import Any

VERDICTS = {
    "holds": "✅ holds", "fails": "❌ fails", "unresolved": "➖ unresolved", "not measured": "◻️ not measured",
}  # fmt: skip
COSTS = {
    "seconds": "training, s",
    "steps": "training steps",
    "params": "parameters",
    "nfe": "network calls (NFE)",
    "latency_ms": "latency, ms",
}


def number(value: float | None) -> str:
    """Three digits, or all of a whole number; text as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def spread(arm: dict[str, Any] | None) -> str:
    """Mean and standard deviation over seeds; in words where there is none."""
    if arm is None:
        return "not measured"
    lost, seeds = arm.get("diverged", 0), len(arm["values"])
    told = "" if not lost else "diverged" if lost == seeds else f"diverged at {lost} of {seeds} seeds"
    if arm["mean"] is None or lost == seeds:  # an untrained arm has no number that only training logs
        return told or "–"
    mean, sd = number(arm["mean"]), arm.get("sd")
    text = mean if sd is None or seeds < 2 else f"{mean} ± {number(sd)}"
    return f"{text}, {told}" if told else text


def cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows])


def metric_name(metric: str, floor: dict[str, Any]) -> str:
    """A distance in a feature space is named after its extractor and sample size; a number that training logs after
    when it was taken."""
    kind, _, name = metric.rpartition("/")
    if kind:
        when = {"health": "mean over the second half", "last": "at the end"}[kind]
        return f"{name.replace('_', ' ')}, {when}"
    if "extractor" not in floor:
        return metric.replace("_", " ")
    word = metric.upper() if metric in ("fd", "kid") else metric.replace("_", " ")
    return f"{word}-{floor['extractor']}, N={floor['n']}"


def where(record: dict[str, Any]) -> str:
    """Commit and machine; both may be lists, where arms were measured at several times."""
    commits, machines = (record.get(key) or [] for key in ("commit", "machine"))
    commits = [commits] if isinstance(commits, str) else commits
    machines = [machines] if isinstance(machines, str) else machines
    named = ", ".join(f"`{commit[:12]}`" for commit in commits)
    return " · ".join(filter(None, [f"commit {named}" if named else "", *map(cell, machines)]))
