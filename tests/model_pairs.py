"""Every method of classifiers, encoders and texts on every family of transformers, for two steps, what the tables in
docs/models.md say."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny_text
from stillroom.data.source import ArrayData
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.folders.processors import PROCESSOR, pixels_of
from stillroom.method import get_method
from stillroom.recipe import Recipe
from stillroom.task import IN_MEMORY, make_task
from stillroom.training import build_method
from tiny_models import CLASSES, SAVE, SIDE

METHODS = {
    "classifiers": ("meal-v2", "gt-self-distill", "dho"),
    "encoders": ("dmae", "hybrid-distill", "g2sd"),
    "texts": ("ernie-tiny", "distiller"),
}
STEPS = 2
NAMES = {
    "meal-v2": ("{0}", "{0}"), "gt-self-distill": ("{0}", ""), "dho": ("{0}", "{0}"), "dmae": ("{mae}", "{0}"),
    "hybrid-distill": ("{mae}", "{0},{mae}"), "g2sd": ("{mae}", "{0}"), "ernie-tiny": ("{0}", "{0},{0}"),
    "distiller": ("{0}", "{0}"),
}  # fmt: skip
"""What the recipe's ``student`` says, here of the teacher's family where it can be, and its ``teacher``."""
RECORDS = (
    "[{name: GED, teacher: tuned, data: general, losses: [latent]}, "
    "{name: TSD, teacher: tuned, data: task, losses: [latent, soft, hard]}]"
)
OPTIONS = {
    "meal-v2": ["options.init_share=0", "options.settle=0"], "gt-self-distill": ["options.rounds=2"],
    "dho": ["options.labelled=2"], "g2sd": ["options.specific_share=0"], "ernie-tiny": [f"options.stages={RECORDS}"],
}  # fmt: skip
OTHERWISE = {"ernie-tiny": "options.attention=none"}
"""What is tried where a method's defaults are refused."""


@cache
def folder_of(kind: str, family: str) -> Path:
    families, save = SAVE[kind]
    return save(families[family], Path(tempfile.mkdtemp()) / family)


def pictures() -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return ArrayData(images, {"label": torch.arange(30) % 3}, CLASSES, "pictures")


def data_of(kind: str) -> Any:
    return tiny_text.texts(30) if kind == "texts" else pictures()


def try_pair(kind: str, family: str, method: str) -> str:
    """``runs``, ``runs with OPTION``, or why not. Raises AssertionError where it runs and does nothing, and where the
    student's folder is not what transformers reads by itself."""
    found = _try(kind, family, method, [])
    if found != "runs" and (other := OTHERWISE.get(method)) and _try(kind, family, method, [other]) == "runs":
        return f"runs with {other}"
    return found


def _try(kind: str, family: str, method: str, more: list[str]) -> str:
    mae = folder_of("encoders", "vit_mae")
    student, teacher = (name.format(folder_of(kind, family), mae=mae) for name in NAMES[method])
    changes = ["engine.batch=6", f"engine.steps={STEPS}", "engine.warmup=0", "evaluate.n=0"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            named = {"student": student, "teacher": teacher, "data": IN_MEMORY}
            recipe = Recipe.load(method, [*changes, *OPTIONS.get(method, []), *more], **named)
            task = make_task(get_method(method).task, teacher)
            task.load(recipe, {"data": data_of(kind)})
            built = build_method(recipe, task.given, task.check)
            trainer = Trainer(built, task.data, recipe.engine, Path(folder), False, recipe_hash=recipe.hash())
            before = {name: p.detach().clone() for name, p in built.trained_parameters("student").items()}
            trainer.fit()
        except UserError as error:
            return error.message.replace(str(folder_of(kind, family)), family)
        moved = [not torch.equal(p, before[name]) for name, p in built.trained_parameters("student").items()]
        assert any(moved), f"{method} did not move its student"
        network = trainer.export_role()
        built.finish(network)
        task.student(network, built.sampler()).save(Path(folder) / "student")
        check_alone(Path(folder) / "student", network)
    return "runs"


@torch.no_grad()
def check_alone(folder: Path, network: Any) -> None:
    """transformers alone reads a student's folder, and answers as the student does, bit for bit."""
    kind = type(network).__name__
    auto = (
        "AutoModelForImageClassification" if "ImageClassification" in kind
        else "AutoModelForSequenceClassification" if "Sequence" in kind else "AutoModel"
    )  # fmt: skip
    alone: Any = getattr(transformers, auto).from_pretrained(folder, local_files_only=True).eval()
    assert type(alone) is type(network)
    for weight in alone.parameters():  # those of a mapped file lie at odd addresses, for which there are other kernels
        weight.data = weight.data.clone()
    assert not list(folder.rglob("*.bin"))
    network.eval()
    if auto == "AutoModelForSequenceClassification":
        tokens = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        inputs = tokens(["a red dog", "the old stone sleeps"], padding=True, return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        theirs, ours = alone(**inputs).logits, network(**inputs).logits
    elif auto == "AutoModel":
        images, noise = pictures().images(slice(2)), torch.arange(16.0).expand(2, -1)
        theirs, ours = (n(images, noise=noise).last_hidden_state for n in (alone, network))
    else:
        images = pictures().images(slice(2))
        seen = pixels_of(network)
        assert (folder / PROCESSOR).is_file()
        theirs, ours = alone(images if seen is None else seen.of(images)).logits, network(images).logits
    assert bool(torch.isfinite(ours).all())
    assert torch.equal(theirs, ours)
