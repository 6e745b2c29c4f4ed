"""How each family of diffusers' text-to-image pipelines is asked: its conditions, its latents, its network's call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Guide, NetworkCall, plain_guide
from stillroom.diffusion.process import Process, RectifiedFlow
from stillroom.errors import UserError
from stillroom.folders import pipeline_calls as calls
from stillroom.folders.diffusers_networks import diffusers_call, process_from_scheduler
from stillroom.folders.pipeline_calls import (
    Size,
    call_default,
    latent_channels,
    network_of,
    network_patch,
)


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
    its network sees; by default the autoencoder's shift and scale. fold: positions along each side that lie in the
    channels of one. shift: ``(pipeline, tokens)``, of the times, where the scheduler says that it depends on the
    resolution. inputs: whether the network has the guidance scale as an input, at the pipeline's default; then the
    pipeline does not guide in another way. few: ``(pipeline, shift, times)`` to arguments of the call that make the
    pipeline ask a student at ``times``. parts: ``(guidance)`` to parts of the pipeline that guide. trigflow: the
    pipeline reads the flow as TrigFlow. consistency: it steps with an LCMScheduler alone. steps: of the teacher, where
    it was made for few; 0: as of others. extra: the kind of text projection that a UNet of this family has. checks:
    ``(what is unsupported, test of the pipeline)``. blank: zeros for the longest text, where the length of what
    ``encode`` makes depends on the text. experts: the pipeline may run a second network, ``transformer_2``, at the
    times below ``boundary_ratio``, and any scheduler that steps along a flow.
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
    encode_image: Callable[[Any, Tensor], Tensor] = calls.scaled_latents
    fold: int = 1
    shift: Callable[[Any, int], float] = calls.resolution_shift
    inputs: Callable[[Any], bool] = lambda pipeline: False
    few: Callable[[Any, float, tuple[float, ...]], dict[str, Any]] | None = None
    parts: Callable[[float], dict[str, Any]] | None = None
    trigflow: bool = False
    consistency: bool = False
    steps: int = 0
    extra: str | None = None
    checks: tuple[tuple[str, Callable[[Any], bool]], ...] = ()
    blank: Callable[[Any], dict[str, Tensor]] | None = None
    experts: bool = False

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
        factor, channels = self.factor(pipeline) * self.fold, latent_channels(pipeline) * self.fold**2
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
        if self.trigflow:
            return RectifiedFlow(), "v"
        config = dict(pipeline.scheduler.config)
        config["_class_name"] = type(pipeline.scheduler).__name__
        process, kind = process_from_scheduler(config)
        if isinstance(process, RectifiedFlow) and config.get("use_dynamic_shifting"):
            shape, how = self.shape(pipeline, size), config.get("time_shift_type", "exponential")
            if how not in ("exponential", "linear"):
                raise UserError(
                    f"scheduler {config['_class_name']} has time_shift_type {how!r}",
                    cure="supported here: exponential, linear",
                )
            tokens = (
                shape[-2] * shape[-1] // math.prod(network_patch(pipeline)) // (self.patch if self.packed else 1) ** 2
            )
            shift = self.shift(pipeline, tokens)
            process = RectifiedFlow(shift=math.exp(shift) if how == "exponential" else shift)
        return process, kind

    # --- calls ----------------------------------------------------------------------------------------------------
    def asked(
        self, pipeline: Any, process: Process, times: tuple[float, ...] = (), guidance: float = 1.0
    ) -> dict[str, Any]:
        """Arguments of the pipeline's own call, besides prompts, size and number of steps. times: of a few-step
        student, as fractions of ``t_max``. Raises UserError for a guidance that the pipeline cannot apply."""
        found = dict(self.arguments)
        if self.few is not None:
            found |= self.few(pipeline, getattr(process, "shift", 1.0), times)
        if self.inputs(pipeline):
            found["guidance_scale"] = call_default(pipeline, "guidance_scale")
        if guidance != 1.0 and self.parts is None:
            if self.inputs(pipeline) and self.guided == "guidance_scale":
                raise UserError(
                    f"{self.title}: this network reads the guidance scale, and its pipeline guides no further",
                    cure="guidance=1; sample(..., guidance_scale=W) changes the input",
                )
            found[self.guided] = guidance - self.offset
            if self.guided == "true_cfg_scale":
                found["negative_prompt"] = self.null
        return found

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
            null |= {k: torch.zeros_like(v) for k, v in null.items() if k not in ("time_ids", "timestep_cond")}
        return {key: value[:-1] for key, value in every.items()}, null

    # --- pictures -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def latents(self, pipeline: Any, images: Tensor) -> Tensor:
        """Latents as the network sees them, from images ``[B, 3, H, W]`` in [-1, 1]: the posterior's mean."""
        return self.encode_image(pipeline, images.to(next(pipeline.vae.parameters()))).float()


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


