"""Several last layers of one network, of which each answers for an interval of the path from noise to data (arXiv
2607.26004, sec. 3.4)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.errors import UserError
from stillroom.surgery.attached import AttachedDenoiser, Attachment, ask_once, hidden_of


class ParallelHeads(Attachment):
    """Adds to the last layer's answer ``sum_k d_k W_k h``: h is what that layer is given, ``W_k`` head k's difference
    from it, 0 at the start, and ``d_k`` the share of interval k in the span that is asked about, in the flow's time
    ``u = sigma / (alpha + sigma)``. The network then says the mean velocity of that span from the state that it is
    given; a span of one interval asks one head.

    Conditions, as times u: ``r``, where the span ends, and ``since``, where it begins; without it at the time that the
    network is asked at, and with the noise that a path begins with where that is not known (a pipeline's one step).

    path: of the last layer, linear or a convolution, whose weight has the shape ``weight``. count: of heads.
    """

    reads = ("r", "since")
    timed = True

    def __init__(
        self, path: str, count: int, weight: Sequence[int], bias: bool = True, padding: Sequence[int] = ()
    ) -> None:
        config = {"path": path, "count": count, "weight": list(weight), "bias": bias, "padding": list(padding)}
        super().__init__([path], config)
        self.padding = tuple(padding)
        self.weight = nn.Parameter(torch.zeros(count, *weight))
        self.bias = nn.Parameter(torch.zeros(count, weight[0])) if bias else None
        self.register_buffer("flow", torch.linspace(1, 0, count + 1))  # u at the intervals' ends

    def shares(self, since: Tensor, r: Tensor) -> Tensor:
        """``d [B, N]`` of spans from ``since`` down to ``r``; 0 for a span without length."""
        top, low = torch.minimum(since[:, None], self.flow[:-1]), torch.maximum(r[:, None], self.flow[1:])
        covered = (top - low).clamp_min(0)
        return covered / covered.sum(1, keepdim=True).clamp_min(torch.finfo(covered.dtype).tiny)

    def answer(self, path: str, inputs: Mapping[Any, Any], output: Any) -> Any:
        told = self.told or {}
        if "r" not in told:
            return None
        r = self.of_rows(told["r"]).to(self.flow)
        since = told.get("since", told.get("u", self.flow[0])).to(r)
        d = self.shares(since.expand_as(r) if since.ndim == 0 else self.of_rows(since), r)
        return output + self.mean(d, hidden_of(inputs)).to(output)

    def mean(self, d: Tensor, hidden: Tensor) -> Tensor:
        """``sum_k d_k W_k h`` for ``hidden [B, ..., C]``, or ``[B, C, H, W]`` of a convolution."""
        rows = len(hidden)
        d = d.expand(rows, -1) if len(d) == 1 else d
        weight = (d @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        bias = None if self.bias is None else d @ self.bias
        if not self.padding:
            said = hidden.flatten(1, -2) @ weight.mT if hidden.ndim > 2 else (weight @ hidden[..., None]).squeeze(-1)
            said = said if bias is None else said + (bias[:, None] if hidden.ndim > 2 else bias)
            return said.unflatten(1, hidden.shape[1:-1]) if hidden.ndim > 2 else said
        # one group of channels for each sample
        said = nn.functional.conv2d(
            hidden.flatten(0, 1)[None], weight.flatten(0, 1), None if bias is None else bias.flatten(),
            padding=self.padding, groups=rows,
        )  # fmt: skip
        return said[0].unflatten(0, (rows, -1))


def last_layer(denoiser: Denoiser) -> str:
    """The module path of the last linear layer or convolution that ``denoiser`` runs when it is asked."""
    order: list[str] = []

    def seen(path: str) -> Callable:
        return lambda *_: order.append(path)

    layers = {name: m for name, m in denoiser.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    handles = [layer.register_forward_hook(seen(path)) for path, layer in layers.items()]
    try:
        ask_once(denoiser)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise UserError(f"{type(denoiser.network).__name__} has no last layer that is linear", cure="another network")
    return order[-1]


def with_heads(denoiser: Denoiser, count: int) -> AttachedDenoiser:
    """``denoiser`` with ``count`` heads, one for each interval of its process's grid; the same function until they are
    trained, whatever span it is asked about. One that has as many already is given back. Raises UserError for a
    network whose last layer has strides or groups, and for one that has something else attached."""
    if isinstance(denoiser, AttachedDenoiser):
        had = denoiser.attachment
        if isinstance(had, ParallelHeads) and len(had.flow) == count + 1:
            return denoiser
        what = f"{len(had.flow) - 1} heads" if isinstance(had, ParallelHeads) else type(had).__name__
        raise UserError(
            f"this network has {what} attached, and is to have {count} heads",
            cure="begin with a student of as many heads, or with one that has nothing attached",
        )
    path, process = last_layer(denoiser), denoiser.process
    layer: Any = denoiser.network.get_submodule(path)
    padding: Sequence[int] = ()
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding if isinstance(layer.padding, tuple) else ()
        if not padding or (layer.stride, layer.dilation, layer.groups) != ((1, 1), (1, 1), 1):
            raise UserError(f"{path} is no plain convolution, which heads must be", cure="give another network")
    heads = ParallelHeads(path, count, layer.weight.shape, layer.bias is not None, padding)
    grid = process.grid(count)
    flow = RectifiedFlow().time_of(process.alpha(grid), process.sigma(grid))
    flow[-1] = 0  # the last step of a sampler ends in clean data
    heads.flow.copy_(flow)
    return AttachedDenoiser(denoiser, heads.to(layer.weight.device), alone=False)


@torch.no_grad()
def fused(denoiser: AttachedDenoiser, since: float = 1.0, r: float = 0.0) -> Denoiser:
    """The plain network that answers for one span alone: its heads' mean is added to a copy of the last layer (sec.
    3.5). Nothing is attached to it, and it costs what it cost before."""
    heads = denoiser.attachment
    assert isinstance(heads, ParallelHeads)
    d = heads.shares(heads.flow.new_tensor([since]), heads.flow.new_tensor([r]))[0]
    plain = copy.deepcopy(denoiser).base()
    layer: Any = plain.network.get_submodule(heads.paths[0])
    layer._forward_hooks.clear()
    layer.weight += torch.tensordot(d, heads.weight, 1)
    if heads.bias is not None:
        layer.bias += d @ heads.bias
    return plain
