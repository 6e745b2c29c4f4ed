"""Text-to-image pipelines of diffusers as teachers, and students as pipelines that diffusers loads by itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import VP, Process, RectifiedFlow
from stillroom.diffusion.sampling import FewStepSampler, TCDSampler
from stillroom.errors import UserError
from stillroom.files import stay_inside
from stillroom.folders.diffusers_networks import scheduler_config
from stillroom.folders.pipeline_calls import Size, networks_of, sprint_times
from stillroom.folders.pipeline_families import BY_CLASS, family_of
from stillroom.folders.pretrained import in_float32
from stillroom.folders.transformers_layout import CONFIG, check_config, without_bar
from stillroom.folders.weights import copy_weights, is_weight_file, weight_files
from stillroom.parsing import read_json
from stillroom.surgery.skeleton import pipeline_from_configs, unread

INDEX = "model_index.json"
LORA = "lora"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "kolors")
"""Where the parts of a pipeline may come from; a part from anywhere else would run code of its own."""
PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline", "KarrasVePipeline")
NOWHERE = Path(os.devnull)
"""A folder that holds nothing."""
_SIZED = re.compile(r"(?P<folder>.+)@(?P<height>[0-9]+)(x(?P<width>[0-9]+))?")


# --- folders ----------------------------------------------------------------------------------------------------------
def sized(name: str | Path) -> tuple[Path, Size | None]:
    """``DIR``, ``DIR@512`` or ``DIR@HEIGHTxWIDTH`` as folder and size. No name is :data:`NOWHERE`, not the working
    folder."""
    if not str(name):
        return NOWHERE, None
    path = Path(name).expanduser()
    found = _SIZED.fullmatch(str(name))
    if path.exists() or not found:
        return path, None
    height = int(found["height"])
    return Path(found["folder"]).expanduser(), (height, int(found["width"] or height))


def is_pipeline(name: str | Path) -> bool:
    """Whether a name is the folder of a diffusers pipeline that draws more than pixels without words
    (:func:`draws_pixels`)."""
    return (sized(name)[0] / INDEX).is_file() and not draws_pixels(sized(name)[0])


def draws_pixels(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline of one network of pixels, drawn by label or by nothing, as its
    ``train_unconditional.py`` leaves it."""
    return (folder / INDEX).is_file() and read_json(folder / INDEX).get("_class_name") in PIXEL_PIPELINES


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
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }


def _from_pretrained(class_name: str, folder: Path) -> Any:
    import diffusers

    cls = getattr(diffusers, class_name)
    if unread():
        return pipeline_from_configs(cls, folder, read_json(folder / INDEX))
    pipeline = read_pipeline(cls, folder)
    for name, network in networks_of(pipeline).items():
        files = weight_files(folder / name)
        known = files.keys() if files is not None else set()
        if missing := sorted(set(network.state_dict()) - known):
            raise UserError(f"the weights in {folder / name} lack {missing[0]}", cure="copy the folder again")
    return pipeline


def read_pipeline(cls: Any, folder: Path) -> Any:
    """``cls.from_pretrained`` of a pipeline's folder: every part in float32, whatever its config says and in whatever
    precision its files are. Raises UserError for what cannot be read."""
    import diffusers

    index = read_json(folder / INDEX)
    diffusers.utils.logging.disable_progress_bar()
    try:
        with without_bar():
            return cls.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                **in_float32(cls),
                **_of_variants(folder, index),
            )
    except UserError:
        raise
    except ImportError as problem:  # what some classes need more
        raise UserError(f"the pipeline {folder} cannot be read ({problem})", cure="install it") from None
    except Exception as problem:  # of a config's nonsense anything may come
        raise UserError(
            f"the pipeline {folder} cannot be read ({' '.join(str(problem).split())[:300]})",
            cure="copy the folder again; only safetensors files are read, never pickles",
        ) from None
    finally:
        diffusers.utils.logging.enable_progress_bar()


