"""Images from prompts: the teacher is a text-to-image pipeline of diffusers, the student another one of its kind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.bench import find_bench
from stillroom.cache import cache_folder
from stillroom.data.prompt_sources import FORMS, prompt_source
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import FewStepSampler, Sampler
from stillroom.errors import UserError
from stillroom.folders.pipelines import few_step_scheduler, fingerprint, sized
from stillroom.parsing import parse_yaml
from stillroom.recipe import Recipe
from stillroom.surgery.modules import parameter_count
from stillroom.surgery.skeleton import NEED_VALUES
from stillroom.tasks.base import Task, say
from stillroom.tasks.pipelines.data import PromptedData, cache_key, encode_prompts
from stillroom.tasks.pipelines.model import PipelineGenerator

ROWS, COLUMNS = 4, 4
"""Of a grid of samples: prompts, and images of each."""


class PromptedImages(Task):
    """One pipeline, sampled by prompt. ``pipeline``: what loads or is the teacher."""

    data: PromptedData

    def load(self, recipe: Recipe, teacher: Any = None, data: Any = None) -> None:
        folder, size = None, None
        if teacher is None:
            folder, size = sized(recipe.teacher)
            self.teacher = PipelineGenerator.load(recipe.teacher)
        else:
            self.teacher = teacher if isinstance(teacher, PipelineGenerator) else PipelineGenerator(teacher)
        if data is not None:
            if not isinstance(data, PromptedData):
                raise UserError("a pipeline learns from prompts", cure=f"give {FORMS}")
            self.data = data
        else:
            source = prompt_source(recipe.data)
            cache = None
            if folder is not None:
                key = cache_key(fingerprint(folder), source.fingerprint, str(size))
                cache = cache_folder() / "prompted" / key
            self.data = encode_prompts(source, self.teacher, cache, say)
        self.origin = self.data.origin
        self.teacher.denoiser.null = dict(self.data.null)

    def sketch(self, recipe: Recipe) -> None:
        """One picture with a prompt, as the pipeline's configs have it. The data are not looked at."""
        self.teacher = PipelineGenerator.load(recipe.teacher)
        if (blank := self.teacher.family.blank) is not None:
            text = blank(self.teacher.pipeline)
            null = {name: value[0] for name, value in text.items()}
        else:
            try:
                text, null = self.teacher.conditions(["a"])
            except NEED_VALUES:
                raise UserError(
                    f"{self.teacher.family.title} reads as many rows as a text has words, which no config tells",
                    cure="run a few steps and measure them",
                ) from None
        shown = {f"text/{name}": torch.zeros(value.shape, dtype=value.dtype) for name, value in text.items()}
        shown["latents"] = torch.zeros(1, *self.teacher.denoiser.shape)
        self.origin = "one prompt with a picture"
        self.data = PromptedData([shown], ["a"], null, self.origin)
        self.teacher.denoiser.null = dict(null)

    def check(self, method: Any) -> None:
        """Raises UserError where the method's sampler cannot be a scheduler of diffusers, or its discriminator would
        look for real images in vain."""
        sampler, denoiser = method.sampler(), self.teacher.denoiser
        if not isinstance(sampler, FewStepSampler):
            raise UserError(f"a student sampled by {sampler.name!r} cannot be a pipeline", cure="use a few-step method")
        few_step_scheduler(sampler, denoiser.process, denoiser.prediction)
        judge = getattr(method, "discriminator", None)
        if judge is not None and not isinstance(judge, nn.Identity) and not self.data.pictures:
            raise UserError(
                f"{method.slug!r} shows its discriminator real images, but the data are prompts alone",
                cure="give images with captions, or options.gan_weight=0",
            )

    def networks(self) -> tuple[Denoiser]:
        return (self.teacher.denoiser,)

    def teachers(self) -> Mapping[str, PipelineGenerator]:
        return {"teacher": self.teacher}

    def student(self, network: nn.Module, sampler: Sampler) -> PipelineGenerator:
        assert isinstance(network, Denoiser)
        return self.teacher.student(network, sampler)

    def rows(self, generator: PipelineGenerator, seed: int) -> tuple[list[str], Tensor]:
        return prompt_rows(generator, list(dict.fromkeys(self.data.captions))[:ROWS], COLUMNS, seed)

    def measure(self, recipe: Recipe, student: PipelineGenerator) -> dict[str, Any]:
        generators = {"student": student, "teacher": self.teacher}
        measured: dict[str, Any] = {
            who: {"nfe": generator.sampler.nfe, "params": parameter_count(generator.denoiser)}
            for who, generator in generators.items()
        }
        measured["pipeline"] = facts(self.teacher, student)
        if recipe.evaluate.n == 0:
            return measured
        say("timing student and teacher")
        for who, generator in generators.items():
            measured[who]["latency_ms"] = {"1": picture_time(generator, self.data.captions[0])}
        bench = find_bench("pipelines", recipe.data, self.data)
        found = bench.compare(generators, recipe.evaluate.n, recipe.evaluate.seed) if bench else {}
        if not found:
            return measured
        return measured | found | {"score_names": {score["key"]: score["name"] for score in found["metrics"]}}


def picture_time(generator: PipelineGenerator, prompt: str) -> float:
    """Milliseconds of one picture: the median of thirty calls after a first one, or of as many, at least three, as a
    minute holds."""
    taken: list[float] = []
    generator.sample([prompt])
    while len(taken) < 3 or (len(taken) < 30 and sum(taken) < 60):
        began = time.perf_counter()
        generator.sample([prompt])  # its answer lies on the CPU, so the device is done
        taken.append(time.perf_counter() - began)
    return round(1000 * statistics.median(taken), 3)


def prompt_rows(generator: PipelineGenerator, prompts: list[str], n: int, seed: int) -> tuple[list[str], Tensor]:
    """``n`` samples for each prompt, as ``(prompts, [rows, n, 3, H, W])``."""
    if not prompts:
        raise UserError("this model draws prompts", cure='give --captions "a red cat"')
    images = generator.sample([prompt for prompt in prompts for _ in range(n)], seed=seed)
    return prompts, images.unflatten(0, (len(prompts), n))


def facts(teacher: PipelineGenerator, student: PipelineGenerator) -> dict[str, Any]:
    """What a model card says about a pipeline: class, scheduler, call arguments, size, and the teacher's licence."""
    return {
        "class": type(student.pipeline).__name__,
        "family": student.family.title,
        "scheduler": type(student.pipeline.scheduler).__name__,
        "timesteps": timesteps(student),
        "arguments": student.arguments,
        "size": list(student.size),
        "licence": licence(teacher.folder),
        "random": bool(student.pipeline.scheduler.config.get("stochastic_sampling")),
        "lora": student.denoiser.adapter is not None,
    }


def timesteps(generator: PipelineGenerator) -> list[float]:
    """At which times a pipeline's scheduler asks its network when nothing but the number of steps is said."""
    scheduler, n = generator.pipeline.scheduler, generator.steps
    if "Flow" in type(scheduler).__name__:
        scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
    else:
        scheduler.set_timesteps(n)
    return [round(float(t), 3) for t in scheduler.timesteps]


def licence(folder: Path | None) -> str:
    """What the model card in a folder says about its licence; empty if it says nothing."""
    path = folder / "README.md" if folder is not None else None
    if path is None or not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return ""
    try:
        front = parse_yaml(parts[1], str(path))
    except UserError:
        return ""
    found = front.get("license") if isinstance(front, dict) else ""
    return str(found) if found else ""
