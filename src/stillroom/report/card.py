"""The model card beside a student's weights."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stillroom.report import ARROWS, PLAIN_NAMES, score_rows, speed_rows, teachers, training_rows

if TYPE_CHECKING:
    from stillroom.method import Paper
    from stillroom.recipe import Recipe


PIPELINES = {
    "classify": "image-classification",
    "classify-text": "text-classification",
    "encode": "image-feature-extraction",
}
"""Tasks whose students are models of transformers, and what model hubs call them."""
DRAWING = {"text-image": "text-to-image"}
"""The same of students that draw; hubs have no name for drawing classes."""


def model_card(recipe: Recipe, result: dict[str, Any], paper: Paper) -> str:
    """Markdown with the front matter that model hubs read."""
    if "pipeline" in result:
        return pipeline_card(recipe, result, paper)
    task = str(result.get("task"))
    front: dict[str, Any] = {"library_name": "transformers" if task in PIPELINES else "diffusers"}
    front |= {"pipeline_tag": tag} if (tag := (PIPELINES | DRAWING).get(task)) else {}
    front["tags"] = ["stillroom", "distillation", recipe.method]
    front |= model_index(recipe, result, (PIPELINES | DRAWING).get(task, "image-generation"))
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
        *_made(recipe, result, paper),
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
        *_measured(recipe, result),
    ]
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", recipe.to_yaml().strip(), "```", ""])


def pipeline_card(recipe: Recipe, result: dict[str, Any], paper: Paper) -> str:
    """The card of a student that diffusers loads by itself: teacher, method, data, use, scores, costs, licence,
    recipe."""
    about, calls = result["pipeline"], result["student"]["nfe"]
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front["license"] = about["licence"] or "other"
    if not about["licence"]:
        front["license_name"] = "licence-of-the-teacher"
    front |= {
        "base_model": Path(recipe.teacher.rpartition("@")[0] or recipe.teacher).name,
        "tags": ["stillroom", "distillation", "text-to-image", recipe.method],
    }
    front |= model_index(recipe, result, "text-to-image")
    steps = f"{len(about['timesteps'])} step{'s' if len(about['timesteps']) > 1 else ''}"
    asked = {"height": about["size"][0], "width": about["size"][1], **about["arguments"]}
    times = ", ".join(f"{time:g}" for time in about["timesteps"])
    folder = f"{Path(result['name'])}/student"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {result['name']}", "",
        f"A student of `{recipe.teacher}` ({about['family']}) that makes an image in {calls} network "
        f"evaluation{'s' if calls > 1 else ''} (the teacher takes {result['teacher']['nfe']}), distilled by "
        "[stillroom](https://pypi.org/project/stillroom/).",
        "",
        *_made(recipe, result, paper),
        "", "## Use", "", "diffusers is all that is needed:", "",
        "```python",
        "import diffusers",
        "",
        f'pipeline = diffusers.DiffusionPipeline.from_pretrained("{folder}")',
        f"image = pipeline('a red cat', {', '.join(f'{key}={value!r}' for key, value in asked.items())})[0][0]",
        "```",
        "",
        f"The scheduler in this folder, {about['scheduler']}, asks the network at the timesteps {times} when it is "
        f"asked for {steps}. The student was trained for these and with the arguments above: with other numbers of "
        "steps, or another guidance scale, it is another model.",
        "",
    ]  # fmt: skip
    if about["random"]:
        lines += [
            "Between two steps this scheduler draws noise from torch's global generator: call `torch.manual_seed` "
            "before the pipeline to get the same image again.",
            "",
        ]
    if about["lora"]:
        lines += [
            "The network here has its adapter merged. `lora/` holds the adapter alone, for the teacher's own weights: "
            "`pytorch_lora_weights.safetensors` (diffusers' `load_lora_weights`) and `adapter_model.safetensors` "
            "(peft). Take the scheduler of this folder with it.",
            "",
        ]
    said = f"whose card says `{about['licence']}`" if about["licence"] else "whose folder names none"
    lines += [
        *_measured(recipe, result),
        "", "## Licence", "",
        f"The weights derive from those of `{recipe.teacher}`, {said}; the teacher's licence, and that of the data, "
        "bind this model too.",
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
    scores, names = result.get("scores", {}).get("student", {}), result.get("score_names", {})
    args = {"n": result.get("bench", {}).get("n"), "seed": recipe.evaluate.seed}
    metrics = [
        {"type": key, "value": scores[key], "name": names.get(key) or PLAIN_NAMES.get(key, key), "args": args}
        for key in ARROWS
        if isinstance(scores.get(key), int | float) and math.isfinite(scores[key])
    ]
    if not metrics:
        return {}
    data = re.sub(r"[^\w.-]+", "-", Path(recipe.data).name).strip("-") or "data"
    dataset = {"type": data, "name": result["bench"]["reference"]}
    return {"model-index": [{"name": result["name"], "results": [
        {"task": {"type": task}, "dataset": dataset, "metrics": [{**row, "args": dict(args)} for row in metrics]},
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
    lines += ["", "## Cost of a sample", "", f"| | {' | '.join(['student', *names])} |"]
    lines += [f"| --- |{' ---: |' * (len(names) + 1)}"]
    return lines + [_row(row["name"], row, ("student", *names)) for row in speed_rows(result)]


def _row(name: str, cells: dict[str, str], columns: tuple[str, ...]) -> str:
    """Of a Markdown table, in which ``|`` ends a cell unless it is escaped."""
    escaped = name.replace("|", r"\|")
    return f"| {' | '.join([escaped, *(cells[who] for who in columns)])} |"


def example(result: dict[str, Any]) -> str:
    """What to ask the student for: captions where it draws captions, else classes, else a number."""
    if result.get("task") == "text-image":
        return repr(result["rows"][:2])
    return "[0, 1, 2]" if any(result["rows"]) else "8"
