"""Directional derivatives of networks: exact, or from two more calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

How = Literal["exact", "difference"]


def replayed(f: Callable[..., Tensor], like: Tensor) -> Callable[..., Tensor]:
    """``f`` with the same dropout at each call: the derivative is that of the function which is asked beside it. Where
    the first call draws nothing, no later one is taken to, and the random state is left alone. like: on the device that
    it draws on."""
    cuda = like.device.type == "cuda"

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(like.device)] if cuda else [])]

    began, draws = states(), None

    def again(*args: Tensor) -> Tensor:
        nonlocal draws
        if draws:
            torch.set_rng_state(began[0])
            if cuda:
                torch.cuda.set_rng_state(began[1], like.device)
        said = f(*args)
        if draws is None:
            draws = not all(map(torch.equal, began, states()))
        return said

    return again


class _NormsInOrder(TorchFunctionMode):
    """Lays the inputs of group norms out in order: torch's rule for their derivative takes no others, such as attention
    over pixels leaves behind in a U-Net."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def jvp(
    f: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor], how: How = "exact", step: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """``f(*at)`` and its derivative there along ``along``, of the shapes of ``at``; both without a graph.

    how: ``exact`` is forward-mode differentiation, for which attention takes torch's MATH kernel (the others have no
    forward-mode rule) and costs about as much as 3.4 forward passes; ``difference`` is ``(f(at + h along) - f(at - h
    along)) / 2h``, whose error falls with h^2 and grows with rounding over h: for networks with layers that have no
    forward-mode rule. Both are computed in float32, whatever is around them: in bfloat16 derivatives are off by a
    hundredth. step: h; a network that is fed ``1000 t`` turns much within a thousandth and wants 1e-4.
    """
    with torch.autocast(at[0].device.type, enabled=False):
        if how == "exact":
            # not torch.func.jvp, whose wrapped tensors stay behind in networks that keep what they compute
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _NormsInOrder():
                both = f(*map(forward_ad.make_dual, at, along))
                value, slope = forward_ad.unpack_dual(both)
            return value, torch.zeros_like(value) if slope is None else slope
        ahead = f(*(x + step * d for x, d in zip(at, along, strict=True)))
        behind = f(*(x - step * d for x, d in zip(at, along, strict=True)))
        return f(*at), (ahead - behind) / (2 * step)
