"""A text-to-image student against its teachers, each at its best setting: obedience, time, size; and a picture.

    python benchmarks/text_to_image.py RUN_OR_DIR [--n 600] [--picture docs/images/scenes.png]

All models draw the same captions, batch by batch in turn, so that whatever else the machine does falls on all.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import ROOT, Row, median, record

from stillroom.bench.scenes.bench import ScenesBench
from stillroom.data.scenes.captions import CATEGORIES
from stillroom.evaluation.cost import macs
from stillroom.surgery.modules import parameter_count
from stillroom.task import load_model
from stillroom.tasks.text_images.model import EXAMPLES, TextImageGenerator

MODELS = ("scenes-sd3-large", "scenes-sd3")
BATCH, SINGLES, COLUMNS, SEED = 32, 25, 4, 0
SIZE, LATENCY, TIME, OBEYS, COLOURS = 0.5, 0.5, 0.25, 0.95, 0.75
"""The goals: shares of the larger teacher's parameters, latency at batch 1 and time of a batch, and of the better one's
SceneEval; the share of captions obeyed that give each of two digits a colour."""


def drawn(model: TextImageGenerator, texts: list[str], seed: int) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    images = model.sample(texts, seed=seed, batch=len(texts))
    return images, time.perf_counter() - began


def picture(models: dict[str, TextImageGenerator], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    captions = list(EXAMPLES.values())
    size = (2.2 + 0.62 * COLUMNS * len(models), 0.7 * len(captions) + 0.5)
    figure, axes = plt.subplots(1, len(models), figsize=size, layout="constrained")
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        images = model.rows(captions, COLUMNS, SEED).images
        cells = torch.nn.functional.pad((images + 1) / 2, (0, 2, 0, 2), value=1.0)  # [rows, columns, 3, 34, 34]
        sheet = cells.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        axis.imshow(sheet.clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_title(f"{name}\n{model.sampler.nfe} network evaluations", fontsize=9)
        axis.set_xticks([])
        middles = [34 * row + 16 for row in range(len(captions))]
        axis.set_yticks(middles, captions if axis is axes[0] else [""] * len(captions), fontsize=9)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student", help="a run, or the folder of a student")
    parser.add_argument("--n", type=int, default=600, help="captions that SceneEval is taken over")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "scenes.png")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    models = {Path(name).name: load_model(name) for name in (*MODELS, chosen.student)}
    bench = ScenesBench()
    called = {score.key: score for score in bench.called(chosen.n)}
    captions = bench.captions(chosen.n)
    texts = [caption.text for caption in captions]
    images: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    batches: dict[str, list[float]] = {name: [] for name in models}
    singles: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        drawn(model, texts[:BATCH], SEED)  # warm-up
    for start in range(0, chosen.n, BATCH):
        for name, model in models.items():
            part, seconds = drawn(model, texts[start : start + BATCH], SEED + start)
            images[name].append(part)
            if len(part) == BATCH:
                batches[name].append(seconds / BATCH)
    for i in range(SINGLES):
        for name, model in models.items():
            singles[name].append(drawn(model, texts[i : i + 1], i)[1])
    rows: list[Row] = []
    for name, model in models.items():
        scores = bench.judge(torch.cat(images[name]), captions)
        row: Row = {"model": name, "parameters": parameter_count(getattr(model.network, "network", model.network))}
        row["NFE"] = model.sampler.nfe
        row["MACs per image, M"] = macs(lambda model=model: model.sample(texts[:1])) / 1e6
        row[f"images/s, batch {BATCH}"] = 1 / median(batches[name])
        row["latency, batch 1, ms"] = 1000 * median(singles[name])
        row |= {called[key].name: scores[key] for key in ("sceneeval", "fd")}
        row |= {category: scores[f"sceneeval_{category}"] for category in CATEGORIES}
        rows.append(row)
    *teachers, student = rows
    larger = max(teachers, key=lambda row: row["parameters"])

    sceneeval, fd = called["sceneeval"].name, called["fd"].name
    reached = {
        "parameters": student["parameters"] <= SIZE * larger["parameters"],
        "latency": student["latency, batch 1, ms"] <= LATENCY * larger["latency, batch 1, ms"],
        "time of a batch": TIME * student[f"images/s, batch {BATCH}"] >= larger[f"images/s, batch {BATCH}"],
        "SceneEval": student[sceneeval] >= OBEYS * max(row[sceneeval] for row in teachers),
        "which of two digits has which colour": student["attribution"] >= COLOURS,
        "Fréchet distance": student[fd] <= min(row[fd] for row in teachers),
    }
    missed = [goal for goal, met in reached.items() if not met]
    record(
        "Text to image",
        f"The student that LightGen makes has at most {SIZE:g} of the larger teacher's parameters, takes at most "
        f"{LATENCY:g} of its time for one picture and {TIME:g} in batches of {BATCH}, reaches {OBEYS:g} of the better "
        f"teacher's SceneEval and {COLOURS:g} where two digits have a colour each, at a Fréchet distance no worse than "
        "the teachers'; each model at its best setting, all in one run. "
        + (f"Missed: {', '.join(missed)}." if missed else "All of it was reached."),
        f"python benchmarks/text_to_image.py {chosen.student}",
        rows,
        not missed,
    )
    picture(models, chosen.picture)


if __name__ == "__main__":
    main()
