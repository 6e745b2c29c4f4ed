"""What would fail on an accelerator: methods' turns where networks and batches lie on a device of their own, which
refuses tensors that were left on the CPU. No accelerator is needed: the tensors are fake, the device is ``meta``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from given import maker
from stillroom.diffusion.process import VP
from stillroom.engine.config import EngineConfig
from stillroom.engine.distributed import World
from stillroom.engine.rehearsal import PlacedDraws, Rehearsal
from stillroom.method import Batch, Method, Terms, get_method, turn
from stillroom.surgery.skeleton import emptied, weights_unread
from test_planning import POINTS, WORLDS, Regression, images
from tiny_denoisers import dit_teacher

DEVICE = torch.device("meta")


class Placed(PlacedDraws):
    """Draws that lie on the device."""

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*shape).to(DEVICE)

    uniform = normal


class Elsewhere(Rehearsal):
    """A rehearsal whose networks and batches are on the device."""

    def _prepare_method(self) -> None:
        self.world = World(device=DEVICE)
        super()._prepare_method()

    def seed(self, m: Method, step: int, turn: int, micro: int) -> None:
        super().seed(m, step, turn, micro)
        m.draw.__class__ = Placed

    def _faked(self, batch: Any) -> Any:
        return self.to_device(super()._faked(batch))


def rehearse(method: Callable[[], Method], data: Any, monkeypatch: pytest.MonkeyPatch, **engine: Any) -> None:
    with weights_unread() as mode:
        made = emptied(method(), mode)
        generator = torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
        monkeypatch.setattr(torch, "autocast", lambda *settings, **more: nullcontext())
        fused = sys.modules[torch.optim.Optimizer.__module__]
        monkeypatch.setattr(fused, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
        assert isinstance(made, Method)
        Elsewhere(
            made, data, EngineConfig(steps=8, batch=4, optim={"all": {"name": "adamw"}}, **engine), 1, mode
        ).turn_costs()


@pytest.mark.parametrize("slug", WORLDS)
def test_a_turn_mixes_no_devices(tmp_path: Path, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, data, options = WORLDS[slug]
    make = maker(slug, options, networks(tmp_path))
    rehearse(make, data(), monkeypatch)


def vp(few: bool) -> Callable[[], Method]:
    """DMD2 in several steps under DDPM's process: its tables lie on the CPU."""

    def make() -> Method:
        denoiser = dit_teacher()
        denoiser.process, denoiser.prediction, denoiser.null = VP(), "eps", {"label": 3}
        cls = get_method("dmd2") if few else get_method("swiftbrush")
        wanted = {"student_steps": 3, "guidance": 2.0} if few else {"rank": 2}
        method = cls(cls.Options(**wanted))
        method.build(denoiser)
        return method

    return make


@pytest.mark.parametrize("few", [True, False])
def test_schedules_of_ddpm_mix_no_devices(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse(vp(few), images(), monkeypatch)


def test_what_is_left_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Regression):
        @turn(trains="student")
        def fit(self, batch: Batch) -> Terms:
            return {"error": (self.student(batch["x"]) - torch.ones(3)).square().mean()}

    def make() -> Method:
        method = Forgetful()
        method.build()
        return method

    with pytest.raises(RuntimeError, match="device"):
        rehearse(make, POINTS, monkeypatch)
