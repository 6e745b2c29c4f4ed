"""How each family of diffusers' text-to-image pipelines is asked: its conditions, its latents, its network's call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Guide, NetworkCall, plain_guide
from stillroom.diffusion.process import Process, RectifiedFlow
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import diffusers_call, process_from_scheduler

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    title: what people call it. pipelines: diffusers' class names. encode: ``(pipeline, prompts, size)`` to the
    conditions ``[B, ...]`` that ``call`` passes to the network. guide: as its pipeline guides by default. null: the
    prompt of the unconditional branch; encode_null: how that one is encoded, where it is another way than ``encode``.
    zero_null: under which config entry of the pipeline the unconditional text is zeros instead (SDXL). patch: latent
    positions per token along each side, where latents are packed outside the network (packed). arguments: of the
    pipeline's own call, for a picture without guidance. guided: the name of the guidance scale among them; offset:
    what it lacks of ours, where 1 is none. size: of a picture, where the network's config does not say. frames:
    latents are clips ``[C, 1, h, w]`` of one frame. encode_image: ``(pipeline, images)`` to latents in the units that
    its network sees; by default the autoencoder's shift and scale. checks: ``(what is unsupported, test of the
    pipeline)``. blank: zeros for the longest text, where the length of what ``encode`` makes depends on the text.
    """

    title: str
    pipelines: tuple[str, ...]
    encode: Callable[[Any, list[str], Size], dict[str, Tensor]]
    call: NetworkCall = diffusers_call
    guide: Guide = plain_guide
    null: str = ""
    encode_null: Callable[[Any, list[str], Size], dict[str, Tensor]] | None = None
    zero_null: str = ""
    patch: int = 1
    packed: bool = False
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    guided: str = "guidance_scale"
    offset: float = 0.0
    size: Size | None = None
    frames: bool = False
    encode_image: Callable[[Any, Tensor], Tensor] | None = None
    checks: tuple[tuple[str, Callable[[Any], bool]], ...] = ()
    blank: Callable[[Any], dict[str, Tensor]] | None = None

    # --- shapes ---------------------------------------------------------------------------------------------------
    def factor(self, pipeline: Any) -> int:
        """Pixels per latent position."""
        return int(getattr(pipeline, "vae_scale_factor_spatial", 0) or pipeline.vae_scale_factor)

    def own_size(self, pipeline: Any) -> Size:
        """The picture that the pipeline makes when nothing is said."""
        side = network_of(pipeline).config.get("sample_size")
        if side is None:
            if self.size is None:
                raise UserError(f"the {self.title} network's config has no sample_size", cure="give DIR@SIZE")
            return self.size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.factor(pipeline), width * self.factor(pipeline)

    def shape(self, pipeline: Any, size: Size) -> tuple[int, ...]:
        """Of a picture's latents: ``(C, h, w)``, or ``(C, 1, h, w)`` of a clip."""
        factor, channels = self.factor(pipeline), latent_channels(pipeline)
        steps = (*network_patch(pipeline), self.patch)
        cells = factor * math.lcm(*steps)
        if size[0] % cells or size[1] % cells or min(size) < cells:
            raise UserError(
                f"{self.title} cannot draw {size[0]}x{size[1]} pixels", cure=f"choose multiples of {cells} pixels"
            )
        height, width = size[0] // factor, size[1] // factor
        return (channels, 1, height, width) if self.frames else (channels, height, width)

    def process(self, pipeline: Any, size: Size) -> tuple[Process, str]:
        """What the pipeline's scheduler corrupts, and the prediction kind. A shift that depends on the resolution is
        taken at ``size``."""
        config = dict(pipeline.scheduler.config)
        config["_class_name"] = type(pipeline.scheduler).__name__
        process, kind = process_from_scheduler(config)
        if isinstance(process, RectifiedFlow) and config.get("use_dynamic_shifting"):
            if config.get("time_shift_type", "exponential") != "exponential":
                raise UserError(
                    f"scheduler {config['_class_name']} has time_shift_type {config['time_shift_type']!r}",
                    cure="supported here: exponential",
                )
            shape = self.shape(pipeline, size)
            tokens = shape[-2] * shape[-1] // math.prod(network_patch(pipeline)) // self.patch**2
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            process = RectifiedFlow(shift=math.exp(first + (last - first) * (tokens - low) / (high - low)))
        return process, kind

    # --- words ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def conditions(
        self, pipeline: Any, prompts: Sequence[str], size: Size, batch: int = 8
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``(conditions [B, ...], unconditional values)`` in float32 on the CPU. Texts of several lengths are padded at
        the end to the longest."""
        parts = [self.encode(pipeline, list(prompts[i : i + batch]), size) for i in range(0, len(prompts), batch)]
        parts.append((self.encode_null or self.encode)(pipeline, [self.null], size))
        parts = [{key: value.detach().cpu() for key, value in part.items()} for part in parts]
        every = {key: _padded([part[key] for part in parts]) for key in parts[0]}
        every = {k: v.float() if v.is_floating_point() else v for k, v in every.items()}
        null = {key: value[-1] for key, value in every.items()}
        if self.zero_null and pipeline.config.get(self.zero_null):
            null |= {k: torch.zeros_like(v) for k, v in null.items() if k != "time_ids"}
        return {key: value[:-1] for key, value in every.items()}, null

    # --- pictures -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def latents(self, pipeline: Any, images: Tensor) -> Tensor:
        """Latents as the network sees them, from images ``[B, 3, H, W]`` in [-1, 1]: the posterior's mean."""
        encode = self.encode_image or scaled_latents
        return encode(pipeline, images.to(next(pipeline.vae.parameters()))).float()


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


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the latents, shaped to ``like [B, C, ...]``."""
    shape = (1, -1, *(1,) * (like.ndim - 2))
    mean, std = (torch.tensor(vae.config[name]).to(like).reshape(shape) for name in ("latents_mean", "latents_std"))
    return mean, std


def _sdxl_latents(pipeline: Any, images: Tensor) -> Tensor:
    """As SDXL and Kolors undo it before they decode: statistics, where the autoencoder has them, then the scale."""
    vae = pipeline.vae
    if vae.config.get("latents_mean") is None or vae.config.get("latents_std") is None:
        return scaled_latents(pipeline, images)
    latents = posterior_mean(vae, images)
    mean, std = _statistics(vae, latents)
    return (latents - mean) * vae.config["scaling_factor"] / std


def _clip_latents(pipeline: Any, images: Tensor) -> Tensor:
    """Of autoencoders of video: clips ``[B, C, 1, h, w]`` of one frame."""
    latents = posterior_mean(pipeline.vae, images.unsqueeze(2))
    mean, std = _statistics(pipeline.vae, latents)
    return (latents - mean) / std


def _frame_latents(pipeline: Any, images: Tensor) -> Tensor:
    return _clip_latents(pipeline, images)[:, :, 0]


def _padded(parts: list[Tensor]) -> Tensor:
    longest = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
    if parts[0].ndim > 1:
        parts = [
            torch.cat([part, part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])], 1)
            if part.shape[1] < longest
            else part
            for part in parts
        ]
    return torch.cat(parts)


def network_name(pipeline: Any) -> str:
    """The part that denoises: ``unet`` or ``transformer``."""
    return "unet" if "unet" in pipeline.components else "transformer"


def network_of(pipeline: Any) -> Any:
    return getattr(pipeline, network_name(pipeline))


def network_patch(pipeline: Any) -> tuple[int, ...]:
    """Latent positions per token inside the network, (height, width)."""
    network = network_of(pipeline)
    patch = network.config.get("patch_size") or (network.config.get("all_patch_size") or (1,))[0]
    if network_name(pipeline) == "unet":
        patch = 2 ** (len(network.config["block_out_channels"]) - 1)
    if "Flux" in type(network).__name__ or "Qwen" in type(network).__name__:
        patch = 1  # packed outside the network
    return (patch, patch) if isinstance(patch, int) else tuple(patch[-2:])


def latent_channels(pipeline: Any) -> int:
    config = pipeline.vae.config
    return int(config.get("latent_channels") or config["z_dim"])


def call_default(pipeline: Any, name: str) -> Any:
    """The default of an argument of the pipeline's own call, so that prompts are encoded as a user's would be."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


