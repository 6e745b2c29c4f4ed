"""What the tests of small methods of one student share: their networks and data, and that they train no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gaussians import moved, play
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import VP
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.networks.point_mlp import PointMLP
from tiny_denoisers import dit_teacher, point_teacher

MADE = {"point": point_teacher, "dit": dit_teacher}


def made(kind: Any, name: str = "point", **options: Any) -> Any:
    """A method of this class, with a small teacher."""
    torch.manual_seed(0)
    method = kind(kind.Options(**options))
    method.build(MADE[name]().eval())
    return method


def batch(shape: tuple[int, ...], n: int = 8) -> dict[str, Any]:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    return {"x": x, "cond": {"label": torch.arange(n) % 4}}


def check_that_it_is_asked_no_later_than_its_teacher_knows(method: Any, turn: str) -> None:
    """``method``: with times at 1 and :func:`noisy_teacher`. What its network sees there still has the data that the
    teacher's last time has."""
    seen: list[Tensor] = []
    native, data = method.student.native, batch((2,))
    method.student.native = lambda x, t, cond: seen.append(x.detach()) or native(x, t, cond)  # type: ignore[func-returns-value]
    play(method, turn, {**data, "x": torch.full_like(data["x"], 1000.0)})
    process = method.teacher.process
    left = 1000 * float(process.alpha(torch.tensor(process.t_max)))
    assert float(seen[-1].mean()) == pytest.approx(left, rel=0.05)


def noisy_teacher() -> Denoiser:
    """Of a process that ends with some of its signal left."""
    torch.manual_seed(3)
    return Denoiser(PointMLP(2, 16, 3, 4), VP(), "eps", null={"label": 4}, shape=(2,)).eval()


def check_that_it_trains_alone(method: Any, turn: str, folder: Path) -> None:
    """Finite terms, and a student that is the only one of its networks to move."""
    method.progress = 0.5
    terms = play(method, turn, batch(method.teacher.shape))
    assert all(torch.isfinite(term) for term in terms.values())
    assert moved(method) == {"student"}
    data = ArrayData(torch.randn(16, *method.teacher.shape), {"label": torch.arange(16) % 4})
    Trainer(method, data, EngineConfig(steps=2, batch=4, check_freezing=True), folder).fit()


def check_that_it_also_draws_in(method: Any, *steps: int) -> None:
    """Beside its own number of steps the finished student draws in these, finite and named by them."""
    also = type(method).also(method.options, method.student.process)
    names = [f"{n} step{'s' if n > 1 else ''}" for n in steps]
    assert {name: sampler.nfe for name, sampler in also.items()} == dict(zip(names, steps, strict=True))
    assert method.sampler().nfe not in steps
    noise, cond = torch.randn(4, *method.student.shape), {"label": torch.arange(4)}
    for sampler in also.values():
        drawn = sampler.sample(method.student, noise, cond)
        assert drawn.shape == noise.shape
        assert torch.isfinite(drawn).all()
