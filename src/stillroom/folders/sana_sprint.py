"""From a Sana network to Sana-Sprint's, which reads times in [0, 1] and the guidance scale."""

from __future__ import annotations

from torch import nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.errors import UserError
from stillroom.folders.pipeline_calls import sprint_call
from stillroom.networks.scalars import zeroed

TIME, GUIDED_TIME = "time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."


def is_sana(denoiser: Denoiser) -> bool:
    return type(denoiser.network).__name__ == "SanaTransformer2DModel"


def reads_scale(denoiser: Denoiser) -> bool:
    """Whether the network has the guidance scale among its own inputs, as Sana-Sprint's."""
    return is_sana(denoiser) and bool(denoiser.network.config.get("guidance_embeds"))  # type: ignore[union-attr]


def sprint_denoiser(teacher: Denoiser, qk_norm: bool = True) -> Denoiser:
    """A copy of a Sana denoiser with an embedding of the guidance scale, whose last layer is 0, asked at times in [0,
    1] (arXiv 2503.09641, sec. 3.2 and 3.4). qk_norm: queries and keys of all attentions are normalised too. With that,
    or where the teacher reads times in [0, 1000], it is another function until it is trained. Raises UserError for a
    Sana of another process than a flow."""
    if not isinstance(teacher.process, RectifiedFlow):
        raise UserError("Sana-Sprint's pipeline runs flows", cure="give a Sana that was trained as a flow")
    old = teacher.network
    config = {name: value for name, value in dict(old.config).items() if not name.startswith("_")}  # type: ignore[arg-type]
    config["guidance_embeds"] = True
    if qk_norm:
        config["qk_norm"] = "rms_norm_across_heads"
    network: nn.Module = type(old).from_config(config)  # type: ignore[attr-defined]
    state = {name.replace(TIME, GUIDED_TIME): value for name, value in old.state_dict().items()}
    missing, unknown = network.load_state_dict(state, strict=False)
    assert not unknown
    assert all("guidance_embedder" in name or "norm_" in name for name in missing)
    zeroed(network.time_embed.guidance_embedder.linear_2)  # type: ignore[union-attr,arg-type]
    return Denoiser(
        network.to(next(old.parameters())), RectifiedFlow(), "v", null=teacher.null, shape=teacher.shape,
        call=sprint_call, guide=teacher.guide,
    )  # fmt: skip