def _of_variants(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The parts whose weights have the name of a variant alone (``model.fp16.safetensors``), in float32."""
    found: dict[str, Any] = {}
    for part, (library, name) in _parts(index).items():
        files = weight_files(folder / part)
        if files is None or not files.variant:
            continue
        cls = part_class(library, name)
        found[part] = cls.from_pretrained(
            folder / part, local_files_only=True, use_safetensors=True, **in_float32(cls, files)
        )
    return found


def part_class(library: str, name: str) -> Any:
    """The class of a part, from one of ``LIBRARIES``. Raises UserError for one that it does not have."""
    import diffusers
    import transformers

    places = {"diffusers": diffusers, "transformers": transformers}
    place = places.get(library) or getattr(diffusers.pipelines, library)
    if not hasattr(place, name):
        raise UserError(f"{library} has no class {name!r}", cure="update it, or give another model")
    return getattr(place, name)


def copy_part(source: Path, target: Path) -> None:
    """Copy a part of a pipeline. Weights of a variant get their plain names, twins in other precisions are left out,
    and its config says float32: what is loaded without further words fits a student in float32."""
    shutil.copytree(source, target, ignore=_left_out, dirs_exist_ok=True)
    copy_weights(source, target)
    if (target / CONFIG).is_file():
        tree = _in_float32(read_json(target / CONFIG))
        if "_class_name" not in tree:  # of transformers, which would take the type of the file
            tree["dtype"] = "float32"
        (target / CONFIG).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _in_float32(tree: Any) -> Any:
    """A config, and those inside it, with float32 wherever it names a type."""
    if not isinstance(tree, dict):
        return tree
    types = ("dtype", "torch_dtype")
    return {key: "float32" if key in types else _in_float32(value) for key, value in tree.items()}


def _left_out(folder: str, names: list[str]) -> list[str]:
    """What is not copied as it is: weights, among them those in formats that run code, and code."""
    code = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py", ".msgpack", ".h5", ".onnx")
    return [name for name in names if name.endswith(code) or is_weight_file(name)]


def fingerprint(folder: Path) -> str:
    """Hex digest over names, sizes and times of a folder's files: cheap, and another one after any change."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state = path.stat()
        digest.update(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def save_lora(denoiser: Denoiser, role: str, prefix: str, folder: Path) -> None:
    """Write the adapter ``role`` as ``pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights`` reads,
    and as ``adapter_model.safetensors`` with ``adapter_config.json``, which peft puts on the network alone."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    ranks, alphas, targets = set(), set(), []
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


def adapters_of(denoiser: Denoiser) -> list[str]:
    """Names of all adapters of a network, in the order in which they were made."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in denoiser.network.modules() if isinstance(module, LoraLayer)]
    return list(dict.fromkeys(role for layer in layers for role in layer.lora_A))


# --- schedulers -------------------------------------------------------------------------------------------------------
def few_step_scheduler(
    sampler: FewStepSampler,
    process: Process,
    prediction: str,
    trigflow: bool = False,
    consistency: bool = False,
    experts: bool = False,
) -> Any:
    """A diffusers scheduler that, asked for ``len(sampler.times)`` steps and nothing else, runs a pipeline as
    ``sampler`` would. Timesteps of several steps are whole numbers, at most one from those of training. trigflow: for
    pipelines that read a flow as TrigFlow. consistency: for those that step with an LCMScheduler alone. experts: for
    those that take any scheduler of flows, so that steps may crowd towards noise.

    Raises UserError for samplers that no scheduler reproduces, with what to change.
    """
    import diffusers

    n = len(sampler.times)
    t_init = sampler.times[0]
    even = tuple(t_init * (1 - k / n) for k in range(n))
    own = isinstance(process, VP) and not process.zero_snr and not consistency and t_init == 1.0
    if isinstance(sampler, TCDSampler) and not own:
        if n > 1 and sampler.eta not in (0.0, 1.0):
            raise UserError(
                f"no scheduler of diffusers takes a part of fresh noise (eta={sampler.eta:g}) on this process",
                cure="options.eta=0, or 1",
            )
        sampler = FewStepSampler(sampler.times, "fresh" if sampler.eta else "ddim")  # what it then is
    if trigflow and isinstance(process, RectifiedFlow):
        return _trigflow_scheduler(sampler)
    if experts and isinstance(process, RectifiedFlow) and sampler.renoise == "ddim" and (shift := shift_of(sampler)):
        return _shifted_scheduler(n, shift)
    if any(abs(a - b) > 1e-6 for a, b in zip(sampler.times, even, strict=True)):
        raise UserError(
            f"no scheduler of diffusers asks at the times {sampler.times}", cure="a single step, or evenly spaced ones"
        )
    if isinstance(sampler, TCDSampler):
        return _tcd_scheduler(process, prediction)
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
    ends_in_noise = process.zero_snr and t_init == 1.0
    if consistency and n > 1 and sampler.renoise == "ddim":
        raise UserError("LatentConsistencyModelPipeline takes fresh noise at each step", cure="options.renoise=fresh")
    if not consistency and ends_in_noise and (n == 1 or sampler.renoise == "ddim"):
        return diffusers.DDIMScheduler(**config, clip_sample=False)  # Euler's has no noise rate without signal
    config.pop("timestep_spacing", None)
    if n == 1 and not consistency:
        # One "karras" step lies at sigma_max; its noise is scaled as in training, its time need not be whole.
        sigma = float(process.sigma(top) / process.alpha(top))
        return diffusers.EulerDiscreteScheduler(
            **config, timestep_spacing="linspace", use_karras_sigmas=True, sigma_max=sigma, sigma_min=sigma / 2
        )
    if sampler.renoise == "ddim" and not consistency:
        return diffusers.EulerDiscreteScheduler(**_ending_at(config, process, top), timestep_spacing="trailing")
    if float(process.sigma(top)) < 0.99:
        raise UserError(
            f"diffusers' scheduler with fresh noise starts from pure noise, not at {t_init} of the process",
            cure="options.t_init=1.0" + ("" if consistency else ", or options.renoise=ddim, or one step"),
        )
    # With this scaling its boundary condition is the identity: c_skip = 0, c_out = 1.
    return diffusers.LCMScheduler(**_ending_at(config, process, top), original_inference_steps=n, timestep_scaling=1e8)


def _trigflow_scheduler(sampler: FewStepSampler) -> Any:
    """Of Sana-Sprint's pipeline, which begins with pure noise, and of more than two steps chooses the times itself."""
    import diffusers

    n = len(sampler.times)
    if sampler.times[0] != 1.0:
        raise UserError(
            f"Sana-Sprint's pipeline starts from pure noise, not at t = {sampler.times[0]}", cure="options.t_init=1.0"
        )
    if n > 1 and sampler.renoise != "fresh":
        raise UserError("Sana-Sprint's pipeline takes fresh noise at each step", cure="options.renoise=fresh")
    own = sprint_times(n)
    if n > 2 and any(abs(a - b) > 1e-4 for a, b in zip(sampler.times, own, strict=True)):
        raise UserError(
            f"Sana-Sprint's pipeline takes {n} steps at times of its own, {', '.join(f'{t:.4f}' for t in own)}",
            cure="take these, or one step, or two",
        )
    return diffusers.SCMScheduler()


def shift_of(sampler: FewStepSampler) -> float:
    """The shift S by which a sampler's times are ``S u / (1 + (S - 1) u)`` of even ones; 0 where they are even, or are
    not so."""
    times, n = sampler.times, len(sampler.times)
    if n < 2 or times[0] != 1.0:
        return 0.0
    shift = times[1] / (n - 1) / (1 - times[1])
    even = [1 - k / n for k in range(n)]
    fits = all(abs(t - shift * u / (1 + (shift - 1) * u)) < 1e-6 for t, u in zip(times, even, strict=True))
    return shift if fits and abs(shift - 1) > 1e-6 else 0.0


def _shifted_scheduler(n: int, shift: float) -> Any:
    """Wan's own class, of first order: its steps are Euler's, at most one of 1,000 from the times asked for."""
    import diffusers

    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1,
        disable_corrector=list(range(n)),
    )  # fmt: skip


def _tcd_scheduler(process: Process, prediction: str) -> Any:
    """It takes a step at every time of training, and is given eta at each call."""
    import diffusers

    config = {k: v for k, v in scheduler_config(process, prediction).items() if k not in ("_class_name", "clip_sample")}
    config |= {"steps_offset": 1, "clip_sample": False}
    return diffusers.TCDScheduler(**config, original_inference_steps=config["num_train_timesteps"])


def _ending_at(config: dict[str, Any], process: VP, top: Tensor) -> dict[str, Any]:
    """The config of the same process cut off after time ``top``."""
    steps = round(float(top)) + 1
    if steps == process.steps:
        return config
    times = torch.arange(steps, dtype=torch.float64)
    kept = process.alpha(times) ** 2
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    config = config | {"num_train_timesteps": steps, "trained_betas": betas.tolist()}
    return config | ({"rescale_betas_zero_snr": False} if process.zero_snr else {})
