"""Text-to-image pipelines of diffusers as teachers, and students as pipelines that diffusers loads by itself."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.process import Process, process_from_dict
from stillroom.diffusion.routed import ByNoise, RoutedDenoiser
from stillroom.diffusion.sampling import FewStepSampler, Sampler, ScaleFewStepSampler, sampler_from_dict
from stillroom.draws import mix
from stillroom.engine.progress import Parts
from stillroom.errors import UserError
from stillroom.folders.attachments import ATTACHED, attach, save_attachment
from stillroom.folders.denoisers import SIDE_FILE, save_network
from stillroom.folders.pipeline_calls import (
    BOUNDARY,
    SECOND,
    Size,
    network_name,
    network_of,
    scaled_latents,
    scaled_pictures,
    sdxl_latents,
)
from stillroom.folders.pipeline_families import Family, check_pipeline, family_of, with_network
from stillroom.folders.pipelines import (
    INDEX,
    LORA,
    _from_pretrained,
    _parts,
    adapters_of,
    check_index,
    copy_part,
    few_step_scheduler,
    is_pipeline,
    save_lora,
    sized,
)
from stillroom.folders.weights import save_pretrained
from stillroom.parsing import read_json
from stillroom.pictures import PictureGenerator
from stillroom.surgery.attached import AttachedDenoiser
from stillroom.surgery.lora import KEPT, TOGETHER, LoraDenoiser, plain_copy
from stillroom.surgery.modules import device_of
from stillroom.task import COLUMNS, Part, Rows

TEACHER_STEPS = 25


@dataclass(frozen=True)
class OwnScheduler(Sampler):
    """A pipeline's own scheduler, as its class runs it. steps: 0 is 25. guidance: the scale that is
    asked for; 1 is none."""

    name: ClassVar[str] = "scheduler"
    steps: int = 0
    guidance: float = 1.0

    @property
    def nfe(self) -> int:
        return (self.steps or TEACHER_STEPS) * (1 if self.guidance in (0.0, 1.0) else 2)

    def sample(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        raise UserError("a pipeline's own scheduler runs inside the pipeline only", cure="PipelineGenerator.sample")


def denoiser_of(pipeline: Any, family: Family, process: Process, kind: Any, shape: tuple[int, ...]) -> Denoiser:
    """What a pipeline's network says, or its two experts say, each at its own noise."""
    asked: dict[str, Any] = {"shape": shape, "call": family.call, "guide": family.guide}
    border = pipeline.config.get(BOUNDARY) if family.experts else None
    first = Denoiser(network_of(pipeline), process, kind, **asked)
    if border is None:
        return first
    if isinstance(border, bool) or not isinstance(border, int | float) or not 0 < border < 1:
        raise UserError(
            f"{BOUNDARY} in the pipeline's model_index.json must be a number between 0 and 1, got {border!r}",
            cure="write the share of the noise from which the first expert answers, for example 0.875",
        )
    second = Denoiser(getattr(pipeline, SECOND), process, kind, **asked)
    return RoutedDenoiser({SECOND: second, network_name(pipeline): first}, ByNoise((float(border),)))


def network_parts(pipeline: Any, denoiser: Denoiser) -> dict[str, Any]:
    """The parts of a pipeline that denoise, as ``denoiser`` has them. Raises UserError for experts that a pipeline of
    its class does not run."""
    name, family = network_name(pipeline), family_of(type(pipeline).__name__, "the teacher")
    if not isinstance(denoiser, RoutedDenoiser):
        return {name: denoiser.network, **({SECOND: None} if family.experts else {})}
    networks = [one.network for one in denoiser.experts.values()]
    if not family.experts or len(networks) != 2 or not isinstance(denoiser.route, ByNoise):
        able = "two experts by noise" if family.experts else "one network"
        raise UserError(
            f"the pipelines of {family.title} run {able}, this student has {len(networks)}",
            cure="options.phases=" + ("2" if family.experts else "1, or a Wan as the teacher"),
        )
    return {name: networks[1], SECOND: networks[0]}


def boundary_of(denoiser: Denoiser) -> float | None:
    """From which share of the times on a pipeline's first expert is asked; None where there is one network."""
    route: Any = getattr(denoiser, "route", None)
    return route.bounds[0] if isinstance(route, ByNoise) else None


