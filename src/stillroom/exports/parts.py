"""What of a model is exported: a module of tensors only, its inputs by name, and examples of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.diffusion.process import EDM
from stillroom.diffusion.sampling import FewStepSampler, ODESampler, Sampler
from stillroom.errors import UserError
from stillroom.folders.image_networks import config_of
from stillroom.losses.soft_labels import mix_heads
from stillroom.networks.mae import encode
from stillroom.networks.recognition import TwoHeadPass, class_logits
from stillroom.networks.vit import encoder_of
from stillroom.surgery.lora import LoraDenoiser
from stillroom.tasks.class_images.model import ImageGenerator
from stillroom.tasks.classify.model import ImageClassifier
from stillroom.tasks.classify_text.model import TextClassifier
from stillroom.tasks.encode.model import ImageEncoder
from stillroom.tasks.pipelines.model import PipelineGenerator
from stillroom.tasks.text_images.model import TextImageGenerator

Example = Callable[[int, torch.Generator], tuple[Tensor, ...]]
TOKENS = 12
"""Length of the random texts that text classifiers are exported and timed with."""


@dataclass
class Part:
    """One file to write. module: called with tensors by position. inputs, outputs: their names, in order. example:
    ``(batch, generator)`` to random inputs. axes: input -> {axis: name} of axes of any length besides the first.
    reference: what the file must answer as, where that is not ``module`` itself."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Example
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None

    @property
    def kind(self) -> str:
        """Class of the network inside."""
        network = self.module
        while isinstance(inner := getattr(network, "network", None), nn.Module):
            network = inner
        return type(network).__name__

    @torch.no_grad()
    def eager(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the model itself answers."""
        output = (self.reference or self.module)(*inputs)
        return (output,) if isinstance(output, Tensor) else tuple(output)


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
        self.network, self.scale, self.shift = codec.network, codec.scale, codec.shift

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


class Features(nn.Module):
    """An image encoder: images ``[B, C, H, W]`` in [-1, 1] to patch tokens ``[B, patches, D]`` and their mean."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = encoder_of(network)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = encode(self.network, images)[:, 1:].float()
        return tokens, tokens.mean(1)


# --- which parts a model has ------------------------------------------------------------------------------------------
def parts_of(model: Any, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
    """File stem -> part: ``model``, and ``generator`` where the ``whole`` of a one-step generator is asked for.

    size: (height, width) of images, for classifiers whose config does not say. Raises UserError for models and wishes
    that cannot be exported.
    """
    if isinstance(model, ImageGenerator | TextImageGenerator | PipelineGenerator):
        return _generator(model, whole)
    if whole:
        raise UserError("only image generators have a whole to export", cure="leave --whole out")
    if isinstance(model, ImageClassifier):
        return {"model": _classifier(model, size)}
    if isinstance(model, ImageEncoder):
        config: Any = encoder_of(model.network).config
        shape = (config.num_channels, config.image_size, config.image_size)
        return {"model": Part(Features(model.network), ("images",), ("tokens", "features"), _pixels(shape))}
    if isinstance(model, TextClassifier):
        names = ("input_ids", "attention_mask")
        axes = {name: {1: "length"} for name in names}
        example = token_ids(model.tokenizer, min(TOKENS, model.length))
        return {"model": Part(Logits(model.network, model.sampler, names), names, ("logits",), example, axes)}
    raise UserError(f"a {type(model).__name__} cannot be exported", cure="give a student of stillroom, or its folder")


def denoiser_of(model: Any) -> Denoiser:
    """The denoiser of an image generator that is no masked one, a LoRA merged."""
    found = model.network if isinstance(model, TextImageGenerator) else model.denoiser
    assert isinstance(found, Denoiser)
    return found.merged() if isinstance(found, LoraDenoiser) else found


def _generator(model: Any, whole: bool) -> dict[str, Part]:
    denoiser = denoiser_of(model).eval()
    if isinstance(model, ImageGenerator):
        names = tuple(denoiser.null) or (("label",) if model.classes else ())
        conditions = _labels(model, names)
    elif isinstance(model, TextImageGenerator):
        names = tuple(denoiser.null)
        conditions = _words(model.cond([""]))
    else:
        given = model.conditions(["a red cat on a chair"])[0]
        names, conditions = tuple(given), _words(given)
    shape, call = denoiser.shape, NetworkCall(denoiser, names)
    times = [denoiser.process.network_time(torch.tensor(u * denoiser.process.t_max)).item() for u in (0.05, 0.95)]

    def example(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        share = torch.rand(batch, generator=generator)
        time = times[0] + (times[1] - times[0]) * share
        return torch.randn(batch, *shape, generator=generator), time, *conditions(batch, generator)

    def noise(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randn(batch, *shape, generator=generator), *conditions(batch, generator)

    parts = {"model": Part(call, ("sample", "timestep", *names), ("output",), example)}
    if whole:
        steps = sampling_steps(model.sampler, denoiser)
        if isinstance(model, PipelineGenerator):
            raise UserError("a diffusers pipeline stays whole as its folder", cure="leave --whole out")
        if len(steps) != 1 or getattr(model.sampler, "guidance", 1.0) != 1.0:
            raise UserError(
                f"the model's sampler {model.sampler.name!r} takes {model.sampler.nfe} network evaluations; only a "
                "one-step student without guidance can be exported whole",
                cure="leave --whole out, and repeat the exported network's call",
            )
        codec = model.space.codec if isinstance(model, TextImageGenerator) else None

        def drawn(noise: Tensor, *given: Tensor) -> Tensor:
            made = model.sampler.sample(denoiser, noise, dict(zip(names, given, strict=True)))
            return made if codec is None else codec.decode(made)

        step = OneStep(call, steps[0], None if codec is None else Decode(codec))
        parts["generator"] = Part(step, ("noise", *names), ("images",), noise, reference=drawn)
    return parts


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


def _classifier(model: ImageClassifier, size: tuple[int, int] | None) -> Part:
    config = config_of(model.network)
    own = getattr(config, "image_size", None)
    if own is not None:
        size = (own, own) if isinstance(own, int) else tuple(own)
    if size is None:
        raise UserError(
            "the classifier's config does not say how large its images are", cure="give --data, for example fashion"
        )
    shape = (config.num_channels, *size)
    return Part(Logits(model.network, model.sampler), ("images",), ("logits",), _pixels(shape))


# --- examples ---------------------------------------------------------------------------------------------------------
def _pixels(shape: tuple[int, ...]) -> Example:
    return lambda batch, generator: (torch.rand(batch, *shape, generator=generator) * 2 - 1,)


def _labels(model: ImageGenerator, names: tuple[str, ...]) -> Example:
    unknown = [name for name in names if name != "label"]
    if unknown:
        raise UserError(f"the network reads the condition {unknown[0]!r}", cure="export a model of classes or captions")
    classes = len(model.classes) or int(model.denoiser.null.get("label", 0)) or 1
    return lambda batch, generator: tuple(torch.randint(classes, (batch,), generator=generator) for _ in names)


def _words(given: Mapping[str, Tensor]) -> Example:
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
