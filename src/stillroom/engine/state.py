"""What a checkpoint holds: a run's tensors by name, where they go when they come back, and whether they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.engine.config import EngineConfig
from stillroom.engine.ema import EMA
from stillroom.engine.player import Player
from stillroom.errors import UserError
from stillroom.method import Method


def changeable(method: Method, players: Mapping[str, Player]) -> dict[str, Tensor]:
    """Parameters and buffers that training may change. Frozen networks are rebuilt from the teacher, not stored."""
    trained = {id(p) for player in players.values() for p in player.trained}
    fixed = {
        id(tensor)
        for module in method.modules()
        if getattr(module, "is_frozen", False)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    } - trained
    tensors = [*method.named_parameters(), *method.named_buffers()]
    return {name: tensor for name, tensor in tensors if id(tensor) not in fixed}


def files(
    weights: Mapping[str, Tensor], players: Mapping[str, Player], averages: Mapping[str, EMA]
) -> dict[str, dict[str, Tensor]]:
    """``{file stem: {name: tensor}}``; names are unique over all files."""
    optimizer = {
        f"optimizer/{turn}/{name}/{key}": value
        for turn, player in players.items()
        for name, p in player.parameters.items()
        for key, value in player.optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }
    found = {"weights": {f"weights/{name}": tensor for name, tensor in weights.items()}, "optimizer": optimizer}
    for name, average in averages.items():
        found[f"ema-{name}"] = {f"ema/{name}/{key}": value for key, value in average.values.items()}
    return found


def optimizer_slot(players: Mapping[str, Player], name: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Make the place in an optimizer's state that the tensor ``name`` of a checkpoint goes to."""
    _, turn, *middle, key = name.split("/")
    p = players[turn].parameters["/".join(middle)]
    # A moment is laid out, and sharded, as its parameter is; the step count is a number.
    like = list(p.shape) == shape and key != "step"
    slot = torch.zeros_like(p, dtype=dtype).detach() if like else torch.zeros(shape, dtype=dtype, device=p.device)
    players[turn].optimizer.state[p][key] = slot
    return slot


def check_fits(
    where: Any,
    manifest: Mapping[str, Any],
    method: Method,
    config: EngineConfig,
    recipe_hash: str,
    mine: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Raise ``UserError`` unless the checkpoint at ``where`` is one of this method, recipe and these networks."""
    cure = "resume with the recipe that the run was started with, or start a new run"
    if manifest["method"] != method.slug:
        raise UserError(f"{where} was made by {manifest['method']!r}, not {method.slug!r}", cure=cure)
    theirs = EngineConfig().to_dict() | manifest["config"]  # settings that it does not know stood at their defaults
    for key, value in json.loads(json.dumps(config.trajectory())).items():
        if theirs.get(key) != value:
            raise UserError(
                f"{where} was made with engine.{key}={theirs.get(key)!r}, this run has {value!r}", cure=cure
            )
    if recipe_hash and manifest["recipe_hash"] not in ("", recipe_hash):
        raise UserError(f"{where} was made with another recipe", cure=cure)
    expected = {
        name: list(tensor.shape)
        for file, group in mine.items()
        if file != "optimizer"
        for name, tensor in group.items()
    }
    found = {name: shape for name, (_, shape) in manifest["tensors"].items() if not name.startswith("optimizer/")}
    for name in (*expected, *found):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where} does not fit: {name} has shape {found.get(name)} there and {expected.get(name)} here",
                cure=cure,
            )
