"""Text-to-image pipelines of diffusers as teachers, and students as pipelines that diffusers loads by itself."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.process import VP, Process, RectifiedFlow, process_from_dict
from stillroom.diffusion.sampling import FewStepSampler, Sampler, sampler_from_dict
from stillroom.errors import UserError
from stillroom.files import stay_inside
from stillroom.models.families import read_json, scheduler_config
from stillroom.models.folder import SIDE_FILE, save_network
from stillroom.models.lora import LoraDenoiser, plain_copy
from stillroom.models.pipeline_families import (
    BY_CLASS,
    Family,
    Size,
    check_pipeline,
    family_of,
    network_name,
    network_of,
)
from stillroom.models.plain_folder import CONFIG, check_config, without_bar
from stillroom.models.skeleton import pipeline_from_configs, unread

INDEX = "model_index.json"
LORA = "lora"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Where the parts of a pipeline may come from; a part from anywhere else would run code of its own."""
TEACHER_STEPS = 25
_SIZED = re.compile(r"(?P<folder>.+)@(?P<height>[0-9]+)(x(?P<width>[0-9]+))?")


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


class PipelineGenerator:
    """A text-to-image pipeline of diffusers, with its network as a :class:`Denoiser`.

    pipeline: any pipeline of a supported class. sampler: how it is run; a :class:`FewStepSampler` replaces the
    scheduler by one that asks at those times. size: (height, width) of a picture in pixels.
    Raises UserError for classes, parts and samplers that are not supported, naming them.
    """

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
            network = network_of(pipeline)
            asked = {"call": self.family.call, "guide": self.family.guide}
            denoiser = Denoiser(network, process, kind, shape=shape, **asked)  # type: ignore[arg-type]
        self.denoiser = denoiser.eval()
        self.sampler = sampler or OwnScheduler()
        self.pipeline = copy.copy(pipeline)
        parts: dict[str, Any] = {network_name(pipeline): denoiser.network}
        if isinstance(self.sampler, FewStepSampler):
            parts["scheduler"] = few_step_scheduler(self.sampler, denoiser.process, denoiser.prediction)
        self.pipeline.register_modules(**parts)
        self.pipeline.set_progress_bar_config(disable=True)

    # --- sampling -------------------------------------------------------------------------------------------------
    @property
    def arguments(self) -> dict[str, Any]:
        """What the pipeline's own call is given besides prompts, noise and size."""
        found = {**self.family.arguments, "num_inference_steps": self.steps}
        guidance = getattr(self.sampler, "guidance", 1.0)
        if guidance != 1.0:
            found[self.family.guided] = guidance - self.family.offset
            if self.family.guided == "true_cfg_scale":
                found["negative_prompt"] = self.family.null
        return found

    @property
    def steps(self) -> int:
        """Of the scheduler."""
        if isinstance(self.sampler, FewStepSampler):
            return len(self.sampler.times)
        return getattr(self.sampler, "steps", 0) or TEACHER_STEPS

    @torch.no_grad()
    def sample(
        self, captions: Sequence[str] | str, seed: int | Sequence[int] = 0, batch: int = 8, **changes: Any
    ) -> Tensor:
        """Images ``[N, 3, H, W]`` float32 in [-1, 1], one per caption, drawn by the pipeline itself, on the CPU.

        seed: of the whole call, or one for each caption. Image i starts from noise of its own; of the schedulers, those
        of rectified flows draw the noise between steps for a batch at a time. changes: arguments of the pipeline's own
        call, e.g. ``guidance_scale``. Raises UserError without captions.
        """
        texts = [captions] if isinstance(captions, str) else list(captions)
        if not texts:
            raise UserError("no samples were asked for", cure="give at least one caption")
        seeds = [_mix(seed, i) for i in range(len(texts))] if isinstance(seed, int) else [int(one) for one in seed]
        if len(seeds) != len(texts):
            raise UserError(f"{len(seeds)} seeds for {len(texts)} captions", cure="give one seed, or one per caption")
        arguments, found = {**self.arguments, **changes}, []
        for start in range(0, len(texts), batch):
            rows = slice(start, start + batch)
            generators = [torch.Generator().manual_seed(one) for one in seeds[rows]]
            part = dict(arguments)
            if isinstance(part.get("negative_prompt"), str):
                part["negative_prompt"] = [part["negative_prompt"]] * len(texts[rows])
            with torch.random.fork_rng(), self.denoiser.adapter_scope():
                torch.manual_seed(_mix(*seeds[rows]))
                images = self.pipeline(
                    prompt=texts[rows], height=self.size[0], width=self.size[1], generator=generators,
                    output_type="pt", **part,
                )[0]  # fmt: skip
            images = images[:, 0] if images.ndim == 5 else images
            found.append(images.float().cpu() * 2 - 1)
        return torch.cat(found)

    def to(self, device: torch.device | str) -> PipelineGenerator:
        self.pipeline.to(device)
        self.denoiser.to(device)
        return self

    def student(self, network: Denoiser, sampler: Sampler) -> PipelineGenerator:
        """This pipeline with another network and sampler; all other parts are shared."""
        return PipelineGenerator(self.pipeline, sampler, network, self.size, self.folder)

    # --- words and pictures ---------------------------------------------------------------------------------------
    def conditions(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``(conditions [B, ...], unconditional values)`` of prompts, under the names that the network takes."""
        return self.family.conditions(self.pipeline, prompts, self.size)

    def latents(self, images: Tensor) -> Tensor:
        """Latents of images ``[B, 3, H, W]`` in [-1, 1], of this generator's size."""
        return self.family.latents(self.pipeline, images)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, dtype: torch.dtype | None = None, **extra: Any) -> None:
        """Write a pipeline folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads by itself. Parts other
        than network and scheduler are copied from the teacher's folder. A LoRA student is merged, and its adapter
        written to ``lora/`` in diffusers' own format as well. ``extra`` entries go to ``stillroom.json``."""
        folder, name = Path(folder), network_name(self.pipeline)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = self.denoiser.adapter if isinstance(self.denoiser, LoraDenoiser) else None
        if adapter:
            save_lora(self.denoiser, name, folder / LORA)
        network = plain_copy(self.denoiser, adapter).network if adapter else self.denoiser.network
        if self.folder is not None:
            index = read_json(self.folder / INDEX)
            for part in _parts(index):
                if part not in (name, "scheduler") and (self.folder / part).is_dir():
                    shutil.copytree(self.folder / part, folder / part, ignore=_unsafe, dirs_exist_ok=True)
        else:
            others = {k: v for k, v in self.pipeline.components.items() if k not in (name, "scheduler")}
            index = dict(self.pipeline.config)
            for part, module in others.items():
                if isinstance(module, nn.Module):
                    module.save_pretrained(folder / part, safe_serialization=True)  # type: ignore[operator]
                elif hasattr(module, "save_pretrained"):
                    module.save_pretrained(folder / part)
        save_network(network, folder, dtype)
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
    def load(cls, name: str | Path) -> PipelineGenerator:
        """Read a pipeline's folder, or ``DIR@SIZE`` / ``DIR@HEIGHTxWIDTH`` for pictures of another size than its own.

        Only safetensors are read, nothing is downloaded, no code of the folder is run. Raises UserError for what is
        missing, damaged or not supported, naming it.
        """
        folder, size = sized(name)
        index = check_index(folder)
        pipeline = _from_pretrained(index["_class_name"], folder)
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else {}
        if side.get("sampler", {}).get("name", OwnScheduler.name) == OwnScheduler.name:
            return cls(pipeline, size=size, folder=folder)
        # A student's scheduler only samples; what it was trained with stands in the side file.
        size = size or (int(side["size"][0]), int(side["size"][1]))
        family = family_of(index["_class_name"], str(folder))
        denoiser = Denoiser(
            network_of(pipeline), process_from_dict(side["process"]), side["prediction"],
            shape=family.shape(pipeline, size), call=family.call, guide=family.guide,
        )  # fmt: skip
        return cls(pipeline, sampler_from_dict(side["sampler"]), denoiser, size, folder)


