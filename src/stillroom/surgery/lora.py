"""LoRA roles: several denoisers that share one copy of the base weights (arXiv 2106.09685), built on peft's layers.

Teacher = all adapters off; each role = its own adapter on. A switch on the network says who speaks; every call of a
denoiser goes through it, and a layer recomputed under activation checkpointing speaks with the voice it had.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.utils.checkpoint
from torch import nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.routed import RoutedDenoiser
from stillroom.errors import UserError, nearest
from stillroom.surgery.skeleton import unshared

TOGETHER = "+"
"""Between the names of adapters that speak together."""
KEPT = "steps"
"""What the names of adapters begin with that a method keeps for other numbers of steps than its student's."""
_OF_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+\.")


class LoraSwitch:
    """Which adapters of a network are active, ``a`` or ``a+b``; ``None`` is the bare base."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.active: str | None = None
        self._set(None)

    def _set(self, role: str | None) -> None:
        # peft's public switches also toggle requires_grad, which belongs to the engine here.
        self.active = role
        for layer in self.layers:
            layer._disable_adapters = role is None
            layer._active_adapter = role.split(TOGETHER) if role is not None else []

    @contextmanager
    def use(self, role: str | None) -> Iterator[None]:
        before = self.active
        if before != role:
            self._set(role)
        try:
            yield
        finally:
            if before != role:
                self._set(before)

    def checkpoint(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        """Activation checkpointing that recomputes ``block`` with the adapter that was active in the forward pass."""
        role = self.active

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            with self.use(role):
                return block(*inner, **inner_kwargs)

        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, **kwargs)


def lora_role(
    teacher: Denoiser,
    role: str,
    rank: Annotated[int, {"min": 1}] = 8,
    alpha: Annotated[float | None, {"above": 0}] = None,
    targets: Annotated[Sequence[str], {"filled": True}] = ("to_q", "to_v"),
) -> Denoiser:
    """A denoiser that is ``teacher`` plus a trainable adapter named ``role`` on the modules whose names end in
    ``targets`` (module path suffixes). Starts equal to the teacher (``B = 0``); ``alpha`` defaults to ``rank``.

    Raises UserError when no module of the network has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    network = teacher.network
    names = [name for name, _ in network.named_modules()]
    for target in targets or ("",):
        if not target or not any(name == target or name.endswith("." + target) for name in names):
            ends = Counter(
                name.rsplit(".", 1)[-1] for name, one in network.named_modules() if isinstance(one, nn.Linear)
            )
            some = [end for end, _ in ends.most_common() if not end.isdecimal()][:6]
            known = nearest(target, ends) if target else ""
            raise UserError(
                f"LoRA target {target!r} names no module of {type(network).__name__}{known}"
                if targets
                else f"no LoRA targets are named, of {type(network).__name__}'s layers",
                cure=f"set targets to endings of its layers, for example [{', '.join(some)}] "
                f"(options.targets, or lora.{role}.targets)",
            )
    trainable = {name: p.requires_grad for name, p in network.named_parameters()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else rank,  # pyrefly: ignore  # peft divides it; fractions are fine
        target_modules=list(targets),
    )
    inject_adapter_in_model(config, network, adapter_name=role)
    for name, p in network.named_parameters():  # peft freezes the base; the owner of the base decides that here
        original = name.replace(".base_layer", "")
        p.requires_grad_(trainable.get(original, trainable.get(name, f".{role}." in name)))
    layers = [m for m in network.modules() if isinstance(m, LoraLayer)]
    object.__setattr__(network, "lora_switch", LoraSwitch(layers))
    return LoraDenoiser(teacher, role)


class LoraDenoiser(Denoiser):
    """The view of a shared network through the adapter ``role``; empty: through its own weights, which are then the
    role's. beside: adapters that speak too and are trained by others."""

    def __init__(self, base: Denoiser, role: str, beside: Sequence[str] = ()) -> None:
        super().__init__(
            base.network, base.process, base.prediction, null=base.null, shape=base.shape, call=base.call,
            guide=base.guide,
        )  # fmt: skip
        self.role: str = role
        self.adapter = TOGETHER.join(filter(None, (role, *beside))) or None

    def role_parameters(self) -> dict[str, nn.Parameter]:
        named = self.network.named_parameters()
        if not self.role:
            return {name: p for name, p in named if not _OF_ADAPTER.search(name)}
        return {name: p for name, p in named if f".{self.role}." in name}

    def checkpoint_function(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.network.lora_switch.checkpoint(block, *args, **kwargs)  # type: ignore[union-attr,operator]

    def merged(self, share: bool = False) -> Denoiser:
        """An ordinary denoiser with the adapters that speak folded into the weights and every other one gone. share: as
        :func:`plain_copy` does."""
        return plain_copy(self, self.adapter, share)


def plain_copy(denoiser: Denoiser, role: str | None = None, share: bool = False) -> Denoiser:
    """A copy of ``denoiser`` whose network has no LoRA layers: ``role``, one or several, folded in, all others dropped.
    share: weights that the adapter leaves as they are stay the same tensors, which takes no memory."""
    from peft.tuners.lora import LoraLayer

    network = unshared(denoiser.network) if share else copy.deepcopy(denoiser.network)
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            plain: nn.Module = module.get_base_layer()
            for spoken in role.split(TOGETHER) if role is not None else ():
                if spoken not in module.lora_A:
                    continue
                with torch.no_grad():
                    weight: Any = plain.weight
                    weight = weight + module.get_delta_weight(spoken)  # pyrefly: ignore  # all of peft's layers have it
                plain.weight = nn.Parameter(weight, requires_grad=plain.weight.requires_grad)  # type: ignore[union-attr]
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, plain)
    network.__dict__.pop("lora_switch", None)
    return Denoiser(
        network, denoiser.process, denoiser.prediction, null=denoiser.null, shape=denoiser.shape, call=denoiser.call,
        guide=denoiser.guide,
    )  # fmt: skip


@torch.no_grad()
def take_over(mine: Denoiser, theirs: Denoiser) -> None:
    """The weights of ``theirs``: adapter for adapter; an adapter's own beginning, which adds nothing, where ``theirs``
    has none; else all of them with the adapter of its role folded in. Of several experts each takes over its own."""
    if isinstance(mine, RoutedDenoiser) and isinstance(theirs, RoutedDenoiser):
        for name, expert in mine.experts.items():
            take_over(expert, theirs.experts[name])
        return
    adapters = [isinstance(one, LoraDenoiser) and bool(one.role) for one in (mine, theirs)]
    if adapters == [True, False]:
        for name, p in _own(mine).items():
            if ".lora_B." in name or ".lora_embedding_B." in name:
                p.zero_()
        return
    given = _own(theirs)
    if isinstance(theirs, LoraDenoiser) and adapters == [False, True]:
        given = dict(plain_copy(theirs, theirs.role, share=True).named_parameters())
    for p, q in zip(_own(mine).values(), given.values(), strict=True):
        p.copy_(q)


def _own(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    if isinstance(denoiser, LoraDenoiser):
        return denoiser.role_parameters()
    return {name: p for name, p in denoiser.named_parameters() if not _OF_ADAPTER.search(name)}
