"""Images from prompts: the teacher is a text-to-image pipeline of diffusers, the student another one of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache import cache_folder
from stillroom.data.prompt_sources import Texts, prompt_source
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import FewStepSampler, Sampler, ScaleFewStepSampler, ScaleSampler
from stillroom.errors import UserError
from stillroom.folders.pipeline_families import FAMILIES, with_network
from stillroom.folders.pipelines import few_step_scheduler, fingerprint, is_pipeline, sized
from stillroom.parsing import parse_yaml
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import NEED_VALUES
from stillroom.task import NOTHING, Card, Model, Rows, Task, model_home, say, sheet, task
from stillroom.tasks.pipelines.data import PromptedData, cache_key, encode_prompts
from stillroom.tasks.pipelines.model import OwnScheduler, PipelineGenerator, network_parts
from stillroom.tasks.words import evaluations

ROWS, COLUMNS = 4, 4
"""Of a grid of samples: prompts, and images of each."""


@task("pipelines")
class Pipelines(Task):
    """One pipeline, sampled by prompt, where a method asks for a denoiser."""

    serves = ("class-images",)
    model = PipelineGenerator
    objects = {"student": (PipelineGenerator, Denoiser), "data": (PromptedData,)}
    data: PromptedData
    sketched = False  # whether nothing but shapes is known

    @classmethod
    def takes(cls, teacher: Any) -> bool:
        """A pipeline, its folder, or what diffusers loads from one."""
        if isinstance(teacher, str):
            return is_pipeline(teacher)
        return isinstance(teacher, PipelineGenerator) or hasattr(teacher, "register_modules")

    def load(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        folder, size = (None, None) if "teacher" in given else sized(recipe.teacher)
        self.teacher = _teacher(recipe, given)
        if "data" in given:
            self.data = given["data"]
        else:
            source = prompt_source(recipe.data)
            cache = None
            if folder is not None:
                key = cache_key(fingerprint(folder), source.fingerprint, str(size))
                cache = cache_folder() / "prompted" / key
            self.data = encode_prompts(source, self.teacher, cache, say)
        self.origin = self.data.origin
        self.teacher.denoiser.null = dict(self.data.null)
        self._begin(recipe, given)

    def _begin(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """What the student begins as. Raises UserError for a pipeline of other latents."""
        self.start = self.teacher.denoiser
        if "student" not in given and not recipe.student:
            return
        one = given["student"] if "student" in given else PipelineGenerator.load(model_home(recipe.student))
        begins: Denoiser = one.denoiser if isinstance(one, PipelineGenerator) else one
        if tuple(begins.shape) != tuple(self.start.shape):
            raise UserError(
                f"student {recipe.student!r} works on latents {list(begins.shape)}, the teacher on "
                f"{list(self.start.shape)}",
                cure="choose a student of the teacher's family and size",
            )
        begins.null = dict(self.start.null)
        self.start = begins

    def sketch(self, recipe: Recipe, given: Mapping[str, Any] = NOTHING) -> None:
        """One picture with a prompt, as the pipeline's configs have it. The data are not looked at."""
        self.teacher, self.sketched = _teacher(recipe, given), True
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
        self._begin(recipe, given)

    def check(self, method: Any) -> None:
        """Raises UserError where the method's sampler cannot be a scheduler of diffusers, or its discriminator would
        look for real images in vain."""
        sampler, denoiser = method.sampler(), self.teacher.denoiser
        if isinstance(sampler, ScaleSampler):  # run by the pipeline's own scheduler
            return
        if not isinstance(sampler, FewStepSampler):
            raise UserError(
                f"a student sampled by {sampler.name!r} cannot be a pipeline",
                cure="options.flipped=true" if hasattr(sampler, "predicts") else "use a few-step method",
            )
        sampler.conditions(1)  # what a pipeline cannot tell its network is refused
        family, student = self.teacher.family, getattr(method, "student", denoiser)
        if type(with_network(self.teacher.pipeline, student.network)) is not type(self.teacher.pipeline):
            family = FAMILIES["sana-sprint"]
        elif student.process != denoiser.process:
            raise UserError(
                f"the pipelines of {family.title} feed their networks times from 0 to 1000, not those that this "
                "student is trained for",
                cure="options.retime_share=0",
            )
        network_parts(self.teacher.pipeline, student)
        loop = (family.trigflow, family.consistency, family.experts)
        few_step_scheduler(sampler, denoiser.process, denoiser.prediction, *loop)
        judge = getattr(method, "discriminator", None)
        if judge is not None and not isinstance(judge, nn.Identity) and not self.data.pictures:
            switch = ", or options.gan_weight=0" if hasattr(method.options, "gan_weight") else ""
            raise UserError(
                f"{method.slug!r} shows its discriminator real images, but the data are prompts alone",
                cure=f"give images with captions{switch}",
            )

    def given(self) -> Mapping[str, Any]:
        teacher = self.teacher.denoiser
        asked = {"teacher": teacher, "teachers": [teacher], "student": self.start, "classes": []}
        return asked | {
            "decode": self.teacher.pictures,
            "autoencoder": self.teacher.autoencoder,
            "prompts": self.prompts,
        }

    def prompts(self, texts: Sequence[str]) -> PromptedData:
        """Prompts beside those of the data, as the network reads them: texts, or files of them."""
        return self.data if self.sketched else encode_prompts(Texts(texts), self.teacher, report=say)

    def teachers(self) -> Mapping[str, PipelineGenerator]:
        return {"teacher": self.teacher}

    def student(self, network: nn.Module, sampler: Sampler) -> PipelineGenerator:
        assert isinstance(network, Denoiser)
        return self.teacher.student(network, sampler)

    def rows(self, model: Model, seed: int, most: int = ROWS * COLUMNS) -> Rows:
        prompts = list(dict.fromkeys(self.data.captions))[:ROWS]
        rows, columns = sheet(len(prompts), COLUMNS, most)
        return model.rows(prompts[:rows], columns, seed)

    def call(self, model: Any, batch: int) -> Any:
        return model.sample([self.data.captions[0]] * batch)

    def brief_call(self, model: Any) -> Any:
        """One step, for a picture of a quarter of the size where the pipeline takes that."""
        height, width = (max(64, side // 4 // 32 * 32) for side in model.size)
        for size in (min((height, width), model.size), model.size):
            try:
                brief = PipelineGenerator(model.pipeline, OwnScheduler(steps=1), model.denoiser, size, model.folder)
                return brief.sample([self.data.captions[0]])
            except Exception:
                if size == model.size:
                    raise

    def cost(self, model: Model) -> dict[str, Any]:
        """A picture's time alone: these models take minutes for a batch."""
        from stillroom.evaluation import cost

        milliseconds, calls = cost.median_ms(lambda: self.call(model, 1))
        return {"latency_ms": {"1": round(milliseconds, 3)}, "latency_calls": {"1": calls}}

    def facts(self, recipe: Recipe, student: Any) -> dict[str, Any]:
        return {"pipeline": facts(self.teacher, student)}

    @classmethod
    def card(cls, recipe: Recipe, result: Mapping[str, Any]) -> Card:
        return pipeline_card(recipe, result)


def _teacher(recipe: Recipe, given: Mapping[str, Any]) -> PipelineGenerator:
    if "teacher" not in given:
        return PipelineGenerator.load(recipe.teacher)
    one = given["teacher"]
    return one if isinstance(one, PipelineGenerator) else PipelineGenerator(one)


def pipeline_card(recipe: Recipe, result: Mapping[str, Any]) -> Card:
    """Of a student that diffusers loads by itself: teacher, use, scheduler, adapter, licence."""
    about = result["pipeline"]
    front: dict[str, Any] = {"license": about["licence"] or "other"}
    if not about["licence"]:
        front["license_name"] = "licence-of-the-teacher"
    front["base_model"] = Path(recipe.teacher.rpartition("@")[0] or recipe.teacher).name
    steps = f"{len(about['timesteps'])} step{'s' if len(about['timesteps']) > 1 else ''}"
    asked = {"height": about["size"][0], "width": about["size"][1], **about["arguments"]}
    times = ", ".join(f"{time:g}" for time in about["timesteps"])
    folder = f"{Path(result['name'])}/student"
    use = [
        "import diffusers",
        "",
        f'pipeline = diffusers.DiffusionPipeline.from_pretrained("{folder}")',
        f"image = pipeline(prompt='a red cat', {', '.join(f'{key}={value!r}' for key, value in asked.items())})[0][0]",
    ]
    lines = [
        f"The scheduler in this folder, {about['scheduler']}, asks the network at the timesteps {times} when it is "
        f"asked for {steps}. {trained_for(sorted(result.get('also', {}).values()), about['reads_scale'])}",
        "",
    ]
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
    licence = [
        "", "## Licence", "",
        f"The weights derive from those of `{recipe.teacher}`, {said}; the teacher's licence, and that of the data, "
        "bind this model too.",
    ]  # fmt: skip
    makes = (
        f"A student of `{recipe.teacher}` ({about['family']}) that makes an image in "
        f"{evaluations(result['student']['nfe'])} (the teacher takes {result['teacher']['nfe']})"
    )
    return Card(
        makes, use, hub_library="diffusers", tag="text-to-image", front=front, alone="diffusers is all that is needed:",
        before_scores=lines, after_scores=licence,
    )  # fmt: skip


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
        "reads_scale": isinstance(student.sampler, ScaleFewStepSampler),
    }


def trained_for(steps: Sequence[int], reads_scale: bool) -> str:
    """What a card says of other calls. steps: numbers of steps that the same weights are for too. reads_scale: the
    guidance scale is an input of the network."""
    said = "The student was trained for these and with the arguments above"
    other = "another number of steps" if reads_scale else "another number of steps, or another guidance scale,"
    if steps:
        said += f", and its weights serve {' or '.join(map(str, steps))} step{'s' if steps[-1] > 1 else ''} too"
        other = other.replace("another number", "yet another number", 1)
    scale = " It reads the guidance scale, which may be any near those that it learnt." if reads_scale else ""
    return f"{said}: with {other} it is another model.{scale}"


def timesteps(generator: PipelineGenerator) -> list[float]:
    """At which times a pipeline's scheduler asks its network when it is given the student's own arguments."""
    scheduler, n = generator.pipeline.scheduler, generator.steps
    if "Flow" in type(scheduler).__name__:
        scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
    elif "intermediate_timesteps" in (asked := generator.arguments):  # an SCMScheduler's, whose last time is no call
        scheduler.set_timesteps(n, intermediate_timesteps=asked["intermediate_timesteps"])
    else:
        scheduler.set_timesteps(n)
    return [round(float(t), 3) for t in scheduler.timesteps[:n]]


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
