"""A whole step of the engine against the same forward, backward, optimizer and EMA work written by hand.

    python benchmarks/engine_overhead.py

Both sides train the bench's own network at its own batch, on the same weights and sizes. After every step of the engine
one step by hand is timed, so that whatever else the machine does falls on both. The engine's step holds everything that
a run does: data, draws, checks for divergence, progress, ``metrics.jsonl``.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Row, median, record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.bench.teach import Denoising, TeacherRecipe
from stillroom.diffusion.denoiser import Denoiser
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Data, Trainer
from stillroom.method import Method, get_method

BATCH, DECAY, LIMIT = 64, 0.999, 1.05
WARM_UP = 10
LABELS = torch.arange(BATCH) % 10
LR, CLIP, WEIGHT_DECAY = 1e-4, 2.0, 0.01

Step = Callable[[], None]


class Worker:
    """A network with its optimizer, by hand."""

    def __init__(self, network: nn.Module, averaged: bool) -> None:
        self.parameters = list(network.requires_grad_(True).parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, LR, weight_decay=WEIGHT_DECAY, fused=True)
        self.average = [p.detach().clone() for p in self.parameters] if averaged else []

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - DECAY)


def ask(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return network(x, timestep=1000 * t, class_labels=LABELS, return_dict=False)[0]


def noised(x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t, eps = 0.02 + 0.96 * torch.rand(BATCH), torch.randn_like(x0)
    s = t[:, None, None, None]
    return (1 - s) * x0 + s * eps, t, eps


def velocity_loss(network: nn.Module, x0: Tensor) -> Tensor:
    x_t, t, eps = noised(x0)
    v = (x_t - ask(network, x_t, t)) / t[:, None, None, None]
    return (v - (eps - x0)).square().mean()


def denoising_by_hand(teacher: Denoiser) -> Step:
    student = copy.deepcopy(teacher.network).train()
    worker, images = Worker(student, averaged=True), torch.rand(BATCH, *teacher.shape) * 2 - 1

    def step() -> None:
        velocity_loss(student, images).backward()
        worker.update()

    return step


def two_turns_by_hand(teacher: Denoiser) -> Step:
    """DMD2 without its GAN, both players in every step."""
    real = copy.deepcopy(teacher.network).eval().requires_grad_(False)
    student, fake = copy.deepcopy(real).train(), copy.deepcopy(real).train()
    generator, critic = Worker(student, averaged=True), Worker(fake, averaged=False)

    def step() -> None:
        x0 = ask(student, torch.randn(BATCH, *teacher.shape), torch.ones(BATCH))
        with torch.no_grad():
            x_t, t, _ = noised(x0)
            on_real = ask(real, x_t, t)
            push = (ask(fake, x_t, t) - on_real) / (x0 - on_real).abs().mean((1, 2, 3), keepdim=True)
        (push * x0).mean().backward()
        generator.update()
        velocity_loss(fake, x0.detach()).backward()
        critic.update()

    return step


def denoising(teacher: Denoiser) -> Method:
    method = Denoising()
    method.build(copy.deepcopy(teacher))
    return method


def two_turns(teacher: Denoiser) -> Method:
    cls = get_method("dmd2")
    method = cls(cls.Options(critic_turns=1, gan_weight=0.0))  # type: ignore[call-arg]
    method.build(copy.deepcopy(teacher))
    return method


def trainer(method: Method, data: Data, steps: int, folder: str, callback: Callable[[Trainer, int], None]) -> Trainer:
    optim = {"lr": LR, "name": "adamw", "betas": [0.9, 0.999], "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP}
    config = EngineConfig(
        steps=steps, batch=BATCH, device="cpu", optim={"all": optim}, ema=[{"name": "ema", "decay": DECAY}]
    )
    return Trainer(method, data, config, Path(folder), callbacks=[callback], show=False)


def flops(function: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def clocks() -> tuple[float, float]:
    """Wall-clock and CPU seconds; the second does not see what else the machine does."""
    return time.perf_counter(), time.process_time()


def interval(values: list[float]) -> str:
    """The 95% interval of the median, by order statistics."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low, high = (round(len(values) / 2 + side * half) for side in (-1, 1))
    return f"{ordered[max(low - 1, 0)]:.3f} to {ordered[min(high, len(values) - 1)]:.3f}"


def measure(name: str, make: Callable[[Denoiser], Method], by_hand: Callable[[Denoiser], Step], pairs: int) -> Row:
    teacher, data = TeacherRecipe.load("fashion").denoiser(), ClassImagesBench().train
    bare, engine, bare_cpu, engine_cpu = [], [], [], []
    step = by_hand(teacher)
    last = clocks()

    def callback(_: Trainer, done: int) -> None:
        nonlocal last
        ended = clocks()
        step()
        now = clocks()
        if done > WARM_UP:
            engine.append(ended[0] - last[0])
            engine_cpu.append(ended[1] - last[1])
            bare.append(now[0] - ended[0])
            bare_cpu.append(now[1] - ended[1])
        last = clocks()

    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(make(teacher), data, WARM_UP + pairs, folder, callback)
        whole.fit()
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(make(teacher), data, 1, folder, lambda *_: None)
        same = flops(one.fit) == flops(step)
    ratios = [e / b for e, b in zip(engine, bare)]
    return {
        "step": name,
        "steps timed": pairs,
        "by hand, ms": 1000 * median(bare),
        "engine, ms": 1000 * median(engine),
        "ratio": median(ratios),
        "95% interval": interval(ratios),
        "ratio of means": sum(engine) / sum(bare),
        "ratio of CPU time": median(e / b for e, b in zip(engine_cpu, bare_cpu)),
        "same matrix products": "yes" if same else "no",
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        measure("denoising, one network", denoising, denoising_by_hand, 150),
        measure("dmd2 without GAN, three networks, two turns", two_turns, two_turns_by_hand, 150),
    ]
    record(
        "Engine overhead",
        f"A full training step costs at most {LIMIT}x the bare forward, backward, optimizer and EMA work of the same "
        f"networks (fashion teacher's network, batch {BATCH}; ratio = median over interleaved pairs, wall-clock).",
        "python benchmarks/engine_overhead.py",
        rows,
        all(row["ratio"] <= LIMIT for row in rows),
    )


if __name__ == "__main__":
    main()
