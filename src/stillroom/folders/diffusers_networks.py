"""From a diffusers network and its scheduler's config to a denoiser."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser, plain_call
from stillroom.diffusion.process import BETA_SCHEDULES, EDM, VP, Process, RectifiedFlow
from stillroom.diffusion.routed import ByCondition, RoutedDenoiser
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
        if name == "class_labels" and getattr(network, "class_embedding", True) is None:
            continue  # a UNet without classes has the argument too
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
    """``(process, prediction kind)`` of a diffusers scheduler config. diffusers itself builds the scheduler, so that
    what the config leaves out is its class's own default, and the noise rates are those that it computes.

    Raises UserError for schedulers whose process or prediction kind is not one of ours, naming them.
    """
    name, scheduler = _scheduler(config)
    config = dict(scheduler.config)
    kind = str(config.get("prediction_type", "epsilon"))
    if "FlowMatch" in name or kind == "flow_prediction" or config.get("use_flow_sigmas"):
        return _flow(name, config), "v"
    if name.startswith("EDM"):
        if kind != "epsilon":
            raise UserError(f"scheduler {name} has prediction_type {kind!r}", cure="supported here: epsilon")
        return EDM(*(float(config[key]) for key in ("sigma_min", "sigma_max", "sigma_data", "rho"))), "edm"
    if kind not in KINDS:
        raise UserError(f"scheduler {name} has prediction_type {kind!r}", cure=f"supported: {', '.join(KINDS)}")
    if not hasattr(scheduler, "alphas_cumprod") or config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"scheduler {name} has no discrete noise schedule",
            cure="give the scheduler that the model was trained with",
        )
    process = _variance_preserving(name, scheduler, config)
    if process.zero_snr and kind == "epsilon":
        raise UserError(
            f"scheduler {name} rescales its betas to zero SNR, where a prediction of the noise says nothing",
            cure="set rescale_betas_zero_snr to false, or prediction_type to what the network was trained to predict",
        )
    return process, KINDS[kind]


KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' prediction types as ours, of variance-preserving processes."""


def _scheduler(config: dict[str, Any]) -> tuple[str, Any]:
    """``(class name, scheduler)`` of a config."""
    import diffusers

    name = config.get("_class_name", "")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, diffusers.SchedulerMixin) or not hasattr(cls, "from_config"):
        raise UserError(f"diffusers has no scheduler {name!r}", cure="use the class name from scheduler_config.json")
    given = {key: value for key, value in config.items() if key != "_class_name"}
    if given.pop("predict_epsilon", True) is False:  # diffusers before 0.10 said so
        given.setdefault("prediction_type", "sample")
    loud = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # keys of other versions are no one's concern
    try:
        return name, cls.from_config(given)
    except Exception as problem:  # of a config's nonsense anything may come
        detail = " ".join(str(problem).split())[:200]
        raise UserError(
            f"diffusers cannot build the scheduler {name} ({detail})", cure="copy scheduler_config.json again"
        ) from None
    finally:
        diffusers.utils.logging.set_verbosity(loud)


def _flow(name: str, config: dict[str, Any]) -> RectifiedFlow:
    if "FlowMatch" not in name and (
        config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas")
    ):
        raise UserError(
            f"scheduler {name} has prediction_type {config.get('prediction_type')!r} and use_flow_sigmas "
            f"{bool(config.get('use_flow_sigmas'))}",
            cure="a flow needs prediction_type flow_prediction with use_flow_sigmas",
        )
    if config.get("invert_sigmas"):
        raise UserError(f"scheduler {name} inverts its sigmas (invert_sigmas)", cure="such flows are not supported")
    if config.get("num_train_timesteps", 1000) != 1000:
        raise UserError(
            f"scheduler {name} has {config['num_train_timesteps']} num_train_timesteps",
            cure="supported for flows: 1000",
        )
    shift = config.get("shift", config.get("flow_shift")) or 1.0
    if not isinstance(shift, int | float) or not 0 < shift < float("inf"):
        raise UserError(f"scheduler {name} has shift {shift!r}", cure="a shift is a positive number")
    return RectifiedFlow(float(shift))


def _variance_preserving(name: str, scheduler: Any, config: dict[str, Any]) -> VP:
    """The process with a scheduler's own noise rates: by the name of its schedule where that gives them, else by its
    betas."""
    kept, steps = scheduler.alphas_cumprod.double(), len(scheduler.alphas_cumprod)
    if steps < 2 or not bool((kept.diff() < 0).all()) or not 0 <= float(kept[-1]) < float(kept[0]) < 1:
        raise UserError(
            f"scheduler {name} has betas of no noise schedule", cure="betas lie between 0 and 1, two or more of them"
        )
    zero = (
        bool(config.get("rescale_betas_zero_snr"))
        and "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
    )
    schedule, first, last = (config.get(key) for key in ("beta_schedule", "beta_start", "beta_end"))
    said: list[VP] = []
    if schedule in BETA_SCHEDULES and isinstance(first, int | float) and isinstance(last, int | float):
        said.append(VP(str(schedule), steps, float(first), float(last), zero_snr=zero))
    if config.get("trained_betas") is not None:
        said = [VP("trained", steps, betas=tuple(config["trained_betas"]), zero_snr=zero or float(kept[-1]) == 0)]
    for process in said:
        rates = process.alpha(torch.arange(steps, dtype=torch.float64)) ** 2
        if torch.allclose(rates, kept, rtol=1e-3, atol=1e-6):  # theirs are float32
            return process
    zero = zero or float(kept[-1]) == 0
    kept = torch.cat(
        [torch.ones(1, dtype=torch.float64), kept[:-1], torch.zeros(1, dtype=torch.float64) if zero else kept[-1:]]
    )
    return VP("trained", steps, betas=tuple((1 - kept[1:] / kept[:-1]).tolist()), zero_snr=zero)


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
        kind = next(theirs for theirs, ours in KINDS.items() if ours == prediction)
        found = {
            "_class_name": "DDIMScheduler", "num_train_timesteps": process.steps, "beta_schedule": process.schedule,
            "beta_start": process.beta_start, "beta_end": process.beta_end, "prediction_type": kind,
        }  # fmt: skip
        if process.betas:
            found |= {"beta_schedule": "linear", "trained_betas": list(process.betas)}
        if process.zero_snr:  # only trailing steps ask at the time of pure noise
            found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return found
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
    if type(network).__name__ == "UNet2DModel" and config.get("class_embed_type") is not None:
        raise UserError(
            f"a UNet2DModel with class_embed_type {config['class_embed_type']!r} is not supported",
            cure="supported: num_class_embeds, or no classes",
        )
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


def label_count(network: nn.Module) -> int:
    """Labels that a UNet of pixels knows, among them the one that means "unconditional" if it has one; else 0."""
    return int(getattr(network, "config", {}).get("num_class_embeds") or 0)


def some_conditions(denoiser: Denoiser) -> dict[str, Tensor]:
    """Conditions of one sample by which a network can be tried: its "unconditional" ones, or its first label where it
    has labels and none of them means that; of experts by condition, a sample of the first."""
    if isinstance(denoiser, RoutedDenoiser):
        found = some_conditions(next(iter(denoiser.experts.values())))
        return found | ({denoiser.route.condition: torch.tensor(0)} if isinstance(denoiser.route, ByCondition) else {})
    known = denoiser.null or ({"label": 0} if label_count(denoiser.network) else {})
    return {name: torch.as_tensor(value) for name, value in known.items()}


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