# --- the table --------------------------------------------------------------------------------------------------------
FAMILIES: dict[str, Family] = {
    "sd": Family(
        "Stable Diffusion 1 and 2",
        ("StableDiffusionPipeline",),
        calls.sd,
        inputs=calls.reads_guidance,
    ),
    "lcm": Family(
        "Latent consistency models",
        ("LatentConsistencyModelPipeline",),
        calls.sd,
        inputs=lambda pipeline: True,
        consistency=True,
        steps=4,
        checks=(("no input for the guidance scale (time_cond_proj_dim)", lambda p: not calls.reads_guidance(p)),),
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        ("StableDiffusionXLPipeline",),
        calls.sdxl,
        encode_image=calls.sdxl_latents,
        zero_null="force_zeros_for_empty_prompt",
        inputs=calls.reads_guidance,
    ),
    "sd3": Family("Stable Diffusion 3", ("StableDiffusion3Pipeline",), calls.sd3),
    "kolors": Family("Kolors", ("KolorsPipeline",), calls.kolors, inputs=calls.reads_guidance, extra="text_proj"),
    "pixart": Family(
        "PixArt",
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        calls.pixart,
        arguments={"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False},
    ),
    "sana": Family(
        "Sana",
        ("SanaPipeline",),
        calls.sana,
        call=calls.sana_call,
        encode_null=calls.sana_null,
        arguments={"guidance_scale": 1.0, "use_resolution_binning": False},
        checks=(("an embedding of the guidance scale (guidance_embeds)",
                 lambda p: bool(p.transformer.config.get("guidance_embeds"))),),
    ),
    "sana-sprint": Family(
        "Sana-Sprint",
        ("SanaSprintPipeline",),
        calls.sprint,
        call=calls.sprint_call,
        arguments={"use_resolution_binning": False},
        few=calls.sprint_arguments,
        inputs=lambda pipeline: True,
        trigflow=True,
    ),
    "flux": Family(
        "Flux",
        ("FluxPipeline",),
        calls.flux,
        call=calls.flux_call,
        patch=2,
        packed=True,
        arguments={"guidance_scale": 3.5, "true_cfg_scale": 1.0},
        guided="true_cfg_scale",
        size=(1024, 1024),
    ),
    "qwen-image": Family(
        "Qwen-Image",
        ("QwenImagePipeline",),
        calls.qwen,
        call=calls.qwen_call,
        guide=calls.qwen_guide,
        blank=calls.qwen_blank,
        encode_image=calls.frame_latents,
        null=" ",
        patch=2,
        packed=True,
        arguments={"true_cfg_scale": 1.0},
        guided="true_cfg_scale",
        size=(1024, 1024),
        checks=(("an embedding of the guidance scale (guidance_embeds)",
                 lambda p: bool(p.transformer.config.get("guidance_embeds"))),),
    ),
    "flux2": Family(
        "Flux 2",
        ("Flux2Pipeline",),
        calls.flux2,
        call=calls.flux2_call,
        encode_image=calls.flux2_latents,
        fold=2,
        shift=calls.flux2_shift,
        inputs=lambda pipeline: True,
        size=(1024, 1024),
    ),
    "flux2-klein": Family(
        "Flux 2 Klein",
        ("Flux2KleinPipeline",),
        calls.flux2,
        call=calls.flux2_call,
        encode_image=calls.flux2_latents,
        fold=2,
        shift=calls.flux2_shift,
        size=(1024, 1024),
    ),
    "qwen-image-2.1": Family(
        "Qwen-Image 2.1",
        ("QwenImage21Pipeline",),
        calls.qwen21,
        call=calls.qwen21_call,
        encode_image=calls.qwen21_latents,
        null=" ",
        patch=2,
        arguments={"true_cfg_scale": 1.0},
        guided="true_cfg_scale",
        size=(1024, 1024),
    ),
    "chroma": Family(
        "Chroma",
        ("ChromaPipeline",),
        calls.chroma,
        call=calls.chroma_call,
        patch=2,
        packed=True,
        size=(1024, 1024),
    ),
    "lumina2": Family(
        "Lumina 2",
        ("Lumina2Pipeline",),
        calls.lumina2,
        call=calls.lumina2_call,
        guide=calls.lumina2_guide,
        encode_null=calls.lumina2_null,
        shift=calls.lumina2_shift,
    ),
    "hunyuan-image": Family(
        "HunyuanImage 2.1",
        ("HunyuanImagePipeline",),
        calls.hunyuan,
        arguments={},
        parts=calls.hunyuan_parts,
        size=(2048, 2048),
        checks=(("two times at once (use_meanflow)", lambda p: bool(p.transformer.config.get("use_meanflow"))),),
    ),
    "aura-flow": Family(
        "AuraFlow",
        ("AuraFlowPipeline",),
        calls.aura,
        call=calls.unit_time_call,
        size=(1024, 1024),
    ),
    "cogview4": Family(
        "CogView 4",
        ("CogView4Pipeline",),
        calls.cogview4,
        call=calls.cogview4_call,
        few=calls.cogview4_arguments,
        blank=calls.cogview4_blank,
        shift=calls.cogview4_shift,
    ),
    "krea2": Family(
        "Krea 2",
        ("Krea2Pipeline",),
        calls.krea2,
        call=calls.krea2_call,
        encode_image=calls.frame_latents,
        shift=calls.krea2_shift,
        patch=2,
        packed=True,
        arguments={"guidance_scale": 0.0},
        offset=1.0,
        size=(1024, 1024),
    ),
    "z-image": Family(
        "Z-Image",
        ("ZImagePipeline",),
        calls.z_image,
        call=calls.z_image_call,
        arguments={"guidance_scale": 0.0},
        offset=1.0,
        size=(1024, 1024),
    ),
    "wan": Family(
        "Wan (single frames)",
        ("WanPipeline",),
        calls.wan,
        arguments={"guidance_scale": 1.0, "num_frames": 1},
        size=(480, 832),
        frames=True,
        encode_image=calls.clip_latents,
        experts=True,
        checks=(
            ("half of its experts (transformer and transformer_2 with boundary_ratio)",
             lambda p: p.transformer is None or (p.config.get("boundary_ratio") is None) != (p.transformer_2 is None)),
            ("a time for each token (expand_timesteps)", lambda p: bool(p.config.get("expand_timesteps"))),
            ("conditioning on an image (image_dim)",
             lambda p: any(network.config.get("image_dim") is not None for network in calls.networks_of(p).values())),
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


def with_network(pipeline: Any, network: nn.Module) -> Any:
    """``pipeline``, or the pipeline of a class that runs another network than its own: a Sana that has the guidance
    scale as an input is Sana-Sprint's."""
    if type(pipeline).__name__ != "SanaPipeline" or not getattr(network, "config", {}).get("guidance_embeds"):
        return pipeline
    import diffusers

    parts = dict(pipeline.components) | {"transformer": network, "scheduler": diffusers.SCMScheduler()}
    return diffusers.SanaSprintPipeline(**parts)


def check_pipeline(pipeline: Any, family: Family, where: str) -> None:
    """Raises UserError naming whatever in a pipeline of this family is not supported."""
    for what, found in family.checks:
        if found(pipeline):
            raise UserError(f"{where}: {family.title} with {what} is not supported", cure="give a plain base model")
    config = network_of(pipeline).config
    have, want = config.get("in_channels"), latent_channels(pipeline) * (4 if family.packed else family.fold**2)
    if have != want:
        raise UserError(
            f"{where}: the network reads {have} channels, a picture's latents have {want}",
            cure="give a text-to-image pipeline, not one for in-painting, editing or control",
        )
    if config.get("encoder_hid_dim_type") not in (None, family.extra) or config.get("class_embed_type"):
        raise UserError(f"{where}: its UNet is conditioned on more than text", cure="give a plain base model")
