"""The model card beside a student's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stillroom.report import score_rows, speed_rows, teachers, training_rows

if TYPE_CHECKING:
    from stillroom.method import Paper
    from stillroom.recipe import Recipe


PIPELINES = {
    "classify": "image-classification",
    "classify-text": "text-classification",
    "encode": "image-feature-extraction",
}
"""Tasks whose students are models of transformers, and what model hubs call them."""


def model_card(recipe: Recipe, result: dict[str, Any], paper: Paper) -> str:
    """Markdown with the front matter that model hubs read."""
    task = str(result.get("task"))
    front: dict[str, Any] = {"library_name": "transformers" if task in PIPELINES else "diffusers"}
    front |= {"pipeline_tag": PIPELINES[task]} if task in PIPELINES else {}
    front["tags"] = ["stillroom", "distillation", recipe.method]
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {result['name']}", ""]
    calls = result["student"]["nfe"]
    steps = f"{calls} network evaluation{'s' if calls > 1 else ''}"
    names = teachers(result)
    taught = " and ".join(f"`{name}`" for name in recipe.teacher.split(","))
    theirs = ", ".join(f"{who} takes {result[who]['nfe']}" for who in names)
    makes = f"A student of {taught} that makes an image in {steps} ({'the ' * (len(names) == 1)}{theirs})"
    use = f"images = student.sample({example(result)}, seed=0)  # [N, C, H, W] in [-1, 1]"
    if task == "encode":
        began, *known = taught.split(" and ")
        makes = f"An image encoder that began as {began}" + (f", a student of {' and '.join(known)}" if known else "")
        use = "x = student.features(images)  # [N, C, H, W] in [-1, 1] to [N, D]"
    elif task in PIPELINES:
        makes = f"A classifier that began as {taught}"
        texts = "names = student.classify(texts)  # a list of strings"
        use = texts if task == "classify-text" else "names = student.classify(images)  # [N, C, H, W] in [-1, 1]"
    lines += [
        f"{makes}, distilled by [stillroom](https://pypi.org/project/stillroom/).",
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
        use,
        "```",
        "",
    ]
    if scores := score_rows(result):
        lines += [
            "## Scores",
            "",
            f"| {' | '.join(['score', 'student', *names, 'floor (real images)'])} |",
            f"| --- |{' ---: |' * (len(names) + 2)}",
        ]
        lines += [
            f"| {r['name']} {r['better']} | {' | '.join(r[who] for who in ('student', *names, 'floor'))} |"
            for r in scores
        ]
        lines += ["", f"Reference: {result['bench']['reference']}.", ""]
    lines += [
        "## Cost of a sample",
        "",
        f"| | {' | '.join(['student', *names])} |",
        f"| --- |{' ---: |' * (len(names) + 1)}",
    ]
    lines += [f"| {r['name']} | {' | '.join(r[who] for who in ('student', *names))} |" for r in speed_rows(result)]
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", recipe.to_yaml().strip(), "```", ""])


def example(result: dict[str, Any]) -> str:
    """What to ask the student for: captions where its rows are captions, else classes, else a number."""
    if any(" " in row for row in result["rows"]):
        return repr(result["rows"][:2])
    return "[0, 1, 2]" if any(result["rows"]) else "8"