# --- conditions -------------------------------------------------------------------------------------------------------
def _sd(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    return {"encoder_hidden_states": pipeline.encode_prompt(prompts, pipeline.device, 1, False)[0]}


def _sdxl(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    states, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    width = None if pipeline.text_encoder_2 is None else int(pipeline.text_encoder_2.config.projection_dim)
    ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=width)
    return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": ids.expand(len(prompts), -1)}


def _sd3(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _pixart(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
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


def _sana(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    asked = {name: call_default(pipeline, name) for name in ("max_sequence_length", "complex_human_instruction")}
    states, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **asked)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}


def _sana_null(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}


def _sana_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return diffusers_call(network, x, time * float(network.config.timestep_scale), cond)  # type: ignore[union-attr,arg-type]


def _flux(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
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


def _flux_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    height, width = x.shape[-2:]
    places = torch.zeros(height // 2, width // 2, 3, device=x.device)
    places[..., 1] = torch.arange(height // 2, device=x.device)[:, None]
    places[..., 2] = torch.arange(width // 2, device=x.device)[None, :]
    words = torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device)
    answer = network(
        pack(x), timestep=time / 1000, img_ids=places.reshape(-1, 3), txt_ids=words, return_dict=False, **cond
    )
    return unpack(answer[0], height, width)


def _qwen(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()  # None: all are words
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}


def _qwen_blank(pipeline: Any) -> dict[str, Tensor]:
    length, width = call_default(pipeline, "max_sequence_length"), pipeline.transformer.config["joint_attention_dim"]
    mask = torch.ones(1, length, dtype=torch.bool)
    return {"encoder_hidden_states": torch.zeros(1, length, width), "encoder_hidden_states_mask": mask}


def _qwen_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    height, width = x.shape[-2:]
    shapes = [[(1, height // 2, width // 2)]]  # the first row's stands for the batch
    answer = network(pack(x), timestep=time / 1000, img_shapes=shapes, return_dict=False, **cond)
    return unpack(answer[0], height, width)


def _qwen_guide(conditional: Tensor, unconditional: Tensor, w: float) -> Tensor:
    """Each guided token, of 2x2 positions, has the length of the conditional one."""
    plain, guided = pack(conditional), pack(plain_guide(conditional, unconditional, w))
    lengths = [x.norm(dim=-1, keepdim=True) for x in (plain, guided)]
    scaled = guided * (lengths[0] / lengths[1].clamp_min(torch.finfo(guided.dtype).tiny))
    return unpack(scaled, *conditional.shape[-2:])


def _z_image(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    rows, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
    mask = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, : len(row)] = True
    return {"encoder_hidden_states": nn.utils.rnn.pad_sequence(rows, batch_first=True), "encoder_attention_mask": mask}


def _z_image_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Fed ``1 - t``; answers the negative velocity."""
    words = [row[mask] for row, mask in zip(cond["encoder_hidden_states"], cond["encoder_attention_mask"], strict=True)]
    answer = network(list(x.unsqueeze(2).unbind(0)), (1000 - time) / 1000, words, return_dict=False)[0]
    return -torch.stack(list(answer)).squeeze(2)


def _wan(pipeline: Any, prompts: list[str], size: Size) -> dict[str, Tensor]:
    length = call_default(pipeline, "max_sequence_length")
    states, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states}


# --- the table --------------------------------------------------------------------------------------------------------
FAMILIES: dict[str, Family] = {
    "sd": Family(
        "Stable Diffusion 1 and 2",
        ("StableDiffusionPipeline",),
        _sd,
        checks=(("a UNet with an embedding of the guidance scale (time_cond_proj_dim)",
                 lambda p: p.unet.config.get("time_cond_proj_dim") is not None),),
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        ("StableDiffusionXLPipeline",),
        _sdxl,
        encode_image=_sdxl_latents,
        zero_null="force_zeros_for_empty_prompt",
        checks=(("a UNet with an embedding of the guidance scale (time_cond_proj_dim)",
                 lambda p: p.unet.config.get("time_cond_proj_dim") is not None),),
    ),
    "sd3": Family("Stable Diffusion 3", ("StableDiffusion3Pipeline",), _sd3),
    "pixart": Family(
        "PixArt",
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        _pixart,
        arguments={"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False},
    ),
    "sana": Family(
        "Sana",
        ("SanaPipeline",),
        _sana,
        call=_sana_call,
        encode_null=_sana_null,
        arguments={"guidance_scale": 1.0, "use_resolution_binning": False},
        checks=(("an embedding of the guidance scale (guidance_embeds)",
                 lambda p: bool(p.transformer.config.get("guidance_embeds"))),),
    ),
    "flux": Family(
        "Flux",
        ("FluxPipeline",),
        _flux,
        call=_flux_call,
        patch=2,
        packed=True,
        arguments={"guidance_scale": 3.5, "true_cfg_scale": 1.0},
        guided="true_cfg_scale",
        size=(1024, 1024),
    ),
    "qwen-image": Family(
        "Qwen-Image",
        ("QwenImagePipeline",),
        _qwen,
        call=_qwen_call,
        guide=_qwen_guide,
        blank=_qwen_blank,
        encode_image=_frame_latents,
        null=" ",
        patch=2,
        packed=True,
        arguments={"true_cfg_scale": 1.0},
        guided="true_cfg_scale",
        size=(1024, 1024),
        checks=(("an embedding of the guidance scale (guidance_embeds)",
                 lambda p: bool(p.transformer.config.get("guidance_embeds"))),),
    ),
    "z-image": Family(
        "Z-Image",
        ("ZImagePipeline",),
        _z_image,
        call=_z_image_call,
        arguments={"guidance_scale": 0.0},
        offset=1.0,
        size=(1024, 1024),
    ),
    "wan": Family(
        "Wan (single frames)",
        ("WanPipeline",),
        _wan,
        arguments={"guidance_scale": 1.0, "num_frames": 1},
        size=(480, 832),
        frames=True,
        encode_image=_clip_latents,
        checks=(
            ("two experts (boundary_ratio)", lambda p: p.config.get("boundary_ratio") is not None),
            ("a time for each token (expand_timesteps)", lambda p: bool(p.config.get("expand_timesteps"))),
            ("conditioning on an image (image_dim)", lambda p: p.transformer.config.get("image_dim") is not None),
        ),
    ),
}  # fmt: skip
BY_CLASS = {name: family for family in FAMILIES.values() for name in family.pipelines}


def family_of(class_name: Any, where: str) -> Family:
    """The family of a pipeline class. Raises UserError that names the class and lists those supported."""
    if class_name not in BY_CLASS:
        raise UserError(
            f"{where} is a {class_name}, which is not supported as a text-to-image teacher",
            cure=f"supported: {', '.join(BY_CLASS)}",
        )
    return BY_CLASS[class_name]


def check_pipeline(pipeline: Any, family: Family, where: str) -> None:
    """Raises UserError naming whatever in a pipeline of this family is not supported."""
    for what, found in family.checks:
        if found(pipeline):
            raise UserError(f"{where}: {family.title} with {what} is not supported", cure="give a plain base model")
    config = network_of(pipeline).config
    have, want = config.get("in_channels"), latent_channels(pipeline) * (4 if family.packed else 1)
    if have != want:
        raise UserError(
            f"{where}: the network reads {have} channels, a picture's latents have {want}",
            cure="give a text-to-image pipeline, not one for in-painting, editing or control",
        )
    if config.get("encoder_hid_dim_type") or config.get("class_embed_type"):
        raise UserError(f"{where}: its UNet is conditioned on more than text", cure="give a plain base model")
