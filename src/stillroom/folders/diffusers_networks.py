"""From a diffusers network and its scheduler's config to a denoiser."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, plain_call
from stillroom.diffusion.process import BETA_SCHEDULES, EDM, VP, Process, RectifiedFlow
from stillroom.errors import UserError

ALIASES = {"label": "class_labels"}  # this project's condition names -> diffusers' argument names


@functools.lru_cache(maxsize=64)
def _arguments(cls: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def accepts(network: nn.Module, condition: str) -> bool:
    """Whether the network's ``forward`` takes an argument of this name."""
    return condition in _arguments(type(network))


def diffusers_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Ask a diffusers transformer or UNet. Conditions are passed under diffusers' own argument names (``label`` is
    ``class_labels``); ``text_embeds``/``time_ids`` and ``resolution``/``aspect_ratio`` travel in ``added_cond_kwargs``.
    A learned variance (twice the channels) is dropped."""
    known = _arguments(type(network))
    arguments: dict[str, Any] = {}
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None} if "PixArt" in type(network).__name__ else {}
    for name, value in cond.items():
        name = ALIASES.get(name, name)
        if name in known:
            arguments[name] = value
        elif "added_cond_kwargs" in known:
            added[name] = value
        else:
            raise UserError(
                f"{type(network).__name__} takes no condition {name!r}", cure=f"it takes: {', '.join(known[1:])}"
            )
    if added:
        arguments["added_cond_kwargs"] = added
    output = network(x, timestep=time, **arguments, return_dict=False)[0]
    return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * x.shape[1] else output


def process_from_scheduler(config: dict[str, Any]) -> tuple[Process, str]:
    """``(process, prediction kind)`` of a diffusers scheduler config.

    Raises UserError for schedulers whose process or prediction kind is not one of ours, naming them.
    """
    name = config.get("_class_name", "")
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        return RectifiedFlow(shift=float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)), "v"
    if config.get("rescale_betas_zero_snr"):
        raise UserError(f"scheduler {name} rescales its betas to zero SNR", cure="such teachers are not supported yet")
    if name.startswith("EDM"):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(
                f"scheduler {name} has prediction_type {config['prediction_type']!r}", cure="supported here: epsilon"
            )
        return EDM(config["sigma_min"], config["sigma_max"], config["sigma_data"], config.get("rho", 7.0)), "edm"
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    kind = config.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise UserError(f"scheduler {name or '?'} has prediction_type {kind!r}", cure=f"supported: {', '.join(kinds)}")
    schedule = config.get("beta_schedule", "linear")
    if schedule not in BETA_SCHEDULES or config.get("trained_betas") is not None:
        raise UserError(
            f"scheduler {name or '?'} has beta_schedule {schedule!r}", cure=f"supported: {', '.join(BETA_SCHEDULES)}"
        )
    return (
        VP(schedule, config["num_train_timesteps"], config.get("beta_start", 1e-4), config.get("beta_end", 0.02)),
        kinds[kind],
    )


def scheduler_config(process: Process, prediction: str) -> dict[str, Any]:
    """The diffusers scheduler config of a process: the inverse of :func:`process_from_scheduler`."""
    if isinstance(process, RectifiedFlow):
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": process.shift,
        }  # fmt: skip
    if isinstance(process, EDM):
        return {
            "_class_name": "EDMEulerScheduler", "sigma_min": process.sigma_min, "sigma_max": process.sigma_max,
            "sigma_data": process.sigma_data, "rho": process.rho,
        }  # fmt: skip
    if isinstance(process, VP):
        kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
        return {
            "_class_name": "DDIMScheduler", "num_train_timesteps": process.steps, "beta_schedule": process.schedule,
            "beta_start": process.beta_start, "beta_end": process.beta_end, "prediction_type": kinds[prediction],
        }  # fmt: skip
    raise UserError(
        f"diffusers has no scheduler for the {process.name} process", cure="re-parametrise the student first"
    )


def denoiser_from_diffusers(
    network: nn.Module,
    scheduler: dict[str, Any],
    null: dict[str, Any] | None = None,
    prediction: str | None = None,
    process: Process | None = None,
) -> Denoiser:
    """A denoiser of any diffusers transformer or UNet and its scheduler's config.

    null: unconditional values by condition name. DiT's extra label is found by itself; a UNet's must be given, since
    whether its last class means "unconditional" cannot be read from its config.
    Raises UserError when the network's sample shape cannot be read from its config.
    """
    config = dict(getattr(network, "config", {}))
    found, kind = process_from_scheduler(scheduler)
    disable_label_dropout(network)
    size, channels = config.get("sample_size"), config.get("in_channels")
    if size is None or channels is None:
        raise UserError(
            f"{type(network).__name__}: its config has no sample_size / in_channels", cure="give a complete config.json"
        )
    height, width = (size, size) if isinstance(size, int) else size
    if null is None:
        null = {}
        if type(network).__name__ == "DiTTransformer2DModel":
            null = {"label": config["num_embeds_ada_norm"]}
    return Denoiser(
        network,
        process or found,
        prediction or kind,  # type: ignore[arg-type]
        null=null,
        shape=(channels, height, width),
        call=diffusers_call if "timestep" in _arguments(type(network)) else plain_call,
    )


def disable_label_dropout(network: nn.Module) -> None:
    """diffusers' label embeddings replace labels at random by themselves in train mode, block by block; label dropout
    is a choice of the training turn here."""
    for module in network.modules():
        if type(module).__name__ == "LabelEmbedding":
            setattr(module, "dropout_prob", 0.0)  # noqa: B010 - nn.Module's own annotation allows tensors only


def make_network(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Build a diffusers (or transformers) network from its class name and config."""
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise UserError(f"diffusers has no model class {class_name!r}", cure="use the class name from the config.json")
    return cls.from_config(config)
