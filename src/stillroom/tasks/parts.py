"""What rooms share that say which parts of a model are exported: modules of tensors only, random inputs for them, and
what a file's answers are worth on labelled data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.diffusion.process import EDM
from stillroom.diffusion.routed import RoutedDenoiser
from stillroom.diffusion.sampling import FewStepSampler, ODESampler, Sampler
from stillroom.errors import UserError
from stillroom.folders.denoisers import EXPERTS
from stillroom.losses.soft_labels import mix_heads
from stillroom.networks.recognition import TwoHeadPass, class_logits
from stillroom.surgery.lora import LoraDenoiser
from stillroom.task import FileJudge, Part, Runner

Example = Callable[[int, torch.Generator], tuple[Tensor, ...]]
ROWS, BATCH = 5000, 250
"""Test rows for scores, and how many of them are asked about at once."""


def only_drawings_are_whole(whole: bool) -> None:
    """Raises UserError where the ``whole`` of a model is asked for that draws nothing."""
    if whole:
        raise UserError("only image generators have a whole to export", cure="leave --whole out")


def with_parts(module: nn.Module, *names: str) -> Any:
    """A copy of ``module`` that shares its parts and parameters of these names and holds no others, so that a file does
    not hold what it does not use."""
    found = copy.copy(module)
    found._modules = {name: part for name, part in module._modules.items() if name in names}
    found._parameters = {name: value for name, value in module._parameters.items() if name in names}
    return found


# --- modules ----------------------------------------------------------------------------------------------------------
class NetworkCall(nn.Module):
    """One network evaluation of a denoiser, in the network's own output space: ``(sample [B, ...], timestep [B] as the
    network is fed it, conditions ...)`` to ``[B, ...]``. No guidance and no preconditioning."""

    def __init__(self, denoiser: Denoiser, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.call, self.names = denoiser.network, denoiser.call, names

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        return self.call(self.network, sample, timestep, dict(zip(self.names, conditions, strict=True))).float()


class Decode(nn.Module):
    """A frozen autoencoder's decoder: latents ``[B, C, h, w]`` to images ``[B, 3, H, W]`` in [-1, 1]."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self.network = with_parts(codec.network, "decoder", "post_quant_conv")
        self.scale, self.shift = codec.scale, codec.shift

    def forward(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents / self.scale + self.shift).sample.clamp(-1, 1)


class OneStep(nn.Module):
    """A whole one-step generator: ``(noise [B, ...], conditions ...)`` to samples. step: of :func:`sampling_steps`.
    decode: latents to images."""

    def __init__(self, call: NetworkCall, step: Mapping[str, float], decode: Decode | None = None) -> None:
        super().__init__()
        self.network, self.step, self.decode = call, dict(step), decode

    def forward(self, noise: Tensor, *conditions: Tensor) -> Tensor:
        s = self.step
        x = s["sigma"] * noise
        value = self.network(s["scale"] * x, x.new_full((x.shape[0],), s["timestep"]), *conditions)
        x0 = s["x0_of_sample"] * x + s["x0_of_output"] * value
        return x0 if self.decode is None else self.decode(x0)


class Logits(nn.Module):
    """A classifier: inputs to class logits ``[B, classes]``; of two heads, the logarithm of their mixture."""

    def __init__(self, network: nn.Module, sampler: Sampler, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network, self.sampler, self.names = network, sampler, names

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True)) if self.names else inputs[0]
        logits = class_logits(self.network, given).float()
        if not isinstance(self.sampler, TwoHeadPass):
            return logits
        label, taught = logits.chunk(2, -1)
        mixed = mix_heads(label, taught, self.sampler.alpha, self.sampler.temperature)
        return mixed.clamp_min(torch.finfo(torch.float32).tiny).log()


# --- denoisers --------------------------------------------------------------------------------------------------------
def exported_denoiser(denoiser: Denoiser, folders: bool = True) -> Denoiser:
    """The denoiser in eval mode, a LoRA merged. folders: whether each of several experts has a model's folder of its
    own, which a pipeline's have not. Raises UserError for several experts."""
    if isinstance(denoiser, RoutedDenoiser):
        cure = f"export each expert's folder: {', '.join(f'{EXPERTS}/{name}' for name in denoiser.experts)}"
        raise UserError(
            f"a generator of {len(denoiser.experts)} experts is no single file",
            cure=cure if folders else "run its folder with diffusers' own pipeline",
        )
    return (denoiser.merged() if isinstance(denoiser, LoraDenoiser) else denoiser).eval()


