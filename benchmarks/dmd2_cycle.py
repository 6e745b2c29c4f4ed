"""DMD2's cycle of updates (one of the student, five of the critics) beside that of FastGen, on the same networks.

    python benchmarks/dmd2_cycle.py

The peer is written here as a bare loop in plain torch, after ``fastgen/methods/distribution_matching/dmd2.py`` and the
trainer, gradient-clipping and EMA callbacks of github.com/NVlabs/FastGen at commit 34f30e8, with none of their logging,
profiling or data loading, so it is the fastest that FastGen can be. What it does in an iteration, in order:

- which networks ask for gradients is set anew; a fresh input noise for the student, one noise and one time for all;
- the student's iteration (1 of 6 here; ``student_update_freq`` counts both kinds): the student's sample, noised; the
  fake score's answer without gradient; the teacher's answer with the graph through the sample, of which one block is
  tapped for the discriminator; the teacher once more without a condition, for guidance; half the mean squared
  distance to the sample moved by the normalised difference, plus the weighted GAN loss;
- any other: a sample of its own without gradient, noised; the fake score's denoising loss; the frozen teacher's
  features of that very noisy sample and of real data under noise of their own, both passes ended at the tapped block
  and without gradient; the discriminator's loss on them, which trains the head alone;
- gradients are clipped, network by network; AdamW, not fused (``fused=False`` is the default of its configs); the EMA
  of the student is moved in every iteration, weight by weight.

To redo the comparison with FastGen's own code: give its ``DMD2Model`` a network class around the bench's DiT (forward
with ``feature_indices`` and ``return_features_early``), ``student_update_freq`` 6, ``guidance_scale`` 1.5, the batch
below, and time ``Trainer.train_step`` of six iterations after ten warm-up ones, callbacks reduced to the two above.

Cycles are taken in turns in one process, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from common import Row, median, record
from engine_overhead import (
    CLIP,
    DECAY,
    LR,
    WEIGHT_DECAY,
    Step,
    ask,
    clocks,
    features,
    flops,
    interval,
    noised,
    trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.bench.teach import TeacherRecipe
from stillroom.diffusion.denoiser import Denoiser
from stillroom.engine.trainer import Trainer
from stillroom.method import Method, get_method
from stillroom.networks.discriminators import DiscriminatorHead, middle_block

BATCH, CRITICS, GUIDANCE, GAN = 64, 5, 1.5, 3e-3
WARM_UP, CYCLES = 2, 15
LIKE_THE_PEER = {"gan_network": "teacher", "gan_pass": "shared"}
ARMS: dict[str, tuple[dict[str, Any], float]] = {  # options, and the rate that is wanted
    "FastGen's algorithm: the teacher's features": (LIKE_THE_PEER, 1.05),
    "the paper's, every pass its own": ({}, 0.85),
    "the paper's networks, generated samples judged in the scores' own pass": ({"gan_pass": "shared"}, 0.0),
}


class Trained:
    """A network with its optimizer, as the peer has them."""

    def __init__(self, network: nn.Module, fused: bool) -> None:
        self.network, self.parameters = network, list(network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, LR, weight_decay=WEIGHT_DECAY, fused=fused)

    def listens(self, on: bool) -> None:
        self.network.train(on).requires_grad_(on)

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peer(teacher: Denoiser, data: Any, fused: bool = False) -> Step:
    """One cycle of the peer: a student's iteration and five of the critics."""
    real = copy.deepcopy(teacher.network).eval().requires_grad_(False)
    student, fake = (Trained(copy.deepcopy(real), fused) for _ in range(2))
    student.listens(True)
    average = copy.deepcopy(real)
    head = Trained(DiscriminatorHead(real.inner_dim), fused)  # type: ignore[arg-type]
    depth = int(middle_block(real).rsplit(".", 1)[-1]) + 1
    labels = torch.arange(BATCH) % 10
    null = torch.full((BATCH,), int(teacher.null["label"]))
    images = data.batch(0, 0, BATCH)["x"]

    def sample() -> Tensor:
        noise = torch.randn(BATCH, *teacher.shape)
        return noise - ask(student.network, noise, torch.ones(BATCH), labels)

    def x0(network: nn.Module, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x_t - t[:, None, None, None] * ask(network, x_t, t, label)

    def iteration(of_student: bool) -> None:
        fake.listens(not of_student)
        head.listens(not of_student)
        if of_student:
            x = sample()
            x_t, t, _ = noised(x)
            with torch.no_grad():
                on_fake = x0(fake.network, x_t, t, labels)
            tapped: list[Tensor] = []
            tap = real.transformer_blocks[depth - 1].register_forward_hook(lambda *a: tapped.append(a[-1]))  # type: ignore[index]
            on_real = x0(real, x_t, t, labels)
            tap.remove()
            gan = F.softplus(-head.network(tapped[0])).mean()
            on_real = on_real.detach()
            with torch.no_grad():
                plain = x0(real, x_t, t, null)
                on_real = on_real + (GUIDANCE - 1) * (on_real - plain)
                weight = 1 / ((x - on_real).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
                target = x - (on_fake - on_real) * weight
            (0.5 * F.mse_loss(x, target) + GAN * gan).backward()
            student.update()
        else:
            with torch.no_grad():
                x = sample()
                x_t, t, eps = noised(x)
            loss = F.mse_loss(ask(fake.network, x_t, t, labels), eps - x)
            with torch.no_grad():
                on_fake = features(real, depth, x_t, t, labels)
                real_t, t_real, _ = noised(images)
                on_data = features(real, depth, real_t, t_real, labels)
            gan = F.softplus(-head.network(on_data)).mean() + F.softplus(head.network(on_fake)).mean()
            (loss + gan).backward()
            fake.update()
            head.update()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), student.parameters, strict=True):
                mine.copy_(DECAY * mine + (1 - DECAY) * theirs)

    def cycle() -> None:
        for number in range(1 + CRITICS):
            iteration(of_student=number == 0)

    return cycle


