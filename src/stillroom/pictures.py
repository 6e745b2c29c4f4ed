"""Models that draw pictures: what they are asked for, what a drawing costs, and how many are drawn at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.sampling import Sampler
from stillroom.errors import UserError, nearest
from stillroom.folders.diffusers_networks import some_conditions
from stillroom.surgery.negatives import cross_attention_paths, networks_of, steered
from stillroom.task import Model, load_model

REAL_SIZE = 1e12
"""Floating-point operations (a TFLOP). Teachers whose one picture takes more are left out at the end of a run, unless
``evaluate.teachers`` asks for them; batches of drawings are so large that an evaluation takes at most this much."""
NEGATIVE_SCALE = 0.5
"""How hard a model is steered away from a negative text, where its sampler does not say."""
ADJUSTABLE = ("guidance", "steps", "temperature")
"""Numbers of a sampler that may be changed from one drawing to the next."""


class PictureGenerator(Model):
    """A finished model that draws pictures, with a ``sample`` of its own: of classes (``asked_by`` is ``labels``) or of
    captions. Here it is asked by *wishes*: a class by its name, a caption, or nothing where it draws at random."""

    does = "draws pictures"

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All networks that take part in a drawing, by name."""
        return {"network": self.module}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its pictures, in pixels."""
        raise NotImplementedError

    # --- costs ----------------------------------------------------------------------------------------------------
    most_at_once: ClassVar[int] = 64  # pictures of a batch, where these are small
    _evaluation: float | None = None

    @property
    def flops(self) -> float:
        return self._evaluation_flops() * self.nfe

    @property
    def at_once(self) -> int:
        """Pictures that are drawn in a batch: as many as keep an evaluation below :data:`REAL_SIZE`."""
        return max(1, min(self.most_at_once, int(REAL_SIZE // max(self._evaluation_flops(), 1.0))))

    def drawing(self) -> list[Callable[[], Any]]:
        """The steps of drawing one batch that take the most memory, each by itself, on a model whose tensors have no
        values. Default: one evaluation of a denoiser."""
        network = self.module
        if not isinstance(network, Denoiser):
            return []
        rows = self.at_once
        one = some_conditions(network)
        guided = 2 if getattr(self.sampler, "guidance", 1.0) not in (0.0, 1.0) else 1

        def evaluate() -> Any:
            given = {k: torch.empty((guided * rows, *v.shape), dtype=v.dtype) for k, v in one.items()}
            return network(torch.empty(guided * rows, *network.shape), torch.full((guided * rows,), 0.5), given)

        return [evaluate]

    def _evaluation_flops(self) -> float:
        """Floating-point operations of one evaluation for one picture. Small networks are not looked at closely: no
        weight is used more than once for each place of a sample."""
        if self._evaluation is None:
            network = self.module
            most = 2.0 * self.parameters
            if isinstance(network, Denoiser):
                most *= math.prod(network.shape[1:])
                if most * self.most_at_once > REAL_SIZE:
                    from stillroom.evaluation.cost import forward_flops

                    most = forward_flops(network)
            self._evaluation = most
        return self._evaluation

    # --- wishes ---------------------------------------------------------------------------------------------------
    @property
    def choices(self) -> list[str]:
        """Names, else numbers, of the classes that can be asked for; empty for a model without classes."""
        return []

    def examples(self) -> list[str]:
        """A few wishes, to choose from."""
        return self.choices

    def surprise(self, generator: torch.Generator) -> str:
        """A wish at random; nothing where the model knows none."""
        wishes = self.examples()
        return wishes[int(torch.randint(len(wishes), (), generator=generator))] if wishes else ""

    def check(self, wish: str) -> None:
        """Raises UserError for a wish that cannot be drawn."""
        if self.choices and wish not in self.choices:
            raise UserError(f"no class {wish!r}", cure=f"choose one of: {', '.join(self.choices)}")

    # --- drawing --------------------------------------------------------------------------------------------------
    @property
    def settings(self) -> dict[str, float]:
        """Those numbers of its sampler that may be changed for one drawing: of :data:`ADJUSTABLE`, as they are."""
        return {name: getattr(self.sampler, name) for name in ADJUSTABLE if hasattr(self.sampler, name)}

    def changed(self, **changes: Any) -> Sampler:
        """The sampler with other settings. Raises UserError for those that it does not have."""
        known = [field.name for field in fields(self.sampler)]  # type: ignore[arg-type]
        for name in changes:
            if name not in known:
                raise UserError(
                    f"sampler {self.sampler.name!r} has no setting {name!r}{nearest(name, known)}",
                    cure=f"its settings: {', '.join(known)}",
                )
        return replace(self.sampler, **changes) if changes else self.sampler  # type: ignore[type-var]

    def brief(self) -> Model:
        """In one step, where its sampler has steps."""
        if "steps" not in self.settings:
            return self
        twin = copy.copy(self)
        twin.sampler = self.changed(steps=1)
        return twin

    sample: Callable[..., Tensor]
    """Pictures ``[N, C, H, W]`` in [-1, 1], on the CPU: of labels; or of captions, by ``(captions, seed, batch,
    **changes)``, with one seed for all or one for each, and settings of the sampler to change."""

    def draw(self, wish: str, n: int, seed: int, **changes: Any) -> Tensor:
        """``n`` pictures ``[N, C, H, W]`` in [-1, 1] of one wish, on the CPU. changes: of the sampler."""
        raise NotImplementedError

    # --- what it must not show ------------------------------------------------------------------------------------
    steering: tuple[Cond, float] | None = None  # the conditions of a negative text, and alpha

    def said(self, text: str) -> Cond:
        """The conditions ``[1, ...]`` of one text, under the names that the network has for them."""
        raise NotImplementedError

    def away(self, negative: str, scale: float | None = None) -> Self:
        if self.asked_by != "captions":
            return super().away(negative, scale)
        check_scale(scale)
        if not negative.strip():
            raise UserError("the negative text is empty", cure="say what must not be shown, or leave it away")
        self.check(negative)
        said, network = self.said(negative), self.module
        if not isinstance(network, Denoiser):
            raise UserError(
                f"a {type(network).__name__} cannot be steered away from a text", cure="use a denoiser of captions"
            )
        for one in networks_of(network):
            cross_attention_paths(one)
        twin = copy.copy(self)
        own = getattr(self.sampler, "negative_scale", NEGATIVE_SCALE)
        twin.steering = said, own if scale is None else scale
        return twin

    def steered(self) -> AbstractContextManager[None]:
        """Around the network's calls for one drawing."""
        network = self.module
        if self.steering is None or not isinstance(network, Denoiser):
            return nullcontext()
        return steered(network, *self.steering)

    @property
    def fills(self) -> bool:
        """Whether it can draw a part of a picture anew (:meth:`fill`)."""
        return False

    @property
    def cell(self) -> int:
        """Side in pixels of the squares that holes are made of: what the network draws at once."""
        return 1

    def fill(self, wish: str, image: Tensor, hole: Tensor, n: int, seed: int, **changes: Any) -> Tensor:
        """``n`` ways to draw the ``hole`` (bool ``[H, W]``) of ``image [C, H, W]`` anew, so that it fits the wish."""
        raise UserError("this model fills no holes", cure="give a masked generator")

    def to(self, device: torch.device | str) -> Self:
        """On another device, in place."""
        for network in self.networks.values():
            network.to(device)
        return self


def check_scale(scale: float | None) -> None:
    """Raises UserError for a scale of negative texts that is none."""
    if scale is not None and not 0 <= scale < math.inf:
        raise UserError(f"the scale of a negative text must be at least 0, got {scale}", cure="0.1 to 1 are usual")


def load_generator(name: str | Path) -> PictureGenerator:
    """As :func:`load_model`. Raises UserError for a model that draws no pictures, saying what it does."""
    model = load_model(name)
    if not isinstance(model, PictureGenerator):
        raise UserError(f"this model {model.does}", cure=model.usage)
    return model
