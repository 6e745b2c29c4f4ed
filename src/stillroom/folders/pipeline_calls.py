"""What pipelines of diffusers do around their networks, family by family: conditions from prompts, latents from images,
the network's call, the guided output."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, asking_for, plain_guide
from stillroom.folders.diffusers_networks import diffusers_call

Size = tuple[int, int]
"""(height, width) in pixels."""
SECOND = "transformer_2"
"""The part that denoises where there is less noise, in pipelines of two experts."""
BOUNDARY = "boundary_ratio"
"""The setting of a pipeline that says from which share of the times on its first expert is asked."""


def network_name(pipeline: Any) -> str:
    """The part that denoises: ``unet`` or ``transformer``."""
    return "unet" if "unet" in pipeline.components else "transformer"


def network_of(pipeline: Any) -> Any:
    return getattr(pipeline, network_name(pipeline))


def networks_of(pipeline: Any) -> dict[str, Any]:
    """All parts that denoise, by name: of two experts that of more noise first."""
    names = (network_name(pipeline), SECOND)
    return {name: part for name in names if (part := pipeline.components.get(name)) is not None}


def network_patch(pipeline: Any) -> tuple[int, ...]:
    """Latent positions per token inside the network, (height, width)."""
    network = network_of(pipeline)
    patch = network.config.get("patch_size") or (network.config.get("all_patch_size") or (1,))[0]
    if network_name(pipeline) == "unet":
        patch = 2 ** (len(network.config["block_out_channels"]) - 1)
    if any(word in type(network).__name__ for word in ("Flux", "Qwen", "Chroma")):
        patch = 1  # packed outside the network
    return (patch, patch) if isinstance(patch, int) else tuple(patch[-2:])


def latent_channels(pipeline: Any) -> int:
    config = pipeline.vae.config
    return int(config.get("latent_channels") or config["z_dim"])


# --- latents ---------------------------------------------------------------------------------------------------------
def posterior_mean(vae: Any, images: Tensor) -> Tensor:
    """What an autoencoder of diffusers makes of images, in its own units."""
    encoded = vae.encode(images)
    for name in ("latent", "latents"):  # those that have no posterior: AutoencoderDC, AutoencoderTiny
        if hasattr(encoded, name):
            return getattr(encoded, name)
    return encoded.latent_dist.mode()


def scaled_latents(pipeline: Any, images: Tensor) -> Tensor:
    config = pipeline.vae.config
    return (posterior_mean(pipeline.vae, images) - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]


def scaled_pictures(pipeline: Any, latents: Tensor) -> Tensor:
    """The inverse of :func:`scaled_latents`, with a graph."""
    config = pipeline.vae.config
    return pipeline.vae.decode(latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)).sample


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the latents, shaped to ``like [B, C, ...]``."""
    shape = (1, -1, *(1,) * (like.ndim - 2))
    mean, std = (torch.tensor(vae.config[name]).to(like).reshape(shape) for name in ("latents_mean", "latents_std"))
    return mean, std


def sdxl_latents(pipeline: Any, images: Tensor) -> Tensor:
    """As SDXL and Kolors undo it before they decode: statistics, where the autoencoder has them, then the scale."""
    vae = pipeline.vae
    if vae.config.get("latents_mean") is None or vae.config.get("latents_std") is None:
        return scaled_latents(pipeline, images)
    latents = posterior_mean(vae, images)
    mean, std = _statistics(vae, latents)
    return (latents - mean) * vae.config["scaling_factor"] / std


def clip_latents(pipeline: Any, images: Tensor) -> Tensor:
    """Of autoencoders of video: clips ``[B, C, 1, h, w]`` of one frame."""
    latents = posterior_mean(pipeline.vae, images.unsqueeze(2))
    mean, std = _statistics(pipeline.vae, latents)
    return (latents - mean) / std


def frame_latents(pipeline: Any, images: Tensor) -> Tensor:
    return clip_latents(pipeline, images)[:, :, 0]


