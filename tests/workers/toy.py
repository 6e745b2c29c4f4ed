"""A two-turn method on a small transformer, and endless data for it: what the engine's tests train."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.method import Method, Optim, Parted, Terms, frozen, turn

TOKENS, WIDTH = 3, 6


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        # no biases: softmax is blind to that of the keys, so its gradient is rounding noise, which Adam amplifies
        self.attention = nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Dropout(dropout), nn.Linear(10, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Net(nn.Module):
    """``[B, TOKENS, WIDTH]`` to the same shape. Of the gain, a single number, one of two processes has no shard."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.run: Any = lambda block, x: block(x)

    def enable_gradient_checkpointing(self, function: Any) -> None:
        self.run = function

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        if self.training:
            self.calls += 1
        x = x + self.position
        for block in self.blocks:
            x = self.run(block, x)
        if adapter is not None:
            x = x + self.adapters[adapter](x)
        return self.out(x) * self.gain


class Role(nn.Module):
    """Wraps its network as a denoiser does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Adapted(Role):
    """A role that is a small layer of its own on a network that others use too, as LoRA roles are."""

    def __init__(self, base: Role, name: str) -> None:
        super().__init__(base.network)
        self.name = name
        adapters = getattr(base.network, "adapters", None)
        base.network.adapters = adapters if adapters is not None else nn.ModuleDict()
        base.network.adapters[name] = nn.Linear(WIDTH, WIDTH)

    def role_parameters(self) -> dict[str, nn.Parameter]:
        return {key: p for key, p in self.network.named_parameters() if f".{self.name}." in f".{key}"}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.name)


class Branched(Role):
    """A role whose layers do not all serve each step: one never, one in every second step of its turn, one only where a
    row begins above 1, which one process may see and another not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.never, self.second, self.large = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.turns = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        if self.turns % 2:
            y = y + self.second(y)
        rows = (x[:, 0, 0] > 1).nonzero().flatten()
        return y.index_add(0, rows, self.large(y[rows])) if len(rows) else y


class Toy(Method):
    """The critic learns what the student makes; the student follows teacher minus critic, and the data a little."""

    slug = "toy"

    @dataclass
    class Options:
        period: int = 2
        dropout: float = 0.0
        shared: bool = False  # one network for all roles, an adapter for each that trains
        branched: bool = False  # steps leave parameters unused
        parted: bool = False  # the critic has terms that wait for a pass of their own

    def build(self) -> None:
        torch.manual_seed(7)
        self.teacher = frozen(Role(Net()))
        if self.options.shared:
            self.student, self.critic = Adapted(self.teacher, "s"), Adapted(self.teacher, "c")
        else:
            role = Branched if self.options.branched else Role
            self.student, self.critic = role(Net(self.options.dropout)), role(Net())

    @turn(trains="student", every="period", optim=Optim(lr=1e-2))
    def generator(self, batch: Any) -> dict[str, Tensor]:
        self.student.turns = self.step // self.options.period
        x = self.student(self.draw.normal(*batch["x"].shape))
        self.shared["x"] = x.detach()
        self.note("std", x.std())
        noisy = x + 0.5 * self.draw.normal_like(x)
        return {
            "match": (self.teacher(noisy) - self.critic(noisy)).square().mean(),
            "data": 0.1 * (x - batch["x"]).square().mean(),
        }

    @turn(trains="critic", optim=Optim(lr=2e-2, clip_norm=0.5))
    def follow(self, batch: Any) -> Terms:
        x = self.shared.get("x")
        if x is None:
            with torch.no_grad():
                x = self.student(self.draw.normal(*batch["x"].shape))
        self.critic.turns = self.step
        noisy = x + 0.5 * self.draw.normal_like(x)
        answer = self.critic(noisy)
        terms = {"denoise": (answer - x).square().mean()}
        if not self.options.parted:
            return terms

        def squared(given: Tensor) -> Tensor:
            return 0.3 * self.critic(given).square().mean()

        return terms | {"small": Parted(0.1 * answer.abs().mean(), lambda: squared(x)), "own": lambda: squared(-x)}


class Points:
    """Random batches, a pure function of (seed, step)."""

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return {"x": torch.randn(size, TOKENS, WIDTH, generator=generator)[rows]}


SETTINGS: dict[str, Any] = {
    "steps": 12,
    "batch": 8,
    "seed": 3,
    "device": "cpu",
    "checkpoint_every": 4,
    "log_every": 5,
    "warmup": 3,
    "schedule": "cosine",
    "ema": [{"name": "ema", "of": "student", "half_life": 40.0, "ramp": 0.5}],
    "export": "ema",
    "check_freezing": True,
}


def trainer(
    run_dir: Any = None, resume: bool = False, options: dict[str, Any] | None = None, **settings: Any
) -> Trainer:
    method = Toy(Toy.Options(**(options or {})))
    method.build()
    return Trainer(method, Points(), EngineConfig(**{**SETTINGS, **settings}), run_dir, resume, show=False)


class Stop(Exception):
    """Raised by a callback, to leave a run as a crash would."""


def stop_after(step: int) -> Any:
    def callback(_: Trainer, done: int) -> None:
        if done == step:
            raise Stop

    return callback


def fitted(run: Trainer, stop: int = 0) -> Trainer:
    """The run after its training; with ``stop``, left after so many steps as a crash would leave it."""
    if not stop:
        run.fit()
        return run
    run.callbacks.append(stop_after(stop))
    with contextlib.suppress(Stop):
        run.fit()
        raise AssertionError(f"the run did not reach step {stop}")
    return run


def weights(trained: Trainer) -> dict[str, Tensor]:
    """Everything that the run changed, whole, and the exported network. Collective for a sharded method."""
    from stillroom.engine.distributed import full

    own = {name: full(tensor.detach()).clone() for name, tensor in trained.method.named_parameters()}
    return own | {f"export.{name}": tensor for name, tensor in trained.export_role().state_dict().items()}
