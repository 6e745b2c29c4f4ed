"""Building a method from what it is given, and training it: the same code for a run and for a proof's arm."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.draws import mix
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError, nearest
from stillroom.method import Method, get_method
from stillroom.recipe import Recipe
from stillroom.surgery.skeleton import making


def build_method(
    recipe: Recipe, given: Callable[[], Mapping[str, Any]], check: Callable[[Method], None] = lambda method: None
) -> Method:
    """The recipe's method with its networks, made from what ``given`` returns (``Task.given``, ``Bench.given``), which
    is asked with torch's random state set by the recipe's seed. check: raises UserError for a method that does not fit.

    Raises UserError where the given networks, or the recipe's LoRA roles, do not fit the method.
    """
    method = get_method(recipe.method)(recipe.method_options(), recipe.lora)
    try:
        with torch.random.fork_rng(), making():
            torch.manual_seed(mix("build", recipe.engine.seed))  # heads and adapters start at random
            method.build_from(_to_shard(recipe, given()))
    except ValueError as error:
        raise UserError(f"method {recipe.method!r} cannot use teacher {recipe.teacher!r}: {error}") from error
    for role in recipe.lora:
        if getattr(getattr(method, role, None), "adapter", None) is None:
            roles = [name for name, part in method.named_children() if isinstance(part, Denoiser)]
            raise UserError(
                f"recipe key 'lora.{role}': {recipe.method!r} makes no LoRA of that name{nearest(role, roles)}",
                cure=f"its networks: {', '.join(roles)}",
            )
    check(method)
    return method


def train(trainer: Trainer, share: bool = False) -> tuple[nn.Module, Sampler]:
    """Train to the end: the network that becomes the student, calibrated, and how it is run. Under several processes
    each calls this, and all have left their group afterwards. share: the network's weights are those of the method,
    with which nothing else may be done any more. Raises :class:`~stillroom.errors.TrainingDiverged`."""
    trainer.fit()
    network = trainer.export_role(share)
    trainer.method.finish(network)
    trainer.world.leave()
    return network, trainer.method.sampler()


def _to_shard(recipe: Recipe, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The given things, copied where the first process will need whole networks after the method's have been sharded:
    it draws the teachers' samples for the report."""
    first, several = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1")) > 1
    if recipe.engine.parallel != "fsdp" or not first or not several:
        return given
    memo: dict[int, Any] = {}  # what stands under two names stays one network
    return {name: value if name == "space" else copy.deepcopy(value, memo) for name, value in given.items()}
