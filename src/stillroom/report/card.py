"""The model card beside a student's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stillroom.report import score_rows, speed_rows, training_rows

if TYPE_CHECKING:
    from stillroom.method import Paper
    from stillroom.recipe import Recipe


def model_card(recipe: Recipe, result: dict[str, Any], paper: Paper) -> str:
    """Markdown with the front matter that model hubs read."""
    front = {"library_name": "diffusers", "tags": ["stillroom", "distillation", recipe.method]}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {result['name']}", ""]
    calls = result["student"]["nfe"]
    steps = f"{calls} network evaluation{'s' if calls > 1 else ''}"
    lines += [
        f"A student of `{recipe.teacher}` that makes an image in {steps} "
        f"(the teacher takes {result['teacher']['nfe']}), distilled by [stillroom](https://pypi.org/project/stillroom/).",
        "",
        f"- Method: `{recipe.method}`, [{paper.title}]({paper.url}) ({paper.venue or paper.year})",
        f"- Data: {result['data']}",
        f"- Recipe hash: `{result['recipe_hash']}`; the recipe is at the end of this card",
        *(f"- {name}: {value}" for name, value in training_rows(result)),
        f"- Machine: {result['machine']}; stillroom {result['stillroom']}, torch {result['torch']}",
        "",
        "## Use",
        "",
        "```python",
        "import stillroom as sr",
        "",
        f'student = sr.load("{Path(result["name"])}/student")',
        f"images = student.sample({[0, 1, 2] if any(result['rows']) else 8}, seed=0)  # [N, C, H, W] in [-1, 1]",
        "```",
        "",
    ]
    if scores := score_rows(result):
        lines += [
            "## Scores",
            "",
            "| score | student | teacher | floor (real images) |",
            "| --- | ---: | ---: | ---: |",
        ]
        lines += [f"| {r['name']} {r['better']} | {r['student']} | {r['teacher']} | {r['floor']} |" for r in scores]
        lines += ["", f"Reference: {result['bench']['reference']}.", ""]
    lines += ["## Cost of a sample", "", "| | student | teacher |", "| --- | ---: | ---: |"]
    lines += [f"| {r['name']} | {r['student']} | {r['teacher']} |" for r in speed_rows(result)]
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", recipe.to_yaml().strip(), "```", ""])
