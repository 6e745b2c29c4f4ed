"""What all image-level proofs of score distillation share: the recipe's own arm, the controls, their claims."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from stillroom.data.source import ASSETS
from stillroom.engine.config import EngineConfig
from stillroom.method import get_method
from stillroom.proofs.base import Arm, Claim
from stillroom.recipe import Recipe


def recipe_arm(name: str) -> Arm:
    """The arm of a shipped recipe: its options, LoRA and engine, trained by the code of ``stillroom run <name>``, but
    on the bench's own teachers, student and data. These are the run's where the bench has one teacher and one set of
    data; a bench of classifiers or encoders may split its data, or label and name them, otherwise than a run would.

    Options and settings that came after results were recorded (``later`` in their metadata) are left out at their
    default: older results keep their keys."""
    recipe = Recipe.load(name)
    engine = recipe.engine.to_dict()
    free = (
        "seed",
        "checkpoint_every",
        "keep",
        "log_every",
        "device",
        "check_freezing",
        "loss_limit",
        "growth_limit",
        "offload",
    )
    engine = {key: value for key, value in engine.items() if key not in free}
    cls = get_method(recipe.method).Options
    options = _without_later(cls, recipe.to_dict()["options"])
    engine = _without_later(EngineConfig, engine)
    return Arm(name, recipe.method, options=options, engine=engine, lora=recipe.lora)


RECORDED: dict[str, dict[str, Any]] = {
    "dmd2": {"critic_times": {"low": 0.05, "high": 0.98}, "critic_gan_weight": 0.1},
    "swiftbrush": {"fake_times": {"low": 0.05, "high": 0.98}},
    "sim": {"critic_times": {"low": 0.05}},
    "sid-lsg": {"critic_times": {"low": 0.05}},
    "uni-instruct": {"critic_times": {"low": 0.05}},
}
"""Options under which image-level arms were recorded, by method, where the shipped recipe has changed since."""


def recorded_arm(name: str) -> Arm:
    """:func:`recipe_arm` as it was when its results were recorded."""
    arm = recipe_arm(name)
    return arm.with_(name, options=RECORDED[arm.method])


def longer_arm(name: str, updates: int = 3000, **options: Any) -> Arm:
    """The shipped recipe with so many updates of the student, from a later first time and under a slower average, as in
    ``sid-lsg-long``, but at the recipe's own learning rates."""
    arm = recipe_arm(name)
    ema = [{"name": "ema", "of": "student", "decay": 0.999}]
    steps = updates * int(arm.options.get("critic_turns", 1))
    engine = {"steps": steps, "warmup": 200, "ema": ema}
    return arm.with_(f"{name}-{updates}", options={"t_init": 0.65, **options}, engine=engine)


def longer_claim(arm: Arm) -> Claim:
    """What :func:`longer_arm` is for."""
    return Claim(
        "near-teacher-longer",
        "After 3,000 updates of the student its distance is at most 1.2 times that of the teacher's best many-step "
        "sampling",
        "",
        "fd",
        arm.name,
        "<=",
        1.2,
        "teacher",
    )


def _without_later(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    later, usual = {f.name for f in fields(cls) if f.metadata.get("later")}, asdict(cls())
    return {k: v for k, v in values.items() if k not in later or v != usual[k]}


def image_arms(arm: Arm) -> tuple[Arm, ...]:
    """The controls: the untouched student, the teacher at one and at its best many steps, and the same network trained
    by the GAN alone, without a teacher (shared by all proofs)."""
    gan = recorded_arm("dmd2")
    return (
        arm.with_("untouched", engine={"steps": 0}),
        Arm("teacher-1", sampler={"name": "few-step", "times": (1.0,)}),
        Arm("teacher", sampler=card_sampler("fashion-teacher")),
        gan.with_("gan-only", options={"distribution_matching": 0.0}),
    )


@functools.cache
def card_sampler(folder: str) -> dict[str, Any]:
    """A shipped teacher's best many-step sampler, as its card has it."""
    return json.loads((ASSETS / folder / "card.json").read_text())["best"]["sampler"]


def image_claims(name: str) -> tuple[Claim, ...]:
    """Student against the controls, and against the teacher's best many-step sampling."""
    return (
        Claim(
            "learns",
            "The one-step student beats the untouched copy of the teacher",
            "",
            "fd",
            name,
            "<=",
            0.5,
            "untouched",
        ),
        Claim("teacher-1", "The student beats its teacher at one step", "", "fd", name, "<=", 0.5, "teacher-1"),
        Claim(
            "near-teacher",
            "The student's distance is at most 1.2 times that of the teacher's best many-step sampling",
            "",
            "fd",
            name,
            "<=",
            1.2,
            "teacher",
        ),
    )
