"""Every method of denoisers on every family of pipelines, for two steps: what the table in docs/models.md says."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path

import torch

from stillroom.data.prompt_sources import PromptSource
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.recipe import Recipe
from stillroom.tasks.pipelines.data import PromptedData, encode_prompts
from stillroom.tasks.pipelines.model import OwnScheduler, PipelineGenerator
from stillroom.tasks.pipelines.task import Pipelines
from stillroom.training import build_method
from tiny_pipelines import SIDE, WIDER, make_pipeline

METHODS = (
    *("dmd2", "swiftbrush", "sim", "sid-lsg", "uni-instruct", "agd"),
    *("boot", "twinflow", "kd", "progressive", "hyper-sd", "sana-sprint"),
    *("ect", "scm", "tcm", "meanflow", "ayf", "pdd"),
    *("snoopi", "decoupled-dmd", "phased-dmd", "flash-dmd"),
)
STEPS = 2
OPTIONS = {
    "decoupled-dmd sana-sprint": ["options.student_steps=2"],
    "flash-dmd sana-sprint": ["options.student_steps=2", "options.split=0.6"],
    "hyper-sd": [
        "options.one_step_share=0",
        "options.segments=[2, 1]",
        "options.grids=[8, 4]",
        "options.mse=[1, 1]",
        "options.adversarial=[0, 1]",
    ],
    "agd": ["options.paths=3", "options.path_steps=2", "options.steps=2", "options.width=8"],
    "kd": ["options.paths=3", "options.path_steps=2"],
    "progressive": ["options.begin=2"],
    "boot": ["options.flipped=true", "options.high=1.0"],
    "sana-sprint": ["options.retime_share=0", "options.gan_width=8"],
    "sana-sprint sana": ["options.retime_share=0.5", "options.gan_width=8"],
    "twinflow": ["options.width=8", "engine.batch=4"],
    "dmd2 wan experts": ["options.t_init=1.0", "options.gan_weight=0"],
    **{method: [] for method in ("scm", "ect", "tcm", "meanflow", "ayf", "pdd")},
}
"""Of methods whose students do not begin at a time of their own, and where a family asks for others."""
PROMPTS = ("a red cat", "the boat of the dog", "a house")


class Pictures(PromptSource):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return ((text, torch.rand(3, 24, 20, generator=generator) * 2 - 1) for text in PROMPTS)


@cache
def teacher_of(family: str) -> tuple[PipelineGenerator, PromptedData]:
    side = WIDER.get(family, SIDE)
    teacher = PipelineGenerator(make_pipeline(family), size=(side, side))
    return teacher, encode_prompts(Pictures([], "three pictures"), teacher, report=lambda _: None)


def recipe_of(family: str, method: str) -> Recipe:
    changes = ["engine.batch=2", f"engine.steps={STEPS}", "engine.warmup=0", "evaluate.n=0"]
    changes += OPTIONS.get(f"{method} {family}", OPTIONS.get(method, ["options.t_init=1.0"]))
    if method in ("swiftbrush", "snoopi"):
        changes.append("options.targets=[to_q, to_k, to_v]")
    return Recipe.load(method, changes, teacher=family, data="pictures")


def try_pair(family: str, method: str) -> str:
    """``runs``, or why not. Raises AssertionError where it runs and does nothing."""
    first, data = teacher_of(family)
    teacher = PipelineGenerator(first.pipeline, OwnScheduler(2), copy.deepcopy(first.denoiser), first.size)
    recipe, task = recipe_of(family, method), Pipelines()
    try:
        task.load(recipe, {"teacher": teacher, "data": data})
        built = build_method(recipe, task.given, task.check)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(built, task.data, recipe.engine, Path(folder), False, recipe_hash=recipe.hash())
            before = {name: p.detach().clone() for name, p in built.trained_parameters("student").items()}
            trainer.fit()
            moved = [not torch.equal(p, before[name]) for name, p in built.trained_parameters("student").items()]
            student = task.student(trainer.export_role(), built.sampler())
    except UserError as error:
        return str(error)
    assert any(moved), f"{method} did not move its student"
    images = student.sample(list(PROMPTS[:2]))
    assert images.shape == (2, 3, *teacher.size)
    assert bool(torch.isfinite(images).all())
    return "runs"
