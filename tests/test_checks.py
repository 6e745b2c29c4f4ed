"""A training step does not wait for its own values: what it looks at, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gaussians import KINDS, PROCESSES
from stillroom.checks import all_hold, require, settled, waiting
from stillroom.data.source import ArrayData
from stillroom.diffusion.denoiser import Denoiser, Prediction
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.method import get_method
from stillroom.networks.point_mlp import PointMLP

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
"""Operations whose answer the host has to wait for."""


class Looks(TorchDispatchMode):
    """Counts them, while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and func.overloadpacket.__name__ in LOOKS:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Points(ArrayData):
    """Rows that are taken on the host, before the step."""

    looks: Looks | None = None

    def batch(self, *args: Any) -> dict[str, Any]:
        if self.looks is not None:
            self.looks.on = False
        found = super().batch(*args)
        if self.looks is not None:
            self.looks.on = True
        return found


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Looks]:
    looks = Looks()
    for name in ("tolist", "cpu", "numpy"):
        plain = getattr(Tensor, name)

        def asked(self: Tensor, *args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            if looks.on:
                looks.seen.append(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, asked)
    index = Draws.index

    def drawn(self: Draws, high: int) -> int:
        """On the host, whatever the device."""
        looks.on = False
        try:
            return index(self, high)
        finally:
            looks.on = True

    monkeypatch.setattr(Draws, "index", drawn)
    with looks:
        yield looks


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("dmd2", {"critic_turns": 1, "guidance": 1.5, "gan_weight": 0.1}),
        ("swiftbrush", {"fake": "full", "guidance": 2.0}),
        ("snoopi", {"fake": "full"}),
        ("sim", {"guidance": 2.0}),
        ("sid-lsg", {"gan_weight": 0.1, "guidance": "zero-cfg"}),
        ("uni-instruct", {"gan_weight": 0.1}),
    ],
)
def test_a_step_looks_at_its_values_once(
    slug: str, options: dict[str, Any], process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terms of its losses, all together, when it is over."""
    cls = get_method(slug)
    method: Any = cls(cls.Options(**options))
    torch.manual_seed(0)
    network = PointMLP(2, 8, 2, 4)
    method.build(Denoiser(network, PROCESSES[process], KINDS[process], null={"label": 4}, shape=(2,)))  # type: ignore[arg-type]
    data = Points(torch.randn(16, 2), {"label": torch.arange(16) % 4})
    config = EngineConfig(steps=50, batch=4, device="cpu", log_every=100, optim={"all": {"clip_norm": 1.0}})
    run = Trainer(method, data, config, show=False)
    monkeypatch.setattr(run, "_save", lambda: None)
    run.progress = type("Quiet", (), {"update": lambda *_: None})()  # type: ignore[assignment]
    run._began = 0.0
    for _ in range(2):
        run._one_step()
    with counted(monkeypatch) as looks:
        data.looks = looks
        for _ in range(3):
            run._one_step()
    assert looks.seen == ["tolist"] * 3


def test_what_is_required_waits_inside_and_is_looked_at_once_outside() -> None:
    require(torch.tensor(True), ValueError("never"))
    with pytest.raises(ValueError, match="at once"):
        require(torch.tensor(False), ValueError("at once"))
    with waiting() as found:
        require(torch.tensor(True), ValueError("first"))
        require(torch.tensor(False), ValueError("second"))
    holds = all_hold(found)
    assert holds is not None
    assert not bool(holds)
    with pytest.raises(ValueError, match="second"):
        settled(found)
    assert all_hold([]) is None


def test_a_step_that_asks_for_what_is_undefined_says_so_when_it_is_done() -> None:
    process = PROCESSES["flow"]
    method: Any = get_method("sim")()
    method.build(Denoiser(PointMLP(2, 8, 2, 4), process, "x0", null={"label": 4}, shape=(2,)))
    plain = type(method).critic

    def critic(batch: Any) -> Any:
        Prediction(process, "x0", batch["x"], batch["x"], torch.zeros(len(batch["x"]))).eps  # noqa: B018 - asked for
        return plain(method, batch)

    method.critic = critic
    data = ArrayData(torch.randn(16, 2), {"label": torch.arange(16) % 4})
    run = Trainer(method, data, EngineConfig(steps=2, batch=4, device="cpu"), show=False)
    with pytest.raises(ValueError, match="eps of an x0-prediction is undefined here"):
        run.fit()
