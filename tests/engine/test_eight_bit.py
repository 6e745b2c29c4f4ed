"""AdamW with moments of a byte each: near AdamW, a quarter of its state, resumed exactly, refused where it cannot."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.engine.config import EngineConfig
from stillroom.engine.eight_bit import adamw_8bit, first_states
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.method import Method, Optim, turn
from workers.toy import Points, fitted, weights


class Wide(Method):
    """Least squares in 128 dimensions."""

    slug = "wide"

    @dataclass
    class Options:
        pass

    def build(self) -> None:
        torch.manual_seed(0)
        self.student = nn.Linear(128, 128)
        self.register_buffer("goal", torch.randn(128, 128) / 11)

    @turn(trains="student", optim=Optim(lr=1e-3, weight_decay=0.01))
    def fit(self, batch: Any) -> dict[str, Tensor]:
        x = self.draw.normal(len(batch["x"]), 128)
        return {"mse": (self.student(x) - x @ self.goal).square().mean()}


def trained(name: str, folder: Path | None = None, resume: bool = False, stop: int = 0, **settings: Any) -> Trainer:
    method = Wide(Wide.Options())
    method.build()
    options = {"steps": 60, "batch": 16, "checkpoint_every": 7, "optim": {"all": {"name": name}}, **settings}
    run = Trainer(method, Points(), EngineConfig(**options), folder, resume, show=False)
    return fitted(run, stop)


def state_bytes(run: Trainer) -> int:
    (player,) = run.players.values()
    return sum(v.nbytes for state in player.optimizer.state.values() for v in state.values() if torch.is_tensor(v))


@pytest.fixture
def bitsandbytes() -> None:
    """Not among the test requirements: peft imports it wherever it is, which costs every command a second."""
    pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
def test_it_goes_where_adamw_goes_with_a_quarter_of_the_state() -> None:
    full, small = trained("adamw"), trained("adamw8bit")
    start = Wide(Wide.Options())
    start.build()
    before, there, here = (x.student.weight.detach() for x in (start, full.method, small.method))  # type: ignore[union-attr]
    moved, apart = there - before, there - here
    assert float(apart.norm() / moved.norm()) < 0.03
    assert state_bytes(small) < 0.35 * state_bytes(full)  # the bias and the quantisation's tables stay at full width
    foreseen = first_states(small.method.student.parameters())  # type: ignore[union-attr]
    assert state_bytes(small) == sum(v.nbytes for state in foreseen.values() for v in state.values())


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("step", [8, 30])
def test_a_resumed_run_is_the_straight_one(tmp_path: Path, step: int) -> None:
    straight = weights(trained("adamw8bit"))
    trained("adamw8bit", tmp_path, stop=step)
    resumed = weights(trained("adamw8bit", tmp_path, resume=True))
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def test_without_bitsandbytes_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"'adamw8bit' needs bitsandbytes; pip install 'stillroom\[eight-bit\]'"):
        trained("adamw8bit")


@pytest.mark.usefixtures("bitsandbytes")
def test_sharded_weights_are_refused() -> None:
    sharded = nn.Parameter(torch.zeros(4096))
    sharded.full_tensor = sharded.detach  # type: ignore[attr-defined]  # as FSDP2's have
    with pytest.raises(UserError, match=r"cannot step the sharded weights of engine.parallel=fsdp"):
        adamw_8bit([{"params": [sharded]}])
