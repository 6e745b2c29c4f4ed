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
    if "pipeline" in result:
        return pipeline_card(recipe, result, paper)
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


def pipeline_card(recipe: Recipe, result: dict[str, Any], paper: Paper) -> str:
    """The card of a student that diffusers loads by itself: teacher, method, data, use, costs, licence, recipe."""
    about, calls = result["pipeline"], result["student"]["nfe"]
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front["license"] = about["licence"] or "other"
    if not about["licence"]:
        front["license_name"] = "licence-of-the-teacher"
    front |= {
        "base_model": Path(recipe.teacher.rpartition("@")[0] or recipe.teacher).name,
        "tags": ["stillroom", "distillation", "text-to-image", recipe.method],
    }
    steps = f"{len(about['timesteps'])} step{'s' if len(about['timesteps']) > 1 else ''}"
    asked = {"height": about["size"][0], "width": about["size"][1], **about["arguments"]}
    times = ", ".join(f"{time:g}" for time in about["timesteps"])
    scores = score_rows(result)
    folder = f"{Path(result['name'])}/student"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {result['name']}", "",
        f"A student of `{recipe.teacher}` ({about['family']}) that makes an image in {calls} network "
        f"evaluation{'s' if calls > 1 else ''} (the teacher takes {result['teacher']['nfe']}), distilled by "
        "[stillroom](https://pypi.org/project/stillroom/).",
        "",
        f"- Method: `{recipe.method}`, [{paper.title}]({paper.url}) ({paper.venue or paper.year})",
        f"- Data: {result['data']}",
        f"- Recipe hash: `{result['recipe_hash']}`; the recipe is at the end of this card",
        *(f"- {name}: {value}" for name, value in training_rows(result)),
        f"- Machine: {result['machine']}; stillroom {result['stillroom']}, torch {result['torch']}",
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
    lines += ["## Scores", ""]
    if scores:
        lines += ["| score | student | teacher |", "| --- | ---: | ---: |"]
        lines += [f"| {row['name']} {row['better']} | {row['student']} | {row['teacher']} |" for row in scores]
    else:
        lines += ["None were measured: there is no bench for these prompts."]
    lines += ["", "## Cost of a sample", "", "| | student | teacher |", "| --- | ---: | ---: |"]
    lines += [f"| {row['name']} | {row['student']} | {row['teacher']} |" for row in speed_rows(result)]
    said = f"whose card says `{about['licence']}`" if about["licence"] else "whose folder names none"
    lines += [
        "", "## Licence", "",
        f"The weights derive from those of `{recipe.teacher}`, {said}; the teacher's licence, and that of the data, "
        "bind this model too.",
    ]  # fmt: skip
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", recipe.to_yaml().strip(), "```", ""])


def example(result: dict[str, Any]) -> str:
    """What to ask the student for: captions where its rows are captions, else classes, else a number."""
    if any(" " in row for row in result["rows"]):
        return repr(result["rows"][:2])
    return "[0, 1, 2]" if any(result["rows"]) else "8"