def denoiser_parts(
    denoiser: Denoiser,
    sampler: Sampler,
    names: tuple[str, ...],
    conditions: Example,
    whole: bool = False,
    codec: Any = None,
) -> dict[str, Part]:
    """``model``, the network's call; and ``generator``, where the ``whole`` of a one-step generator is asked for.

    names: of the conditions; conditions: examples of them. codec: of a generator of latents. Raises UserError for the
    whole of what takes more than one evaluation.
    """
    shape, call = denoiser.shape, NetworkCall(denoiser, names)
    times = [denoiser.process.network_time(torch.tensor(u * denoiser.process.t_max)).item() for u in (0.05, 0.95)]

    def example(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        share = torch.rand(batch, generator=generator)
        time = times[0] + (times[1] - times[0]) * share
        return torch.randn(batch, *shape, generator=generator), time, *conditions(batch, generator)

    def noise(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randn(batch, *shape, generator=generator), *conditions(batch, generator)

    def drawn(noise: Tensor, *given: Tensor) -> Tensor:
        made = sampler.sample(denoiser, noise, dict(zip(names, given, strict=True)))
        return made if codec is None else codec.decode(made)

    parts = {"model": Part(call, ("sample", "timestep", *names), ("output",), example)}
    if whole:
        steps = sampling_steps(sampler, denoiser)
        if len(steps) != 1 or getattr(sampler, "guidance", 1.0) != 1.0:
            raise UserError(
                f"the model's sampler {sampler.name!r} takes {sampler.nfe} network evaluations; only a one-step "
                "student without guidance can be exported whole",
                cure="leave --whole out, and repeat the exported network's call",
            )
        step = OneStep(call, steps[0], None if codec is None else Decode(codec))
        parts["generator"] = Part(step, ("noise", *names), ("images",), noise, reference=drawn)
    return parts


def denoiser_facts(denoiser: Denoiser, sampler: Sampler) -> dict[str, Any]:
    """How an exported network is asked, and how its answer becomes an image."""
    return {
        "process": denoiser.process.to_dict(), "prediction": denoiser.prediction, "sampler": sampler.to_dict(),
        "null": {key: value for key, value in denoiser.null.items() if not isinstance(value, Tensor)},
        "steps": sampling_steps(sampler, denoiser),
    }  # fmt: skip


def sampling_steps(sampler: Sampler, denoiser: Denoiser) -> list[dict[str, float]]:
    """How a few-step sampler asks the exported network, step by step; empty for samplers that are solvers.

    In each: ``x = alpha x0 + sigma noise`` (``sigma noise`` in the first step), ``output = network(scale x, timestep,
    ...)``, ``x0 = x0_of_sample x + x0_of_output output``.
    """
    if isinstance(sampler, ODESampler) and sampler.steps == 1:
        times: tuple[float, ...] = (1.0,)
    elif isinstance(sampler, FewStepSampler):
        times = sampler.times
    else:
        return []
    process, found = denoiser.process, []
    for share in times:
        t = torch.tensor(share * process.t_max, dtype=torch.float64)
        one, zero, scale = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 1.0
        if denoiser.prediction == "edm":
            assert isinstance(process, EDM)
            of_sample, of_output, scale = (float(c) for c in process.preconditioning(t))
        else:  # every prediction is linear in the sample and in the network's output
            of_sample = float(Prediction(process, denoiser.prediction, zero, one, t).x0)
            of_output = float(Prediction(process, denoiser.prediction, one, zero, t).x0)
        rates = {"alpha": float(process.alpha(t)), "sigma": float(process.sigma(t))}
        rates |= {"timestep": float(process.network_time(t)), "scale": scale}
        found.append(rates | {"x0_of_sample": of_sample, "x0_of_output": of_output})
    return found


# --- examples ---------------------------------------------------------------------------------------------------------
def pixels(shape: tuple[int, ...]) -> Example:
    """Random images ``[B, *shape]`` in [-1, 1]."""
    return lambda batch, generator: (torch.rand(batch, *shape, generator=generator) * 2 - 1,)


def text_features(given: Mapping[str, Tensor]) -> Example:
    """Random text features and masks of random lengths, of the shapes of one row's; other conditions as they are."""

    def example(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        found = []
        for name, row in given.items():
            shape = (batch, *row.shape[1:])
            if name.endswith("mask"):
                lengths = torch.randint(1, row.shape[1] + 1, (batch, 1), generator=generator)
                found.append((torch.arange(row.shape[1]) < lengths).to(row.dtype))
            elif name in ("encoder_hidden_states", "pooled_projections", "text_embeds"):
                found.append(torch.randn(shape, generator=generator))
            else:
                found.append(row[:1].cpu().expand(shape).contiguous())
        return tuple(found)

    return example


def token_ids(tokenizer: Any, length: int) -> Example:
    """Random texts: ids and masks ``[B, length]``, padded at the end."""
    words, pad = len(tokenizer), int(tokenizer.pad_token_id or 0)

    def example(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        ids = torch.randint(words, (batch, length), generator=generator)
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        mask = torch.arange(length) < lengths
        return torch.where(mask, ids, pad), mask.long()

    return example


# --- scores of a file -------------------------------------------------------------------------------------------------
def answers(runner: Runner, inputs: tuple[Tensor, ...], output: int = 0) -> Tensor:
    """One of the outputs for all rows of the inputs."""
    return torch.cat([runner(*part)[output] for part in zip(*(x.split(BATCH) for x in inputs), strict=True)])


def share_right(found: Tensor, labels: Tensor) -> float:
    return float((found == labels).float().mean())


def accuracy_of(inputs: tuple[Tensor, ...], labels: Tensor) -> FileJudge:
    """A classifier's file to its accuracy on labelled inputs."""
    return lambda runner: {"accuracy": share_right(answers(runner, inputs).argmax(-1), labels), "n": len(labels)}