def ours(teacher: Denoiser, options: dict[str, Any]) -> Method:
    cls = get_method("dmd2")
    given = {"critic_turns": CRITICS, "gan_weight": GAN, "guidance": GUIDANCE, **options}
    method = cls(cls.Options(**given))
    method.build(copy.deepcopy(teacher))
    return method


def measure(name: str, options: dict[str, Any], wanted: float, fused: bool = False) -> Row:
    teacher, data = TeacherRecipe.load("fashion").denoiser(), ClassImagesBench().train
    other = peer(teacher, data, fused)
    mine, theirs = [], []
    last = clocks()

    def callback(_: Trainer, done: int) -> None:
        nonlocal last
        if done % CRITICS:
            return
        ended = clocks()
        other()
        now = clocks()
        if done > WARM_UP * CRITICS:
            mine.append(ended[0] - last[0])
            theirs.append(now[0] - ended[0])
        last = clocks()

    with tempfile.TemporaryDirectory() as folder:
        trainer(ours(teacher, options), data, (WARM_UP + CYCLES) * CRITICS, folder, callback, BATCH).fit()
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(ours(teacher, options), data, CRITICS, folder, lambda *_: None, BATCH)
        work = flops(one.fit), flops(other)
    rates = [t / m for m, t in zip(mine, theirs, strict=True)]
    return {
        "algorithm": name,
        "peer's optimizer": "fused" if fused else "as its configs have it",
        "cycles timed": CYCLES,
        "stillroom, ms a cycle": 1000 * median(mine),
        "FastGen's cycle, ms": 1000 * median(theirs),
        "stillroom, GFLOP": work[0] / 1e9,
        "FastGen's, GFLOP": work[1] / 1e9,
        "rate, times FastGen's": median(rates),
        "95% interval": interval(rates),
        "wanted": wanted or "-",
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(name, options, wanted) for name, (options, wanted) in ARMS.items()]
    rows.append(measure(next(iter(ARMS)), LIKE_THE_PEER, 0.0, fused=True))
    record(
        "DMD2 beside FastGen",
        f"One student and {CRITICS} critic updates of dmd2, by the same networks at batch {BATCH}, against the same of "
        "FastGen written as a bare loop: at its own algorithm at least 1.05 times its rate, at the paper's at least "
        ".85 times (fashion teacher's network, guidance 1.5; rate = median over interleaved cycles, wall-clock).",
        "python benchmarks/dmd2_cycle.py",
        rows,
        all(row["wanted"] == "-" or row["rate, times FastGen's"] >= row["wanted"] for row in rows),
    )


if __name__ == "__main__":
    main()
