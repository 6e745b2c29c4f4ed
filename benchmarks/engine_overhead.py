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
from typing import Any

import torch
from common import Row, median, record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.bench.teach import Denoising, TeacherRecipe
from stillroom.diffusion.denoiser import Denoiser
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Data, Trainer
from stillroom.method import Method, get_method
from stillroom.networks.discriminators import DiscriminatorHead, middle_block

DECAY = 0.999
LIMITS = {64: 1.03, 4: 1.05}  # by batch
WARM_UP = 10
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


def ask(network: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return network(x, timestep=1000 * t, class_labels=labels, return_dict=False)[0]


def features(network: Any, depth: int, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The tokens after the first ``depth`` blocks, and nothing after them."""
    tokens = network.pos_embed(x)
    for block in network.transformer_blocks[:depth]:
        tokens = block(tokens, timestep=1000 * t, class_labels=labels)
    return tokens


def noised(x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t, eps = 0.02 + 0.96 * torch.rand(len(x0)), torch.randn_like(x0)
    s = t[:, None, None, None]
    return (1 - s) * x0 + s * eps, t, eps


def velocity_loss(network: nn.Module, x0: Tensor, labels: Tensor) -> Tensor:
    x_t, t, eps = noised(x0)
    v = (x_t - ask(network, x_t, t, labels)) / t[:, None, None, None]
    return (v - (eps - x0)).square().mean()


def denoising_by_hand(teacher: Denoiser, batch: int) -> Step:
    student = copy.deepcopy(teacher.network).train()
    worker, images = Worker(student, averaged=True), torch.rand(batch, *teacher.shape) * 2 - 1
    labels = torch.arange(batch) % 10

    def step() -> None:
        velocity_loss(student, images, labels).backward()
        worker.update()

    return step


def two_turns_by_hand(teacher: Denoiser, batch: int, gan: bool = False) -> Step:
    """DMD2, both players in every step, each of its passes its own."""
    real = copy.deepcopy(teacher.network).eval().requires_grad_(False)
    student, fake = copy.deepcopy(real).train(), copy.deepcopy(real).train()
    path = middle_block(real)
    depth = int(path.rsplit(".", 1)[-1]) + 1
    head = DiscriminatorHead(real.inner_dim) if gan else nn.Identity()  # type: ignore[arg-type]
    generator, critic = Worker(student, averaged=True), Worker(nn.ModuleList([fake, head]), averaged=False)
    labels, images = torch.arange(batch) % 10, torch.rand(batch, *teacher.shape) * 2 - 1

    def logits(x: Tensor) -> Tensor:
        x_t, t, _ = noised(x)
        return head(features(fake, depth, x_t, t, labels))

    def step() -> None:
        fake.requires_grad_(False)
        head.requires_grad_(False)
        x0 = ask(student, torch.randn(batch, *teacher.shape), torch.ones(batch), labels)
        with torch.no_grad():
            x_t, t, _ = noised(x0)
            on_real = ask(real, x_t, t, labels)
            push = (ask(fake, x_t, t, labels) - on_real) / (x0 - on_real).abs().mean((1, 2, 3), keepdim=True)
        loss = (push * x0).mean()
        if gan:
            loss = loss + 3e-3 * softplus(-logits(x0)).mean()
        loss.backward()
        generator.update()
        fake.requires_grad_(True)
        head.requires_grad_(True)
        x0 = x0.detach()
        loss = velocity_loss(fake, x0, labels)
        if gan:
            loss = loss + 1e-2 * (softplus(logits(x0)).mean() + softplus(-logits(images)).mean())
        loss.backward()
        critic.update()

    return step


def with_gan_by_hand(teacher: Denoiser, batch: int) -> Step:
    return two_turns_by_hand(teacher, batch, gan=True)


def denoising(teacher: Denoiser) -> Method:
    method = Denoising()
    method.build(copy.deepcopy(teacher))
    return method


def two_turns(teacher: Denoiser, gan: float = 0.0) -> Method:
    cls = get_method("dmd2")
    method = cls(cls.Options(critic_turns=1, gan_weight=gan))  # type: ignore[call-arg]
    method.build(copy.deepcopy(teacher))
    return method


def with_gan(teacher: Denoiser) -> Method:
    return two_turns(teacher, gan=3e-3)


def trainer(
    method: Method, data: Data, steps: int, folder: str, callback: Callable[[Trainer, int], None], batch: int
) -> Trainer:
    optim = {"lr": LR, "name": "adamw", "betas": [0.9, 0.999], "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP}
    config = EngineConfig(
        steps=steps, batch=batch, device="cpu", optim={"all": optim}, ema=[{"name": "ema", "decay": DECAY}]
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


def measure(
    name: str, make: Callable[[Denoiser], Method], by_hand: Callable[[Denoiser, int], Step], batch: int, pairs: int
) -> Row:
    teacher, data = TeacherRecipe.load("fashion").denoiser(), ClassImagesBench().train
    bare, engine, bare_cpu, engine_cpu = [], [], [], []
    step = by_hand(teacher, batch)
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
        whole = trainer(make(teacher), data, WARM_UP + pairs, folder, callback, batch)
        whole.fit()
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(make(teacher), data, 1, folder, lambda *_: None, batch)
        same = flops(one.fit) == flops(step)
    ratios = [e / b for e, b in zip(engine, bare)]
    return {
        "step": name,
        "batch": batch,
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
    kinds = {
        "denoising, one network": (denoising, denoising_by_hand),
        "dmd2 without GAN, three networks, two turns": (two_turns, two_turns_by_hand),
        "dmd2 with GAN, three networks and a head, two turns": (with_gan, with_gan_by_hand),
    }
    rows = [measure(name, *pair, batch, 60 if batch > 16 else 200) for name, pair in kinds.items() for batch in LIMITS]
    most = " and ".join(f"{limit}x at batch {batch}" for batch, limit in LIMITS.items())
    record(
        "Engine overhead",
        f"A full training step costs at most {most} the bare forward, backward, optimizer and EMA work of the same "
        "networks (fashion teacher's network; ratio = median over interleaved pairs, wall-clock).",
        "python benchmarks/engine_overhead.py",
        rows,
        all(row["ratio"] <= LIMITS[row["batch"]] for row in rows),
    )


if __name__ == "__main__":
    main()
