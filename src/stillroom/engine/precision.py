"""Mixed precision, activation checkpointing and compilation, applied to a method's networks from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stillroom.engine.offload import CAST, untrained
from stillroom.errors import UserError
from stillroom.method import Method


def networks(method: nn.Module) -> Iterator[nn.Module]:
    """The networks of every role: ``role.network`` where a role wraps one (a denoiser does), the elements of a role
    that is a list or a dictionary of networks, else the role itself."""
    seen: set[int] = set()
    for _, role in method.named_children():
        for part in role.children() if isinstance(role, nn.ModuleList | nn.ModuleDict) else (role,):
            inner = getattr(part, "network", None)
            module = inner if isinstance(inner, nn.Module) else part
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def _to_float32(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x, output)


_to_float32.of_engine = True  # type: ignore[attr-defined]


def return_float32(method: nn.Module) -> None:
    """Under autocast, let networks compute in bf16 but hand out fp32, so that whatever is formed from their answers
    (differences of denoisers above all) keeps its small digits."""
    for network in networks(method):
        network.register_forward_hook(_to_float32)


def fast_products(on: bool) -> None:
    """Whether a CUDA device takes float32 matrix products and convolutions in TF32 (10 bits of mantissa, several times
    as fast), in this process."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def halve_frozen(method: Method, device: torch.device) -> None:
    """Hold the matrices and filters of the networks that are frozen for good in bfloat16, and let these networks
    compute as autocast does, which would round the very same weights. What they hand out is float32; all others stay.

    Raises UserError where there is no such network: adapters on one base are trained with it.
    """
    untouched, halved = {id(p) for p in untrained(method)}, 0
    for network in networks(method):
        parameters = list(network.parameters())
        if getattr(network, "is_frozen", False) and parameters and all(id(p) in untouched for p in parameters):
            halved += 1
            for part in network.modules():
                if isinstance(part, CAST):
                    part.to(torch.bfloat16)
            _under_autocast(network, device)
    if not halved:
        raise UserError(
            f"engine.frozen=bf16, but {method.slug!r} has no network that is frozen for good and shares no weight with "
            "one that is trained",
            cure="leave engine.frozen at fp32",
        )


def _under_autocast(network: nn.Module, device: torch.device) -> None:
    entered: list[torch.autocast] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(torch.autocast(device.type, torch.bfloat16))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return _to_float32(module, args, output)

    enter.of_engine = leave.of_engine = True  # type: ignore[attr-defined]
    network.register_forward_pre_hook(enter)
    network.register_forward_hook(leave, always_call=True)


def filters_last(method: nn.Module) -> None:
    """Lay the filters of two-dimensional convolutions out with their channels last, as fast kernels want them."""
    for network in networks(method):
        for part in network.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)


def without_hooks(module: nn.Module) -> nn.Module:
    """Take what the engine has hung on modules (``of_engine``, ``runs_on``) off a copy that leaves it."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if hasattr(hook, "of_engine")]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)
        part.__dict__.pop("runs_on", None)
    return module


COMPILED_FORMS = 64
"""How many forms of one network's code torch.compile may keep before it gives up and runs the code as it is, without a
word: roles of one class share them, and turns ask them with and without gradients, in train and eval mode, tapped and
not."""


def compile_networks(method: nn.Module) -> None:
    """Compile the networks of every role, in place."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_FORMS)
    # else what was compiled for one role answers for another of the same class that taps read, and nothing is read
    dynamo.skip_nnmodule_hook_guards = False
    for network in networks(method):
        network.compile()


def checkpoint_activations(method: nn.Module) -> None:
    """Recompute activations in the backward pass wherever a network knows how to.

    diffusers models offer ``enable_gradient_checkpointing``, transformers models ``gradient_checkpointing_enable``. A
    role's own ``checkpoint_function(block, *args)``, where there is one, replaces torch's (diffusers models only).

    Raises ``UserError`` where no network of the method can do it.
    """
    from torch.utils.checkpoint import checkpoint

    able = 0
    roles: list[Any] = []
    for role in method.children():  # of several experts each is one
        experts = getattr(role, "experts", None)
        roles += experts.values() if isinstance(experts, dict) else [role]
    # roles that share a network: the one with a function of its own has the last word
    for role in sorted(roles, key=lambda role: hasattr(role, "checkpoint_function")):
        custom = getattr(role, "checkpoint_function", None)
        for part in role.modules():
            module: Any = part
            if not getattr(module, "supports_gradient_checkpointing", True):  # it would raise, as ResNet does
                continue
            if hasattr(module, "enable_gradient_checkpointing"):

                def function(block: Any, *args: Any, _custom: Any = custom) -> Any:
                    return _custom(block, *args) if _custom else checkpoint(block, *args, use_reentrant=False)

                module.enable_gradient_checkpointing(function)
            elif hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                continue
            able += 1
            break
    if not able:
        raise UserError(
            "engine.activation_checkpointing is on, but no network of this method supports it",
            cure="switch it off, or use diffusers or transformers networks",
        )