class PipelineGenerator(PictureGenerator):
    """A text-to-image pipeline of diffusers, with its network as a :class:`Denoiser`.

    pipeline: any pipeline of a supported class. sampler: how it is run; a :class:`FewStepSampler` replaces the
    scheduler by one that asks at those times. size: (height, width) of a picture in pixels.
    Raises UserError for classes, parts and samplers that are not supported, naming them.
    """

    noun = "a text-to-image pipeline"
    does, usage, asked_by = "draws captions", "stillroom.load(DIR).sample(captions)", "captions"
    most_at_once = 8

    def __init__(
        self,
        pipeline: Any,
        sampler: Sampler | None = None,
        denoiser: Denoiser | None = None,
        size: Size | None = None,
        folder: Path | None = None,
    ) -> None:
        self.family: Family = family_of(type(pipeline).__name__, "the teacher")
        check_pipeline(pipeline, self.family, str(folder or type(pipeline).__name__))
        self.size: Size = size or self.family.own_size(pipeline)
        self.folder = folder
        shape = self.family.shape(pipeline, self.size)
        if denoiser is None:
            process, kind = self.family.process(pipeline, self.size)
            denoiser = denoiser_of(pipeline, self.family, process, kind, shape)
        self.denoiser = denoiser.eval()
        self.sampler = sampler or OwnScheduler(self.family.steps)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
                if any(p.dtype != torch.float32 for p in part.parameters()):
                    part.float()  # an object's parts may be halves; those of a folder never are
        self.pipeline = copy.copy(pipeline)
        parts: dict[str, Any] = network_parts(pipeline, denoiser)
        if isinstance(self.sampler, FewStepSampler):
            loop = (self.family.trigflow, self.family.consistency, self.family.experts)
            parts["scheduler"] = few_step_scheduler(self.sampler, denoiser.process, denoiser.prediction, *loop)
        if self.family.parts is not None:
            parts |= self.family.parts(getattr(self.sampler, "guidance", 1.0))
        self.pipeline.register_modules(**parts)
        if self.family.experts:
            self.pipeline.register_to_config(**{BOUNDARY: boundary_of(denoiser)})
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def module(self) -> Denoiser:
        return self.denoiser

    def rows(self, asked: Sequence[str] = (), n: int = COLUMNS, seed: int = 0) -> Rows:
        """``n`` samples for each prompt. Raises UserError without any."""
        if not asked:
            raise UserError("this model draws prompts", cure='give --captions "a red cat"')
        images = self.sample([prompt for prompt in asked for _ in range(n)], seed=seed)
        return Rows(list(asked), images.unflatten(0, (len(asked), n)))

    # --- wishes ---------------------------------------------------------------------------------------------------
    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    @property
    def image_size(self) -> Size:
        return self.size

    def check(self, wish: str) -> None:
        if not wish.strip():
            raise UserError("the caption is empty", cure="say what the image is to show")

    @property
    def settings(self) -> dict[str, float]:
        return super().settings | ({"steps": self.steps} if hasattr(self.sampler, "steps") else {})

    def draw(self, wish: str, n: int, seed: int, **changes: Any) -> Tensor:
        return self.sample([wish] * n, seed=seed, **changes)

    # --- other runtimes -------------------------------------------------------------------------------------------
    def parts(self, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
        from stillroom.tasks.pipelines import export

        return export.parts(self, whole)

    def export_facts(self) -> dict[str, Any]:
        from stillroom.tasks.pipelines import export

        return export.facts(self)

    # --- sampling -------------------------------------------------------------------------------------------------
    @property
    def arguments(self) -> dict[str, Any]:
        """What the pipeline's own call is given besides prompts, noise and size."""
        times = self.sampler.times if isinstance(self.sampler, FewStepSampler) else ()
        guidance = getattr(self.sampler, "guidance", 1.0)
        asked = self.family.asked(self.pipeline, self.denoiser.process, times, guidance)
        if self.family.trigflow and isinstance(self.sampler, ScaleFewStepSampler):
            asked["guidance_scale"] = self.sampler.scale
        if type(self.pipeline.scheduler).__name__ == "TCDScheduler":
            asked["eta"] = getattr(self.sampler, "eta", 0.0)
        return {**asked, "num_inference_steps": self.steps}

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that are saved alone, each with its folder: the student's own is ``lora``; one that speaks
        beside it, and one that its method keeps for another number of steps, has its name there (``lora-steps4``)."""
        if not isinstance(self.denoiser, LoraDenoiser):
            return {}
        spoken = (self.denoiser.adapter or "").split(TOGETHER)
        kept = [role for role in adapters_of(self.denoiser) if role in spoken or role.startswith(KEPT)]
        return {role: LORA if role == self.denoiser.role else f"{LORA}-{role}" for role in kept}

    @property
    def steps(self) -> int:
        """Of the scheduler."""
        if isinstance(self.sampler, FewStepSampler):
            return len(self.sampler.times)
        return getattr(self.sampler, "steps", 0) or TEACHER_STEPS

    @torch.no_grad()
    def sample(
        self, captions: Sequence[str] | str, seed: int | Sequence[int] = 0, batch: int = 0, **changes: Any
    ) -> Tensor:
        """Images ``[N, 3, H, W]`` float32 in [-1, 1], one per caption, drawn by the pipeline itself, on the CPU.

        seed: of the whole call, or one for each caption. Image i starts from noise of its own; of the schedulers, those
        of rectified flows draw the noise between steps for a batch at a time. batch: images at once; 0: 8, or as many
        as :attr:`at_once` allows; they are decoded one by one. changes: settings of the sampler, e.g. ``guidance=3``,
        or arguments of the pipeline's own call, e.g. ``guidance_scale``. Raises UserError without captions.
        """
        own = {field.name for field in fields(self.sampler)}  # type: ignore[arg-type]
        if settings := {name: value for name, value in changes.items() if name in own}:
            others = {name: value for name, value in changes.items() if name not in own}
            twin = self.student(self.denoiser, self.changed(**settings))
            twin.steering = self.steering
            return twin.sample(captions, seed, batch, **others)
        texts = [captions] if isinstance(captions, str) else list(captions)
        if not texts:
            raise UserError("no samples were asked for", cure="give at least one caption")
        seeds = [mix(seed, i) for i in range(len(texts))] if isinstance(seed, int) else [int(one) for one in seed]
        if len(seeds) != len(texts):
            raise UserError(f"{len(seeds)} seeds for {len(texts)} captions", cure="give one seed, or one per caption")
        arguments, found = {**self.arguments, **changes}, []
        batch = batch or self.at_once
        starts = Parts(len(texts), batch)
        self._gather()
        for start in starts:
            rows = slice(start, start + batch)
            generators = [torch.Generator().manual_seed(one) for one in seeds[rows]]
            part = dict(arguments)
            if isinstance(part.get("negative_prompt"), str):
                part["negative_prompt"] = [part["negative_prompt"]] * len(texts[rows])
            told = self.denoiser.told(self.sampler.conditions(len(texts[rows])))
            spoken = self.denoiser.adapter_scope()
            with torch.random.fork_rng(), spoken, told, self.steered(), self._told(starts, arguments):
                torch.manual_seed(mix(*seeds[rows]))
                images = self.pipeline(
                    prompt=texts[rows], height=self.size[0], width=self.size[1], generator=generators,
                    output_type="pt", **part,
                )[0]  # fmt: skip
            images = images[:, 0] if images.ndim == 5 else images[:, :3]  # some autoencoders decode opacity as well
            found.append(images.float().cpu() * 2 - 1)
        return torch.cat(found)

    def said(self, text: str) -> dict[str, Tensor]:
        self._gather()
        return self.conditions([text])[0]

    def drawing(self) -> list[Callable[[], Any]]:
        """And one picture decoded."""
        vae, shape = self.pipeline.components.get("vae"), self.denoiser.shape
        own = getattr(getattr(vae, "config", None), "latent_channels", None)
        if own != shape[0]:  # of another layout, or none
            return super().drawing()
        return [*super().drawing(), lambda: vae.decode(torch.empty(1, *shape))]

    def _gather(self) -> None:
        """All parts to where the network computes."""
        device = device_of(self.denoiser)
        for part in self.networks.values():
            if part is not self.denoiser.network:
                part.to(device)

    @contextmanager
    def _told(self, starts: Parts, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Around one batch: each evaluation of the network is a part of it, and pictures are decoded one by one, which
        takes the least memory."""
        expected = int(arguments["num_inference_steps"]) * (2 if "negative_prompt" in arguments else 1)
        done = itertools.count(1)
        hooks = [
            network.register_forward_hook(lambda *_: starts.within(next(done) / expected))
            for network in network_parts(self.pipeline, self.denoiser).values()
            if network is not None
        ]
        vae = self.pipeline.components.get("vae")
        sliced = getattr(vae, "use_slicing", None)
        if sliced is not None:
            vae.use_slicing = True
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if sliced is not None:
                vae.use_slicing = sliced

    def to(self, device: torch.device | str) -> PipelineGenerator:
        self.pipeline.to(device)
        self.denoiser.to(device)
        return self

    def student(self, network: Denoiser, sampler: Sampler) -> PipelineGenerator:
        """This pipeline with another network and sampler; all other parts are shared. Experts that are adapters are
        merged: a pipeline has a network for each."""
        if isinstance(network, RoutedDenoiser):
            merged = {
                name: one.merged(share=True) if isinstance(one, LoraDenoiser) else one
                for name, one in network.experts.items()
            }
            network = network.with_experts(merged)
        pipeline = with_network(self.pipeline, network.network)
        return PipelineGenerator(pipeline, sampler, network, self.size, self.folder)

    # --- words and pictures ---------------------------------------------------------------------------------------
    def conditions(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``(conditions [B, ...], unconditional values)`` of prompts, under the names that the network takes."""
        return self.family.conditions(self.pipeline, prompts, self.size)

    def latents(self, images: Tensor) -> Tensor:
        """Latents of images ``[B, 3, H, W]`` in [-1, 1], of this generator's size."""
        return self.family.latents(self.pipeline, images)

    @property
    def autoencoder(self) -> nn.Module | None:
        """What :meth:`pictures` decodes by; None where it cannot."""
        plain = scaled_latents, sdxl_latents
        if self.family.encode_image not in plain or self.pipeline.vae.config.get("latents_mean") is not None:
            return None
        return self.pipeline.vae

    def pictures(self, latents: Tensor) -> Tensor:
        """Images from latents, with a graph. Raises UserError for autoencoders that are decoded in another way than by
        one scale."""
        if self.autoencoder is None:
            raise UserError(
                f"{self.family.title}: its latents cannot be decoded inside a training", cure="reward the latents"
            )
        return scaled_pictures(self.pipeline, latents)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, dtype: torch.dtype | None = None, **extra: Any) -> None:
        """Write a pipeline folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads by itself. Parts other
        than network and scheduler are copied from the teacher's folder. A LoRA student is merged, and its adapter
        written to ``lora/`` in diffusers' own format as well. ``extra`` entries go to ``stillroom.json``."""
        folder, name = Path(folder), network_name(self.pipeline)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = self.denoiser.adapter if isinstance(self.denoiser, LoraDenoiser) else None
        for role, place in self.adapters.items():
            save_lora(self.denoiser, role, name, folder / place)
        networks = network_parts(self.pipeline, self.denoiser)
        if adapter:
            networks[name] = plain_copy(self.denoiser, adapter, share=True).network
        guiding = self.family.parts(getattr(self.sampler, "guidance", 1.0)) if self.family.parts else {}
        if self.folder is not None:
            index = read_json(self.folder / INDEX)
            for part in _parts(index):
                if part not in (*networks, "scheduler", *guiding) and (self.folder / part).is_dir():
                    copy_part(self.folder / part, folder / part)
        else:
            others = {k: v for k, v in self.pipeline.components.items() if k not in (*networks, "scheduler")}
            index = dict(self.pipeline.config)
            for part, module in others.items():
                if isinstance(module, nn.Module):
                    save_pretrained(module, folder / part)
                elif hasattr(module, "save_pretrained"):
                    module.save_pretrained(folder / part)
        for part, guider in guiding.items():
            index[part] = [None, None]
            if guider is not None:
                guider.save_pretrained(folder / part)
                index[part] = ["diffusers", type(guider).__name__]
        for part, network in networks.items():
            if network is not None:
                save_network(network, folder, dtype, part)
            if part == SECOND:
                index[part] = [None, None] if network is None else ["diffusers", type(network).__name__]
                index[BOUNDARY] = boundary_of(self.denoiser)
        if isinstance(self.denoiser, AttachedDenoiser) and self.denoiser.attachment.state_dict():
            save_attachment(self.denoiser, folder / ATTACHED)
        self.pipeline.scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(self.pipeline.scheduler).__name__]
        index["_class_name"] = type(self.pipeline).__name__
        index.pop("_name_or_path", None)
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        side = {
            "process": self.denoiser.process.to_dict(),
            "prediction": self.denoiser.prediction,
            "sampler": self.sampler.to_dict(),
            "size": list(self.size),
            "arguments": self.arguments,
            **extra,
        }
        (folder / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """A folder with diffusers' ``model_index.json``."""
        return is_pipeline(folder)

    @classmethod
    def load(cls, folder: str | Path) -> PipelineGenerator:
        """Read a pipeline's folder, or ``DIR@SIZE`` / ``DIR@HEIGHTxWIDTH`` for pictures of another size than its own.

        Only safetensors are read, nothing is downloaded, no code of the folder is run. Raises UserError for what is
        missing, damaged or not supported, naming it.
        """
        folder, size = sized(folder)
        index = check_index(folder)
        pipeline = _from_pretrained(index["_class_name"], folder)
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else {}
        if side.get("sampler", {}).get("name", OwnScheduler.name) == OwnScheduler.name:
            return cls(pipeline, size=size, folder=folder)
        # A student's scheduler only samples; what it was trained with stands in the side file.
        size = size or (int(side["size"][0]), int(side["size"][1]))
        family = family_of(index["_class_name"], str(folder))
        denoiser = denoiser_of(
            pipeline, family, process_from_dict(side["process"]), side["prediction"], family.shape(pipeline, size)
        )
        denoiser = attach(denoiser, folder / ATTACHED) if (folder / ATTACHED).is_dir() else denoiser
        return cls(pipeline, sampler_from_dict(side["sampler"]), denoiser, size, folder)
