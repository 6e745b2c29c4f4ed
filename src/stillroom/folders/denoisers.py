"""Denoisers and finished students as folders: diffusers' layout, safetensors only, plus one ``stillroom.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser, plain_call
from stillroom.diffusion.process import process_from_dict
from stillroom.diffusion.routed import RoutedDenoiser, route_from_dict, route_to_dict
from stillroom.errors import UserError, reading
from stillroom.folders.attachments import ATTACHED, attach, save_attachment
from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network, scheduler_config
from stillroom.folders.weights import load_weights, read_tensors, save_tensors
from stillroom.networks.mar import MAR
from stillroom.networks.point_mlp import PointMLP
from stillroom.parsing import read_json
from stillroom.surgery.attached import AttachedDenoiser
from stillroom.surgery.lora import LoraDenoiser
from stillroom.surgery.skeleton import making, unread

NETWORK_FOLDERS = ("transformer", "unet", "network")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIDE_FILE = "stillroom.json"
NULLS = "null_conditions.safetensors"
EXPERTS = "experts"
"""The sub-folder in which a routed denoiser has a folder for each of its experts, by name."""
OWN_NETWORKS: dict[str, type[nn.Module]] = {"PointMLP": PointMLP, "MAR": MAR}


def save_network(network: nn.Module, folder: Path, dtype: torch.dtype | None = None, name: str = "") -> None:
    """Write ``config.json`` and weights into the sub-folder of ``folder`` that diffusers keeps such networks in, or the
    one of this name."""
    name = name or next((n for n in NETWORK_FOLDERS if n in type(network).__name__.lower()), "network")
    (folder / name).mkdir(parents=True, exist_ok=True)
    config = dict(getattr(network, "config", {}))
    config["_class_name"] = type(network).__name__
    config.pop("_name_or_path", None)
    (folder / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_tensors(state, folder / name / WEIGHTS, metadata={"format": "pt"})


def save_denoiser(denoiser: Denoiser, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write network, scheduler and null conditions, adapters folded in, or a folder for each expert; what is attached
    to the network has a folder of its own. Gives what belongs into ``stillroom.json`` for :func:`load_denoiser`."""
    if isinstance(denoiser, AttachedDenoiser):
        if denoiser.attachment.state_dict():  # one without weights says nothing by itself
            save_attachment(denoiser, folder / ATTACHED)
        return save_denoiser(denoiser.base(), folder, dtype)
    if isinstance(denoiser, RoutedDenoiser):
        first: dict[int, str] = {}  # the name under which a network was met first
        for name, expert in denoiser.experts.items():
            if first.setdefault(id(expert), name) == name:
                place = folder / EXPERTS / name
                side = save_denoiser(expert, place, dtype)
                (place / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")
        found: dict[str, Any] = {"experts": list(denoiser.experts), "route": route_to_dict(denoiser.route)}
        if denoiser.own:
            folders = {name: first[id(expert)] for name, expert in denoiser.experts.items()}
            found |= {"own": denoiser.own, "folders": folders}
        return found
    denoiser = denoiser.merged(share=True) if isinstance(denoiser, LoraDenoiser) else denoiser
    save_network(denoiser.network, folder, dtype)
    if type(denoiser.network).__name__ not in OWN_NETWORKS:
        (folder / "scheduler").mkdir(exist_ok=True)
        schedule = scheduler_config(denoiser.process, denoiser.prediction)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=2) + "\n")
    tensors = {k: v.detach().cpu().contiguous() for k, v in denoiser.null.items() if isinstance(v, Tensor)}
    if tensors:
        save_tensors(tensors, folder / NULLS)
    return {
        "process": denoiser.process.to_dict(),
        "prediction": denoiser.prediction,
        "null": {k: v for k, v in denoiser.null.items() if not isinstance(v, Tensor)},
    }


def network_folder(folder: str | Path) -> Path:
    """Where a model folder keeps its network. Raises UserError when it does not exist or holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"teacher folder {folder} does not exist", cure="check the path")
    name = next((n for n in NETWORK_FOLDERS if (folder / n).is_dir()), None)
    if name is None:
        raise UserError(f"{folder} holds no model", cure=f"it needs one of: {', '.join(NETWORK_FOLDERS)}")
    return folder / name


def load_network(folder: str | Path) -> nn.Module:
    """The network of a model folder, in float32, eval mode, on the CPU. Raises UserError like :func:`load_denoiser`."""
    place = network_folder(folder)
    config = read_json(place / "config.json")
    class_name = config.get("_class_name", "")
    with reading(place / "config.json"), making():
        if class_name in OWN_NETWORKS:
            network = OWN_NETWORKS[class_name](**{k: v for k, v in config.items() if not k.startswith("_")})
        else:
            network = make_network(class_name, config)
    if not unread():
        load_weights(network, place / WEIGHTS)
    return network.eval()


def load_denoiser(folder: str | Path) -> Denoiser:
    """A denoiser from a folder with ``transformer/`` or ``unet/`` (diffusers layout) and ``scheduler/``, or with
    ``experts/``; eval mode, on the CPU. Raises UserError naming the file that is missing, corrupt or does not fit."""
    folder = Path(folder)
    side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else {}
    if "route" in side:
        with reading(folder / SIDE_FILE):
            names = [str(name) for name in side["experts"]]
            folders = {name: Path(str(side.get("folders", {}).get(name, name))).name for name in names}  # never outside
            read = {place: load_denoiser(folder / EXPERTS / place) for place in dict.fromkeys(folders.values())}
            experts = {name: read[place] for name, place in folders.items()}
            return RoutedDenoiser(experts, route_from_dict(side["route"]), str(side.get("own", ""))).eval()
    denoiser = _one_network(folder, side)
    return attach(denoiser, folder / ATTACHED) if (folder / ATTACHED).is_dir() else denoiser


def _one_network(folder: Path, side: dict[str, Any]) -> Denoiser:
    config = read_json(network_folder(folder) / "config.json")
    class_name = config.get("_class_name", "")
    if class_name == "MAR":
        raise UserError(f"{folder} holds a masked generator, no denoiser", cure="read it with stillroom.load")
    if class_name in OWN_NETWORKS:
        for key in ("process", "prediction", "null"):
            if key not in side:
                raise UserError(
                    f"{folder / SIDE_FILE} is missing or lacks {key!r}",
                    cure=f"a {class_name} is read with this file only",
                )
        denoiser = Denoiser(
            load_network(folder), process_from_dict(side["process"]), side["prediction"], null=side["null"],
            shape=(config["dim"],), call=plain_call,
        )  # fmt: skip
        return denoiser.eval()
    network = load_network(folder)
    null = side.get("null")
    if (folder / NULLS).exists():
        null = {**(null or {}), **read_tensors(folder / NULLS)}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    denoiser = denoiser_from_diffusers(
        network,
        scheduler,
        null=null,
        prediction=side.get("prediction"),
        process=process_from_dict(side["process"]) if "process" in side else None,
    )
    return denoiser.eval()
