"""A many-step sampler against the same steps by diffusers' own scheduler, written by hand.

    python benchmarks/sampling.py

Both ask the same network the same questions: Euler steps of the flow, with guidance, conditional and unconditional rows
in one batch. The network answers with x0, of which the hand makes the velocity that diffusers' scheduler wants. The
pictures must be the same to rounding. Calls are taken in turns, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import time

import torch
from common import Row, median, record
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stillroom.bench.teach import TeacherRecipe
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler

STEPS, GUIDANCE, PAIRS, WARM_UP, LIMIT, ROUNDING = 4, 1.5, 100, 5, 1.02, 1e-4


def by_hand(teacher: Denoiser, noise: Tensor, labels: Tensor) -> Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / STEPS for k in range(STEPS)])
    both, x = torch.cat([labels, torch.full_like(labels, int(teacher.null["label"]))]), noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        at = t.expand(2 * len(x))
        answer = teacher.network(torch.cat([x, x]), timestep=at, class_labels=both, return_dict=False)[0]
        conditional, unconditional = answer.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        x = scheduler.step((x - guided) / sigma, t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def measure(batch: int) -> Row:
    teacher = TeacherRecipe.load("fashion").denoiser().eval()
    sampler = ODESampler("euler", STEPS, GUIDANCE)
    labels, noise = torch.arange(batch) % 10, torch.randn(batch, *teacher.shape)
    ours, theirs, furthest = [], [], 0.0
    for _ in range(WARM_UP + PAIRS):
        times = [time.perf_counter()]
        mine = sampler.sample(teacher, noise, {"label": labels})
        times.append(time.perf_counter())
        other = by_hand(teacher, noise, labels)
        times.append(time.perf_counter())
        ours.append(times[1] - times[0])
        theirs.append(times[2] - times[1])
        furthest = max(furthest, float((mine - other).abs().max()))
    pairs = list(zip(ours, theirs, strict=True))[WARM_UP:]
    return {
        "batch": batch,
        "calls timed": PAIRS,
        "diffusers by hand, ms": 1000 * median(b for _, b in pairs),
        "stillroom, ms": 1000 * median(a for a, _ in pairs),
        "ratio": median(a / b for a, b in pairs),
        "largest difference": furthest,
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(batch) for batch in (1, 32)]
    record(
        "Sampling",
        f"{STEPS} guided Euler steps cost at most {LIMIT}x the same by diffusers' scheduler and network, by hand "
        "(fashion teacher; ratio = median over interleaved calls, wall-clock).",
        "python benchmarks/sampling.py",
        rows,
        all(row["ratio"] <= LIMIT and row["largest difference"] <= ROUNDING for row in rows),
    )


if __name__ == "__main__":
    main()
