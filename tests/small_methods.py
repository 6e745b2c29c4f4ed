"""What the tests of small methods of one student share: their networks and data, and that they train no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gaussians import moved, play
from stillroom.data.source import ArrayData
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
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


def check_that_it_trains_alone(method: Any, turn: str, folder: Path) -> None:
    """Finite terms, and a student that is the only one of its networks to move."""
    method.progress = 0.5
    terms = play(method, turn, batch(method.teacher.shape))
    assert all(torch.isfinite(term) for term in terms.values())
    assert moved(method) == {"student"}
    data = ArrayData(torch.randn(16, *method.teacher.shape), {"label": torch.arange(16) % 4})
    Trainer(method, data, EngineConfig(steps=2, batch=4, check_freezing=True), folder).fit()
