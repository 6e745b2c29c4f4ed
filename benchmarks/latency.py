"""The teacher's own many-step sampler against a one-step student: time, evaluations, multiply-accumulates, parameters.

    python benchmarks/latency.py [--student RUN_OR_STUDENT_DIR]

Without a student, the teacher's network asked once stands in for it: a student is a copy of that network, so it costs
the same. The sides take turns, call by call, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import Row, median, record

from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.diffusion.sampling import FewStepSampler, sampler_from_dict
from stillroom.evaluation.cost import macs
from stillroom.parsing import read_json
from stillroom.pictures import load_generator
from stillroom.surgery.modules import parameter_count
from stillroom.surgery.tabulated import tabulate
from stillroom.tasks.class_images.model import ImageGenerator

RUNS = {1: 31, 32: 11}
LIMIT = 20.0


def tabulated(model: Any) -> ImageGenerator:
    """The model, its conditioning as tables."""
    return ImageGenerator(tabulate(model.denoiser, model.sampler), model.sampler, model.classes)


def is_best(teacher: Path, sampler: dict[str, Any]) -> bool:
    """Whether the teacher's card names its stored sampler the best of those scored; without a card nobody knows."""
    card = teacher / "card.json"
    return card.exists() and sampler_from_dict(read_json(card)["best"]["sampler"]) == sampler_from_dict(sampler)


def seconds(model: Any, labels: list[int]) -> float:
    began = time.perf_counter()
    model.sample(labels)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", type=Path, help="a run folder or a student folder")
    chosen: Path | None = parser.parse_args().student
    torch.set_num_threads(1)
    home = ClassImagesBench().teacher_dir
    teacher: Any = load_generator(home)
    if chosen:
        student, name = load_generator(chosen), f"student {chosen.name}"
    else:
        student = ImageGenerator(teacher.denoiser, FewStepSampler((0.8,)), teacher.classes)
        name = "one step of the same network"
    settings = teacher.sampler.to_dict()
    many = f"teacher, {settings['name']} {settings.get('solver', '')} {settings.get('steps', '')}".rstrip()
    many += f" steps, guidance {settings.get('guidance', 1.0):g}"
    served = f"{name}, conditioning tabulated"
    everyone = {many: teacher, f"{many}, conditioning tabulated": tabulated(teacher), name: student}
    everyone[served] = tabulated(student)
    medians: dict[str, dict[int, float]] = {label: {} for label in everyone}
    for batch, runs in RUNS.items():
        labels = [i % 10 for i in range(batch)]
        for model in everyone.values():  # warm-up
            model.sample(labels)
        rounds = [[seconds(model, labels) for model in everyone.values()] for _ in range(runs)]
        for label, side in zip(everyone, zip(*rounds), strict=True):
            medians[label][batch] = 1000 * median(side)
    ratios = {label: {batch: medians[many][batch] / found[batch] for batch in RUNS} for label, found in medians.items()}
    rows: list[Row] = []
    for label, model in everyone.items():
        row: Row = {"sampler": label, "NFE": model.sampler.nfe}
        row["MACs per image, M"] = macs(lambda model=model: model.sample([0])) / 1e6
        row["parameters"] = parameter_count(model.denoiser.network)
        for batch in RUNS:
            row[f"latency, batch {batch}, ms"] = medians[label][batch]
            row[f"speed-up, batch {batch}"] = ratios[label][batch]
        rows.append(row)
    best = is_best(home, settings)
    against = "best many-step sampler" if best else "stored sampler, not yet scored as its best (so no verdict)"
    record(
        "Latency",
        f"A one-step student, its conditioning tabulated (it is asked at one time only), answers at least {LIMIT:g}x "
        f"faster than the teacher's {against}, at batch 1 and at batch 32 (medians of {RUNS[1]} and {RUNS[32]} "
        "interleaved calls). The teacher with tables of its own is given beside it.",
        "python benchmarks/latency.py" + (f" --student {chosen}" if chosen else ""),
        rows,
        all(ratio >= LIMIT for ratio in ratios[served].values()) if best else None,
    )


if __name__ == "__main__":
    main()
