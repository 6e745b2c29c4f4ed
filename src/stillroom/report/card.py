"""The model card beside a student's weights."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stillroom.report.rows import in_one_line, metrics, score_rows, speed_rows, teachers, training_rows
from stillroom.task import get_task

if TYPE_CHECKING:
    from stillroom.method import Paper
    from stillroom.recipe import Recipe


def model_card(recipe: Recipe, result: dict[str, Any], paper: Paper) -> str:
    """Markdown with the front matter that model hubs read; what its task says of it, and what was measured."""
    about = get_task(str(result["task"])).card(recipe, result)
    front: dict[str, Any] = {"library_name": about.hub_library} if about.hub_library else {}
    front |= {"pipeline_tag": about.tag} if about.tag else {}
    tags = [about.tag] if about.tag == "text-to-image" else []
    front |= dict(about.front) | {"tags": ["stillroom", "distillation", *tags, recipe.method]}
    front |= model_index(recipe, result, about.tag or about.kind or str(result["task"]))
    use = [
        "import stillroom as sr",
        "",
        f'student = sr.load("{Path(result["name"])}/student")',
        *about.use,
    ]
    first = in_one_line(result)
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {result['name']}", "",
        *([first, ""] if first else []),
        f"{about.makes}, distilled by [stillroom](https://pypi.org/project/stillroom/).",
        "",
        *_made(recipe, result, paper),
        "", "## Use", "",
        *([about.alone, ""] if about.alone else []),
        "```python", *(about.use if about.alone else use), "```", "",
        *about.before_scores,
        *_measured(recipe, result),
        *about.after_scores,
    ]  # fmt: skip
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", recipe.to_yaml().strip(), "```", ""])


def _made(recipe: Recipe, result: dict[str, Any], paper: Paper) -> list[str]:
    return [
        f"- Method: `{recipe.method}`, [{paper.title}]({paper.url}) ({paper.venue or paper.year})",
        f"- Data: {result['data']}",
        f"- Recipe hash: `{result['recipe_hash']}`; the recipe is at the end of this card",
        *(f"- {name}: {value}" for name, value in training_rows(result)),
        f"- Machine: {result['machine']}; stillroom {result['stillroom']}, torch {result['torch']}",
    ]


# --- what was measured ------------------------------------------------------------------------------------------------
def model_index(recipe: Recipe, result: dict[str, Any], task: str) -> dict[str, Any]:
    """The student's scores under the key ``model-index``, as hubs' widgets read them; empty where nothing was
    measured. Values are those of ``result.json``."""
    scores = result.get("scores", {}).get("student", {})
    args = {"n": result.get("bench", {}).get("n"), "seed": recipe.evaluate.seed}
    rows = [
        {"type": score.key, "value": scores[score.key], "name": score.name, "args": args}
        for score in metrics(result)
        if isinstance(scores[score.key], int | float) and math.isfinite(scores[score.key])
    ]
    if not rows:
        return {}
    data = re.sub(r"[^\w.-]+", "-", Path(recipe.data).name).strip("-") or "data"
    dataset = {"type": data, "name": result["bench"]["reference"]}
    return {"model-index": [{"name": result["name"], "results": [
        {"task": {"type": task}, "dataset": dataset, "metrics": [{**row, "args": dict(args)} for row in rows]},
    ]}]}  # fmt: skip


def _measured(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    """The tables of scores and costs, student beside teachers, with what they were measured on; or that nothing was."""
    names, scores = teachers(result), score_rows(result)
    floor = ["floor"] * any(row["floor"] != "–" for row in scores)
    lines = ["## Scores", ""]
    if scores:
        lines += [
            f"| {' | '.join(['score', 'student', *names, *(f'{who} (real images)' for who in floor)])} |",
            f"| --- |{' ---: |' * (1 + len(names) + len(floor))}",
            *(_row(f"{row['name']} {row['better']}", row, ("student", *names, *floor)) for row in scores),
            "",
            f"n = {result['bench']['n']:,}, seed {recipe.evaluate.seed}. Reference: {result['bench']['reference']}.",
        ]
        if earlier := result["bench"].get("earlier"):
            lines[-1] += (
                f" The scores of {' and '.join(earlier)} were measured before this run, with the same sampler, n and "
                "judge."
            )
    elif recipe.evaluate.n == 0:
        lines.append("Nothing was measured: the run was made with `evaluate.n=0`.")
    else:
        lines.append("No scores were measured: there is no bench for these data.")
    if left := result.get("left_out"):
        lines += ["", f"Neither drawn nor timed nor scored here: {', '.join(left)}."]
    lines += ["", "## Cost of a sample", "", f"| | {' | '.join(['student', *names])} |"]
    lines += [f"| --- |{' ---: |' * (len(names) + 1)}"]
    return lines + [_row(row["name"], row, ("student", *names)) for row in speed_rows(result)]


def _row(name: str, cells: dict[str, str], columns: tuple[str, ...]) -> str:
    """Of a Markdown table, in which ``|`` ends a cell unless it is escaped."""
    escaped = name.replace("|", r"\|")
    return f"| {' | '.join([escaped, *(cells[who] for who in columns)])} |"
