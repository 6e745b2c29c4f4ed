"""How soon a run has taken its first step, from the start of its process, against a loop written by hand.

    python benchmarks/first_step.py [--repeats N]

Three kinds of process in turns: `run` as it is; the same without the trial of a run's end, which goes before the first
step; and a script of torch and diffusers alone that reads the same weights and pictures from files and takes the same
step (DMD2 without GAN, both players). All of them import, load, build and step, and leave after that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Row, median, record

from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.bench.teach import TeacherRecipe

LIMIT = 1.05
"""Of `run` against itself without the trial."""
BATCH = 32

LEAVE = """
import json, os, sys, time
def leave(*_):
    print(json.dumps([time.time(), time.process_time()]), flush=True)
    os._exit(0)
"""
RUN = (
    LEAVE
    + f"""
import stillroom.run
from stillroom.engine.trainer import Trainer
from stillroom.recipe import Recipe
if sys.argv[2] == "without":
    stillroom.run._can_be_tried = lambda trainer: False
fit = Trainer.fit
def first(trainer):
    trainer.callbacks.append(leave)
    fit(trainer)
Trainer.fit = first
changes = ["options.gan_weight=0", "options.critic_turns=1", "engine.device=cpu", "engine.batch={BATCH}"]
stillroom.run.run(Recipe.load("dmd2", changes), sys.argv[1] + "/run")
"""
)
BY_HAND = (
    LEAVE
    + f"""
import copy
import numpy as np, torch
from diffusers import DiTTransformer2DModel
torch.set_num_threads(1)
images = torch.from_numpy(np.load(sys.argv[1] + "/images.npy"))
labels = torch.from_numpy(np.load(sys.argv[1] + "/labels.npy"))
real = DiTTransformer2DModel.from_pretrained(sys.argv[1] + "/network").eval().requires_grad_(False)
student, fake = (copy.deepcopy(real).train().requires_grad_(True) for _ in range(2))
average = [p.detach().clone() for p in student.parameters()]
steppers = [torch.optim.AdamW(network.parameters(), 1e-4, fused=True) for network in (student, fake)]
cond = labels[torch.randint(len(labels), ({BATCH},))]
def ask(network, x, t):
    return network(x, timestep=1000 * t, class_labels=cond, return_dict=False)[0]
def noised(x0):
    t, eps = 0.02 + 0.96 * torch.rand(len(x0)), torch.randn_like(x0)
    s = t[:, None, None, None]
    return (1 - s) * x0 + s * eps, t, eps
def update(network, stepper):
    torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
    stepper.step()
    stepper.zero_grad(set_to_none=True)
fake.requires_grad_(False)
x0 = ask(student, torch.randn({BATCH}, *images.shape[1:]), torch.ones({BATCH}))
with torch.no_grad():
    x_t, t, _ = noised(x0)
    said = ask(real, x_t, t)
    push = (ask(fake, x_t, t) - said) / (x0 - said).abs().mean((1, 2, 3), keepdim=True)
(push * x0).mean().backward()
update(student, steppers[0])
fake.requires_grad_(True)
x0 = x0.detach()
x_t, t, eps = noised(x0)
((x_t - ask(fake, x_t, t)) / t[:, None, None, None] - (eps - x0)).square().mean().backward()
update(fake, steppers[1])
torch._foreach_lerp_(average, [p.detach() for p in student.parameters()], 0.001)
leave()
"""
)
KINDS = {"run": (RUN, "as it is"), "run without the trial": (RUN, "without"), "by hand": (BY_HAND, "")}


def seconds(program: str, folder: str, how: str) -> tuple[float, float]:
    """Of the wall and of the CPU, from the start of a process to the end of its first step."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for file in ("images.npy", "labels.npy", "network"):
            os.symlink(Path(folder) / file, Path(place) / file)
        began = time.time()
        done = subprocess.run([sys.executable, "-c", program, place, how], capture_output=True, text=True, check=True)
    ended, cpu = json.loads(done.stdout.splitlines()[-1])
    return ended - began, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    data = ClassImagesBench().train
    batch = data.batch(0, 0, 4096, slice(0, 4096))
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/images.npy", batch["x"].numpy())
        np.save(f"{folder}/labels.npy", batch["cond"]["label"].numpy())
        TeacherRecipe.load("fashion").denoiser().network.save_pretrained(f"{folder}/network")
        taken = {name: [] for name in KINDS}
        for turn in range(repeats + 1):  # the first of each reads files that the system has not seen yet
            for name, (program, how) in KINDS.items():
                found = seconds(program, folder, how)
                if turn:
                    taken[name].append(found)
    rows: list[Row] = []
    for name, times in taken.items():
        walls, cpus = zip(*times, strict=True)
        rows.append({"process": name, "repeats": repeats, "wall, s": median(walls), "CPU, s": median(cpus)})
        for other in list(KINDS)[1:]:
            pairs = zip(times, taken[other], strict=True)
            rows[-1][f"CPU against {other}"] = median(mine[1] / theirs[1] for mine, theirs in pairs)
    record(
        "First step",
        f"`run` has taken its first step no later than it would without the trial of its end (limit {LIMIT}x, CPU "
        "seconds from the start of the process, median of pairs); beside a script by hand that imports torch and "
        f"diffusers alone and takes the same step (DMD2 without GAN on the fashion bench, batch {BATCH}).",
        "python benchmarks/first_step.py",
        rows,
        rows[0][f"CPU against {list(KINDS)[1]}"] <= LIMIT,
    )


if __name__ == "__main__":
    main()