# --- folders ----------------------------------------------------------------------------------------------------------
def sized(name: str | Path) -> tuple[Path, Size | None]:
    """``DIR``, ``DIR@512`` or ``DIR@HEIGHTxWIDTH`` as folder and size."""
    path = Path(name).expanduser()
    found = _SIZED.fullmatch(str(name))
    if path.exists() or not found:
        return path, None
    height = int(found["height"])
    return Path(found["folder"]).expanduser(), (height, int(found["width"] or height))


def is_pipeline(name: str | Path) -> bool:
    """Whether a name is the folder of a diffusers pipeline."""
    return (sized(name)[0] / INDEX).is_file()


def check_index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline's folder. Raises UserError as :func:`check_parts` does, and for a class that is not
    supported."""
    index = check_parts(folder)
    family_of(index.get("_class_name"), str(folder))
    return index


def check_parts(folder: Path) -> dict[str, Any]:
    """The index of the folder of any pipeline. Raises UserError for parts that would run code from elsewhere, and for
    files that lead out of the folder."""
    index = read_json(folder / INDEX)
    stay_inside(folder)
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{folder / INDEX} asks for code of its own", cure=f"supported: {', '.join(BY_CLASS)}")
    for part, (library, name) in _parts(index).items():
        if not part.isidentifier():  # parts are copied by name: none may lead out of the folder
            raise UserError(f"{folder / INDEX} has a part called {part!r}", cure="copy the folder again")
        if library not in LIBRARIES:
            raise UserError(
                f"{folder / INDEX}: {part} is a {name} of {library!r}", cure=f"supported: {', '.join(LIBRARIES)}"
            )
        if not (folder / part).is_dir():
            raise UserError(f"{folder} has no {part}/", cure="copy the whole folder")
        if (folder / part / CONFIG).is_file():
            check_config(folder / part)
    return index


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Part -> (library, class) of an index; parts that were left out are not in it."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None and value[1] is not None
    }


def _from_pretrained(class_name: str, folder: Path) -> Any:
    import diffusers

    if unread():
        return pipeline_from_configs(getattr(diffusers, class_name), folder, read_json(folder / INDEX))
    diffusers.utils.logging.disable_progress_bar()
    try:
        with without_bar():
            pipeline = getattr(diffusers, class_name).from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True
            )
    except Exception as problem:  # of a config's nonsense anything may come
        raise UserError(
            f"the pipeline {folder} cannot be read ({str(problem)[:300]})",
            cure="copy the folder again; only safetensors files are read, never pickles",
        ) from None
    finally:
        diffusers.utils.logging.enable_progress_bar()
    name = network_name(pipeline)
    known = {key for file in (folder / name).glob("*.safetensors") for key in _keys(file)}
    if missing := sorted(set(network_of(pipeline).state_dict()) - known):
        raise UserError(f"the weights in {folder / name} lack {missing[0]}", cure="copy the folder again")
    return pipeline


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _unsafe(folder: str, names: list[str]) -> list[str]:
    """What is not copied: weights in formats that run code, and code."""
    return [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py", ".msgpack", ".h5", ".onnx"))]


def fingerprint(folder: Path) -> str:
    """Hex digest over names, sizes and times of a folder's files: cheap, and another one after any change."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state = path.stat()
        digest.update(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def save_lora(denoiser: Denoiser, prefix: str, folder: Path) -> None:
    """Write an adapter as ``pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights`` reads, and as
    ``adapter_model.safetensors`` with ``adapter_config.json``, which peft puts on the network alone."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    role, ranks, alphas, targets = str(denoiser.adapter), set(), set(), []
    for name, module in denoiser.network.named_modules():
        if isinstance(module, LoraLayer) and role in module.lora_A:
            ranks.add(int(module.r[role]))
            alphas.add(float(module.lora_alpha[role]))
            targets.append(name)
    state = {
        name.replace(f".{role}.", "."): p.detach().cpu().contiguous()
        for name, p in denoiser.network.named_parameters()
        if f".{role}." in name
    }
    settings: dict[str, Any] = {"r": ranks.pop(), "lora_alpha": alphas.pop(), "target_modules": sorted(targets)}
    about = json.dumps({f"{prefix}.{key}": value for key, value in (settings | {"peft_type": "LORA"}).items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{prefix}.{name}": value for name, value in state.items()}, folder / LORA_WEIGHTS,
        metadata={"format": "pt", "lora_adapter_metadata": about},
    )  # fmt: skip
    save_file(
        {f"base_model.model.{name}": value for name, value in state.items()}, folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    LoraConfig(**settings).save_pretrained(str(folder))


# --- schedulers -------------------------------------------------------------------------------------------------------
def few_step_scheduler(sampler: FewStepSampler, process: Process, prediction: str) -> Any:
    """A diffusers scheduler that, asked for ``len(sampler.times)`` steps and nothing else, runs a pipeline as
    ``sampler`` would. Timesteps of several steps are whole numbers, at most one from those of training.

    Raises UserError for samplers that no scheduler reproduces, with what to change.
    """
    import diffusers

    n = len(sampler.times)
    t_init = sampler.times[0]
    even = tuple(t_init * (1 - k / n) for k in range(n))
    if any(abs(a - b) > 1e-6 for a, b in zip(sampler.times, even, strict=True)):
        raise UserError(f"no scheduler of diffusers asks at the times {sampler.times}", cure="use evenly spaced steps")
    if n > 1 and sampler.renoise == "fixed":
        raise UserError("no scheduler of diffusers keeps the first noise", cure="options.renoise=fresh, or ddim")
    if isinstance(process, RectifiedFlow):
        if t_init != 1.0:
            raise UserError(
                f"pipelines of rectified flows start from pure noise, not at t = {t_init}", cure="options.t_init=1.0"
            )
        # The same even steps, whether a pipeline gives the scheduler its sigmas (1 .. 1/n) or leaves them to it.
        return diffusers.FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            shift_terminal=None if n == 1 else 1 / n,
            stochastic_sampling=n > 1 and sampler.renoise == "fresh",
        )
    if not isinstance(process, VP):
        raise UserError(f"students of the {process.name} process cannot be pipelines", cure="use a VP or flow teacher")
    config = {k: v for k, v in scheduler_config(process, prediction).items() if k != "_class_name"}
    config["steps_offset"] = 1  # unused here, but Stable Diffusion's pipelines insist on it
    top = torch.tensor(t_init * process.t_max, dtype=torch.float64)
    if n == 1:  # one "karras" step lies at sigma_max; its noise is scaled as in training, its time need not be whole
        sigma = float(process.sigma(top) / process.alpha(top))
        return diffusers.EulerDiscreteScheduler(
            **config, timestep_spacing="linspace", use_karras_sigmas=True, sigma_max=sigma, sigma_min=sigma / 2
        )
    if sampler.renoise == "ddim":
        return diffusers.EulerDiscreteScheduler(**_ending_at(config, process, top), timestep_spacing="trailing")
    if float(process.sigma(top)) < 0.99:
        raise UserError(
            f"diffusers' scheduler with fresh noise starts from pure noise, not at {t_init} of the process",
            cure="options.t_init=1.0, or options.renoise=ddim, or one step",
        )
    # With this scaling its boundary condition is the identity: c_skip = 0, c_out = 1.
    return diffusers.LCMScheduler(**_ending_at(config, process, top), original_inference_steps=n, timestep_scaling=1e8)


def _ending_at(config: dict[str, Any], process: VP, top: Tensor) -> dict[str, Any]:
    """The config of the same process cut off after time ``top``."""
    steps = round(float(top)) + 1
    if steps == process.steps:
        return config
    times = torch.arange(steps, dtype=torch.float64)
    kept = process.alpha(times) ** 2
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return config | {"num_train_timesteps": steps, "trained_betas": betas.tolist()}


def _mix(*numbers: int) -> int:
    """A 63-bit seed from numbers."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
