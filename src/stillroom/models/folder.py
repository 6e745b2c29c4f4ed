"""Denoisers and finished students as folders: diffusers' layout, safetensors only, plus one ``stillroom.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser, plain_call
from stillroom.diffusion.process import process_from_dict
from stillroom.diffusion.sampling import ODESampler, Sampler, sampler_from_dict
from stillroom.errors import UserError, reading
from stillroom.models.families import (
    denoiser_from_diffusers,
    device_of,
    make_network,
    read_json,
    scheduler_config,
)
from stillroom.models.lora import LoraDenoiser
from stillroom.models.mar import MAR
from stillroom.models.mlp import PointMLP
from stillroom.models.skeleton import making, unread

NETWORK_FOLDERS = ("transformer", "unet", "network")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIDE_FILE = "stillroom.json"
NULLS = "null_conditions.safetensors"
OWN_NETWORKS: dict[str, type[nn.Module]] = {"PointMLP": PointMLP, "MAR": MAR}


class ImageGenerator:
    """A denoiser and the sampler it is run with; what ``stillroom.load`` returns.

    classes: names of the condition's classes in label order (may be empty).
    """

    def __init__(self, denoiser: Denoiser, sampler: Sampler, classes: Sequence[str] = ()) -> None:
        self.denoiser, self.sampler, self.classes = denoiser.eval(), sampler, list(classes)

    @torch.no_grad()
    def sample(self, cond: Tensor | Sequence[int] | dict[str, Tensor] | int, seed: int = 0, batch: int = 250) -> Tensor:
        """Samples ``[N, C, H, W]`` float32, one per condition, on the CPU.

        cond: class labels ``[N]``, a dictionary of conditions with N rows, or a number of unconditional samples.
        Sample i depends on ``seed`` and on the batch size only through its own noise.
        """
        device = device_of(self.denoiser)
        if isinstance(cond, int):
            conditions, n = {}, cond
        elif isinstance(cond, dict):
            conditions = cond
            n = len(next(iter(cond.values())))
        else:
            conditions = {"label": torch.as_tensor(cond, dtype=torch.long)}
            n = len(conditions["label"])
        if n == 0:
            raise UserError("no samples were asked for", cure="give at least one label")
        if "label" in conditions and self.classes:
            labels = conditions["label"]
            bad = labels[(labels < 0) | (labels >= len(self.classes))]
            if len(bad):
                raise UserError(f"label {int(bad[0])} is not a class", cure=f"labels are 0 to {len(self.classes) - 1}")
        generator = torch.Generator().manual_seed(seed)
        out = []
        for start in range(0, n, batch):
            size = min(batch, n - start)
            noise = torch.randn(size, *self.denoiser.shape, generator=generator).to(device)
            part = {k: v[start : start + size].to(device) for k, v in conditions.items()}
            out.append(self.sampler.sample(self.denoiser, noise, part, generator).float().cpu())
        return torch.cat(out)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, **extra: Any) -> None:
        """Write the folder; ``extra`` entries are added to ``stillroom.json``. ``dtype``: of the weights in the file
        (default: as they are)."""
        from safetensors.torch import save_file

        denoiser = self.denoiser.merged() if isinstance(self.denoiser, LoraDenoiser) else self.denoiser
        folder, network = Path(folder), denoiser.network
        save_network(network, folder, dtype)
        if type(network).__name__ not in OWN_NETWORKS:
            (folder / "scheduler").mkdir(exist_ok=True)
            schedule = scheduler_config(denoiser.process, denoiser.prediction)
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=2) + "\n")
        tensors = {k: v.detach().cpu().contiguous() for k, v in denoiser.null.items() if isinstance(v, Tensor)}
        if tensors:
            save_file(tensors, folder / NULLS)
        side = {
            "process": denoiser.process.to_dict(),
            "prediction": denoiser.prediction,
            "null": {k: v for k, v in denoiser.null.items() if not isinstance(v, Tensor)},
            "sampler": self.sampler.to_dict(),
            "classes": self.classes,
            **extra,
        }
        (folder / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> ImageGenerator:
        """Read a folder written by :meth:`save`, or a diffusers folder (then sampled by 25 Heun steps).

        Raises UserError for a missing, incomplete or corrupt folder, naming the file.
        """
        folder = Path(folder)
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else {}
        with reading(folder):
            sampler = sampler_from_dict(side["sampler"]) if "sampler" in side else ODESampler()
            return cls(load_denoiser(folder), sampler, side.get("classes", ()))


def save_network(network: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and weights into the sub-folder of ``folder`` that diffusers keeps such networks in."""
    from safetensors.torch import save_file

    name = next((n for n in NETWORK_FOLDERS if n in type(network).__name__.lower()), "network")
    (folder / name).mkdir(parents=True, exist_ok=True)
    config = dict(getattr(network, "config", {}))
    config["_class_name"] = type(network).__name__
    config.pop("_name_or_path", None)
    (folder / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, folder / name / WEIGHTS, metadata={"format": "pt"})


def network_folder(folder: str | Path) -> Path:
    """Where a model folder keeps its network. Raises UserError when it does not exist or holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"teacher folder {folder} does not exist", cure="give a folder in diffusers layout")
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
    """A denoiser from a folder with ``transformer/`` or ``unet/`` (diffusers layout) and ``scheduler/``; eval mode, on
    the CPU. Raises UserError naming the file that is missing, corrupt or does not fit."""
    folder = Path(folder)
    config = read_json(network_folder(folder) / "config.json")
    side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else {}
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


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill ``network`` from a safetensors file. Raises UserError when it is missing, corrupt or of another shape."""
    try:
        network.load_state_dict(read_shards(path))
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"weights {path} do not fit their config.json: {detail}", cure="use the matching pair"
        ) from None


def read_shards(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the shards that diffusers splits a large one into."""
    index = path.with_name(f"{path.name}.index.json")
    if path.exists() or not index.exists():
        return read_tensors(path)
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file beside it", cure="use the matching pair")
    return {key: value for name in names for key, value in read_tensors(path.with_name(name)).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise UserError(f"weights {path} are missing", cure="only safetensors files are read, never pickles")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"weights {path} cannot be read ({error})", cure="copy the file again; it is damaged") from None
