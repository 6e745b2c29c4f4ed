"""What tests of score distillation share: methods some way into their training on points in the plane, networks that
say one thing, and a step of all turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gaussians import play
from stillroom.diffusion.denoiser import Cond, Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.method import Batch, Method, get_method
from stillroom.networks.point_mlp import PointMLP

FLOW = RectifiedFlow()
B = 16
NULL = 8
# Every optional part on, so that there is a number behind each option.
FULL: dict[str, dict[str, Any]] = {
    "dmd2": {"student_steps": 3, "gan_weight": 0.5, "critic_gan_weight": 0.5},
    "decoupled-dmd": {
        "student_steps": 3, "gan_weight": 0.5, "critic_gan_weight": 0.5, "mean": 0.1, "variance": 0.9,
    },
    "swiftbrush": {"rank": 4, "lora_alpha": 8.0},
    "snoopi": {"rank": 4, "lora_alpha": 8.0},
    "sim": {},
    "sid-lsg": {"student_steps": 3, "gan_weight": 0.1, "guidance": "lsg"},
    "uni-instruct": {"gan_weight": 0.1},
}  # fmt: skip


def teacher() -> Denoiser:
    torch.manual_seed(1)
    return Denoiser(PointMLP(2, 16, 3, NULL), FLOW, "v", null={"label": NULL}, shape=(2,))


def build(slug: str, lora: dict[str, Any] | None = None, **options: Any) -> Any:
    """A method some way into its training: no two of its networks say the same. In its last stage."""
    cls = get_method(slug)
    method = cls(cls.Options(**options), lora)
    method.build(teacher())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for role in ("student", "fake"):
            for p in method.trained_parameters(role).values():
                p += 0.1 * torch.randn(p.shape, generator=generator)
    method.stage = method.stages()[-1]
    return method


def batch(n: int = B) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(n, 2, generator=generator), "cond": {"label": torch.arange(n) % NULL}}


class Rows:
    """Data for the engine: always the same rows."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> Batch:
        return {k: v[rows] if isinstance(v, Tensor) else {"label": v["label"][rows]} for k, v in batch(size).items()}


def names(method: Method) -> list[str]:
    return [turn.name for turn in method.turns()]


def play_step(method: Method, seed: int = 0) -> dict[str, Tensor]:
    """All turns of one step in order, as ``turn/term``, with the gradients' size under ``turn``."""
    method.shared, found = {}, {}
    for name in names(method):
        for term, value in play(method, name, batch(), seed).items():
            found[f"{name}/{term}"] = value.detach()
        gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
        found[name] = torch.cat(gradients).norm()
    return found


class Says(nn.Module):
    """A network that answers with a constant point plus ``slope`` per label, whatever it is asked."""

    def __init__(self, point: tuple[float, float], slope: float = 0.0) -> None:
        super().__init__()
        self.point, self.slope = nn.Parameter(torch.tensor(point)), slope

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        label = cond["label"][:, None] if "label" in cond else 0
        return self.point.expand_as(x) + self.slope * label


def says(*point: float, slope: float = 0.0) -> Denoiser:
    return Denoiser(Says((point[0], point[1]), slope), FLOW, "x0", null={"label": NULL}, shape=(2,))


X0 = ((1.0, 3.0), (-1.0, 1.0))


def two_points() -> tuple[Tensor, dict[str, Any]]:
    """The two generated points of the hand-worked examples."""
    x0 = torch.tensor(X0, requires_grad=True)
    return x0, {"x": torch.zeros(2, 2), "cond": {"label": torch.tensor([7, 6])}}


def labels_seen(method: Any, name: str, seeds: range) -> list[Tensor]:
    """The labels that the fake score is asked for, one tensor per played turn."""
    seen: list[Tensor] = []
    hook = method.fake.register_forward_pre_hook(lambda _, args: seen.append(args[2]["label"]))
    for seed in seeds:
        method.shared = {"x0": torch.zeros(B, 2)}
        play(method, name, batch(), seed)
    hook.remove()
    return seen