def call_default(pipeline: Any, name: str) -> Any:
    """The default of an argument of the pipeline's own call, so that prompts are encoded as a user's would be."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


# --- conditions -------------------------------------------------------------------------------------------------------
def reads_guidance(pipeline: Any) -> bool:
    """Whether a UNet has the guidance scale as an input (arXiv 2310.04378), so that its pipeline does not guide."""
    return pipeline.unet.config.get("time_cond_proj_dim") is not None


def _guidance_input(pipeline: Any, rows: int) -> dict[str, Tensor]:
    """The embedding of the pipeline's default guidance scale, for a UNet that has it as an input."""
    if not reads_guidance(pipeline):
        return {}
    scale = torch.full((rows,), float(call_default(pipeline, "guidance_scale")) - 1)
    width = pipeline.unet.config["time_cond_proj_dim"]
    return {"timestep_cond": pipeline.get_guidance_scale_embedding(scale, embedding_dim=width)}


def sd(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    states = pipeline.encode_prompt(prompts, pipeline.device, 1, False)[0]
    return {"encoder_hidden_states": states, **_guidance_input(pipeline, len(prompts))}


def sdxl(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    states, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    width = None if pipeline.text_encoder_2 is None else int(pipeline.text_encoder_2.config.projection_dim)
    ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=width)
    found = {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": ids.expand(len(prompts), -1)}
    return found | _guidance_input(pipeline, len(prompts))


def sd3(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def pixart(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, mask, *_ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length, clean_caption=False
    )
    found = {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}
    if pipeline.transformer.config.get("use_additional_conditions") or pipeline.transformer.config.sample_size == 128:
        rows = len(prompts)
        found["resolution"] = torch.tensor([[float(size[0]), float(size[1])]]).expand(rows, -1)
        found["aspect_ratio"] = torch.tensor([[size[0] / size[1]]]).expand(rows, -1)
    return found


def sana(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    asked = {name: call_default(pipeline, name) for name in ("max_sequence_length", "complex_human_instruction")}
    states, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **asked)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}


def sana_null(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}


def sana_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return diffusers_call(network, x, time * float(network.config.timestep_scale), cond)  # type: ignore[union-attr,arg-type]


def sprint(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    asked = {name: call_default(pipeline, name) for name in ("max_sequence_length", "complex_human_instruction")}
    states, mask = pipeline.encode_prompt(prompts, **asked)
    scale = call_default(pipeline, "guidance_scale") * pipeline.transformer.config.guidance_embeds_scale
    guidance = torch.full((len(prompts),), float(scale))
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool(), "guidance": guidance}


def sprint_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """A flow's velocity at ``s``; the pipeline reads it as TrigFlow's at ``tan t = s / (1 - s)`` (arXiv 2503.09641). A
    ``guidance_scale`` among the conditions takes the place of the pipeline's own; without either it is 0."""
    cond = dict(cond)
    scale = cond.pop("guidance_scale", None)
    if scale is not None:
        cond["guidance"] = scale * network.config.guidance_embeds_scale  # type: ignore[union-attr,operator]
    elif "guidance" not in cond:
        cond["guidance"] = x.new_zeros(len(x))
    return diffusers_call(network, x, time / 1000, cond)


def sprint_arguments(pipeline: Any, shift: float, times: tuple[float, ...]) -> dict[str, Any]:
    """Of one step, or two; with more the pipeline's times are its own (:func:`sprint_times`)."""
    if len(times) != 2:
        return {"intermediate_timesteps": None}
    return {"intermediate_timesteps": math.atan2(times[1], 1 - times[1])}


def sprint_times(n: int) -> tuple[float, ...]:
    """At which a flow is asked by ``n`` of the pipeline's steps, where they are not chosen: even in TrigFlow's time."""
    angles = [math.pi / 2 * (1 - k / n) for k in range(n)]
    return (1.0, *(math.tan(angle) / (1 + math.tan(angle)) for angle in angles[1:]))


def flux(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, pooled, _ = pipeline.encode_prompt(prompts, prompts, max_sequence_length=length)
    found = {"encoder_hidden_states": states, "pooled_projections": pooled}
    if pipeline.transformer.config.guidance_embeds:
        found["guidance"] = torch.full((len(prompts),), float(call_default(pipeline, "guidance_scale")))
    return found


def pack(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` to tokens of 2x2 positions, ``[B, h/2 w/2, 4 C]``, as Flux and Qwen-Image read them."""
    rows, channels, height, width = x.shape
    x = x.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(rows, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack` for latents of ``height`` x ``width`` positions."""
    x = tokens.reshape(tokens.shape[0], height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(tokens.shape[0], -1, height, width)  # len() would fix the batch of an exported network


def flux_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    height, width = x.shape[-2:]
    places = torch.zeros(height // 2, width // 2, 3, device=x.device)
    places[..., 1] = torch.arange(height // 2, device=x.device)[:, None]
    places[..., 2] = torch.arange(width // 2, device=x.device)[None, :]
    words = torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device)
    answer = network(
        pack(x), timestep=time / 1000, img_ids=places.reshape(-1, 3), txt_ids=words, return_dict=False, **cond
    )
    return unpack(answer[0], height, width)


def qwen(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()  # None: all are words
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}


def qwen_blank(pipeline: Any) -> dict[str, Tensor]:
    length, width = call_default(pipeline, "max_sequence_length"), pipeline.transformer.config["joint_attention_dim"]
    mask = torch.ones(1, length, dtype=torch.bool)
    return {"encoder_hidden_states": torch.zeros(1, length, width), "encoder_hidden_states_mask": mask}


def qwen_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    height, width = x.shape[-2:]
    shapes = [[(1, height // 2, width // 2)]]  # the first row's stands for the batch
    answer = network(pack(x), timestep=time / 1000, img_shapes=shapes, return_dict=False, **cond)
    return unpack(answer[0], height, width)


def qwen_guide(conditional: Tensor, unconditional: Tensor, w: float) -> Tensor:
    """Each guided token, of 2x2 positions, has the length of the conditional one."""
    plain, guided = pack(conditional), pack(plain_guide(conditional, unconditional, w))
    lengths = [x.norm(dim=-1, keepdim=True) for x in (plain, guided)]
    scaled = guided * (lengths[0] / lengths[1].clamp_min(torch.finfo(guided.dtype).tiny))
    return unpack(scaled, *conditional.shape[-2:])


def z_image(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    rows, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
    mask = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, : len(row)] = True
    return {"encoder_hidden_states": nn.utils.rnn.pad_sequence(rows, batch_first=True), "encoder_attention_mask": mask}


def z_image_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Fed ``1 - t``; answers the negative velocity."""
    words = [row[mask] for row, mask in zip(cond["encoder_hidden_states"], cond["encoder_attention_mask"], strict=True)]
    answer = network(list(x.unsqueeze(2).unbind(0)), (1000 - time) / 1000, words, return_dict=False)[0]
    return -torch.stack(list(answer)).squeeze(2)


def wan(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states}


def tokens_of(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` to a token for each position, ``[B, h w, C]``."""
    return x.flatten(2).transpose(1, 2)


def _places(height: int, width: int, axes: int, like: Tensor) -> Tensor:
    """Numbers of the tokens of a picture, ``[height width, axes]``: row and column stand on axes 1 and 2."""
    places = torch.zeros(height, width, axes, device=like.device)
    places[..., 1] = torch.arange(height, device=like.device)[:, None]
    places[..., 2] = torch.arange(width, device=like.device)[None, :]
    return places.reshape(height * width, axes)


def flux2(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    asked = {name: call_default(pipeline, name) for name in ("max_sequence_length", "text_encoder_out_layers")}
    found = {"encoder_hidden_states": pipeline.encode_prompt(prompts, **asked)[0]}
    if pipeline.transformer.config.guidance_embeds:
        found["guidance"] = torch.full((len(prompts),), float(call_default(pipeline, "guidance_scale")))
    return found


def flux2_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Latents lie folded, 2x2 positions in the channels of one."""
    rows, _, height, width = x.shape
    words = torch.zeros(cond["encoder_hidden_states"].shape[1], 4, device=x.device)
    words[:, 3] = torch.arange(len(words), device=x.device)
    given = {"guidance": None, **cond}
    answer = network(
        tokens_of(x), timestep=time / 1000, img_ids=_places(height, width, 4, x).expand(rows, -1, -1),
        txt_ids=words.expand(rows, -1, -1), return_dict=False, **given,
    )[0]  # fmt: skip
    return answer.transpose(1, 2).reshape(x.shape)


def flux2_latents(pipeline: Any, images: Tensor) -> Tensor:
    vae = pipeline.vae
    latents = pipeline._patchify_latents(posterior_mean(vae, images))
    mean, variance = (value.reshape(1, -1, 1, 1).to(latents) for value in (vae.bn.running_mean, vae.bn.running_var))
    return (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()


def flux2_shift(pipeline: Any, tokens: int) -> float:
    """Of the default number of steps, as Flux 2's pipelines fit it to resolution and steps."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(tokens, int(call_default(pipeline, "num_inference_steps")))


def chroma(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, _, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states, "attention_mask": mask.float()}


def chroma_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    height, width = x.shape[-2:]
    tokens, states = pack(x), cond["encoder_hidden_states"]
    answer = network(
        tokens, timestep=time / 1000, img_ids=_places(height // 2, width // 2, 3, x),
        txt_ids=torch.zeros(states.shape[1], 3, device=x.device), encoder_hidden_states=states,
        attention_mask=torch.cat([cond["attention_mask"], tokens.new_ones(tokens.shape[:2])], 1), return_dict=False,
    )[0]  # fmt: skip
    return unpack(answer, height, width)


def lumina2(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}


def lumina2_null(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    """The pipeline gives the other branch no system prompt."""
    length = call_default(pipeline, "max_sequence_length")
    states, mask = pipeline._get_gemma_prompt_embeds(prompts, max_sequence_length=length)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}


def lumina2_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Fed ``1 - t``; answers the negative velocity."""
    return -diffusers_call(network, x, (1000 - time) / 1000, cond)


def lumina2_guide(conditional: Tensor, unconditional: Tensor, w: float) -> Tensor:
    """Each guided row of latents has the length of the conditional one (``cfg_normalization``, on by default)."""
    guided = plain_guide(conditional, unconditional, w)
    lengths = [x.norm(dim=-1, keepdim=True) for x in (conditional, guided)]
    return guided * (lengths[0] / lengths[1].clamp_min(torch.finfo(guided.dtype).tiny))


def hunyuan(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    states, mask, letters, letters_mask = pipeline.encode_prompt(prompts, batch_size=len(prompts))
    found = {
        "encoder_hidden_states": states, "encoder_attention_mask": mask.bool(),
        "encoder_hidden_states_2": letters, "encoder_attention_mask_2": letters_mask.bool(),
    }  # fmt: skip
    if pipeline.transformer.config.guidance_embeds:
        scale = 1000.0 * float(call_default(pipeline, "distilled_guidance_scale"))
        found["guidance"] = torch.full((len(prompts),), scale)
    return found


def hunyuan_parts(guidance: float) -> dict[str, Any]:
    """HunyuanImage keeps its guidance in parts of its own."""
    from diffusers.guiders import ClassifierFreeGuidance

    guider = ClassifierFreeGuidance(guidance_scale=guidance) if guidance != 1.0 else None
    return {"guider": guider, "ocr_guider": None}


def aura(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states}


def unit_time_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Fed times from 0 to 1."""
    return diffusers_call(network, x, time / 1000, cond)


def cogview4(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    """Each prompt by itself: what pads a shorter one beside a longer one is not masked. ``shift``: what the pipeline
    moves its noise by, but not the times that it tells the network."""
    length, rows = call_default(pipeline, "max_sequence_length"), len(prompts)
    states = [
        pipeline.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=length)[0][0]
        for prompt in prompts
    ]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in states], batch_first=True)
    config = pipeline.scheduler.config
    shift = float(config.get("shift") or 1.0)
    if config.get("use_dynamic_shifting"):
        patch = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
        shift = cogview4_shift(pipeline, size[0] // patch * (size[1] // patch))
        shift = shift if config.get("time_shift_type") == "linear" else math.exp(shift)
    whole = torch.tensor([[float(size[0]), float(size[1])]]).expand(rows, -1)
    return {
        "encoder_hidden_states": nn.utils.rnn.pad_sequence(states, batch_first=True), "encoder_attention_mask": mask,
        "original_size": whole, "target_size": whole, "crop_coords": torch.zeros(rows, 2),
        "shift": torch.full((rows,), shift),
    }  # fmt: skip


def cogview4_blank(pipeline: Any) -> dict[str, Tensor]:
    length, width = call_default(pipeline, "max_sequence_length"), int(pipeline.transformer.config["text_embed_dim"])
    pairs = {name: torch.zeros(1, 2) for name in ("original_size", "target_size", "crop_coords")}
    return {
        "encoder_hidden_states": torch.zeros(1, length, width),
        "encoder_attention_mask": torch.ones(1, length, dtype=torch.bool), **pairs, "shift": torch.ones(1),
    }  # fmt: skip


def cogview4_shift(pipeline: Any, tokens: int) -> float:
    config = pipeline.scheduler.config
    ratio = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return ratio * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)


def by_length(
    x: Tensor, time: Tensor, cond: Cond, mask: str, ask: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
) -> Tensor:
    """``ask`` for the rows of each length of text by themselves, without padding: of networks to which what pads a
    shorter text beside a longer one is text too, or moves the numbers of the tokens after it. mask: the condition that
    says which words are there; ``encoder_hidden_states`` are cut to them."""
    lengths, answer = cond[mask].sum(1).tolist(), torch.zeros_like(x)
    for length in sorted(set(lengths)):
        rows = torch.tensor([i for i, own in enumerate(lengths) if own == length], device=x.device)
        part = {key: value[rows] for key, value in cond.items() if key != mask}
        part["encoder_hidden_states"] = part["encoder_hidden_states"][:, :length]
        with asking_for(rows):
            answer = answer.index_copy(0, rows, ask(x[rows], time[rows], part).to(answer))
    return answer


def cogview4_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    def ask(x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        shift, t = cond.pop("shift"), time / 1000
        return diffusers_call(network, x, 1000 * t / (shift + (1 - shift) * t), cond)

    return by_length(x, time, cond, "encoder_attention_mask", ask)


def cogview4_arguments(pipeline: Any, shift: float, times: tuple[float, ...]) -> dict[str, Any]:
    """Noise at ``times`` and what the network is told then; the pipeline rounds the latter to whole numbers."""
    if len(times) == 1:
        return {}
    told = [round(1000 * t / (shift + (1 - shift) * t)) for t in times]
    return {"timesteps": told, "sigmas": list(times)}


def krea2(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}


def krea2_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    height, width = x.shape[-2:]
    words = torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device)
    places = torch.cat([words, _places(height // 2, width // 2, 3, x)])
    answer = network(pack(x), timestep=time / 1000, position_ids=places, return_dict=False, **cond)
    return unpack(answer[0], height, width)


def krea2_shift(pipeline: Any, tokens: int) -> float:
    return 1.15 if pipeline.config.get("is_distilled") else resolution_shift(pipeline, tokens)


def resolution_shift(pipeline: Any, tokens: int) -> float:
    """Linear in the number of tokens, between the two resolutions that the scheduler's config names."""
    config = pipeline.scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return first + (last - first) * (tokens - low) / (high - low)


def lumina2_shift(pipeline: Any, tokens: int) -> float:
    """The pipeline takes the number of channels for that of tokens."""
    return resolution_shift(pipeline, int(pipeline.transformer.config.in_channels))


def qwen21(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    states, mask, _ = pipeline.encode_prompt(prompts)
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()  # None: all are words
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}


def qwen21_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    height, width = x.shape[-2:]

    def ask(x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        marks = torch.zeros(len(x), cond["encoder_hidden_states"].shape[1], dtype=torch.bool, device=x.device)
        answer = network(
            tokens_of(x), timestep=time / 1000, img_shapes=[[(1, height, width)]] * len(x),
            img_mask=torch.cat([marks, marks.new_ones(len(x), height * width // 4)], 1), return_dict=False, **cond,
        )[0]  # fmt: skip
        return answer[:, -height * width :].transpose(1, 2).reshape(x.shape)  # before them stand those of the words

    return by_length(x, time, cond, "encoder_hidden_states_mask", ask)


def qwen21_latents(pipeline: Any, images: Tensor) -> Tensor:
    """The autoencoder's pictures have a fourth channel: opaque."""
    channels = int(pipeline.vae.config["in_channels"])
    if channels > images.shape[1]:
        images = torch.cat([images, images.new_ones(len(images), channels - images.shape[1], *images.shape[2:])], 1)
    return frame_latents(pipeline, images)


def kolors(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    width = int(pipeline.text_encoder.config.hidden_size)
    ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=width)
    found = {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": ids.expand(len(prompts), -1)}
    return found | _guidance_input(pipeline, len(prompts))
