"""What the shipped text-to-image models get wrong where a caption asks for two digits, and where a masked generator
does: in the first cell that it draws, or in the next, which should know of the first.

    python benchmarks/mistakes.py [MODEL ...] [--n 200]

A masked generator is asked three times: as it is run; with all cells drawn at once, none of which sees another; and
with one of the two digits given, as it stands in a real picture, so that only the other is to be drawn. The rows of
models that are not named stay as recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch
from common import OUT, Row, record

from stillroom.bench.scenes.bench import ScenesBench
from stillroom.bench.scenes.judge import mistakes, scene_eval
from stillroom.data.scenes.captions import CELLS, Caption, draw_scenes, seeded
from stillroom.data.scenes.pictures import SHAPE, render
from stillroom.diffusion.masking import MaskedSampler
from stillroom.evaluation.judges import scaled
from stillroom.evaluation.metrics import to_uint8
from stillroom.task import load_model
from stillroom.tasks.text_images.model import TextImageGenerator

MODELS = ("scenes-sd3-large", "scenes-sd3", "scenes-pixart", "lightgen-four", "lightgen")
ASKED, SEED = ("two", "attribution"), 0


def one_given(model: TextImageGenerator, captions: list[Caption]) -> torch.Tensor:
    """Pictures of ``captions`` of which the first digit is a real one; the rest is drawn."""
    scenes = draw_scenes(captions, seeded("one digit given"))
    hole = torch.ones(len(scenes), *SHAPE[1:], dtype=torch.bool)
    half = SHAPE[1] // 2
    for i, scene in enumerate(scenes):
        row, column = divmod(scene.things[0].cell, CELLS // 2)
        hole[i, row * half : (row + 1) * half, column * half : (column + 1) * half] = False
    real = scaled(render(scenes, "train", seeded("one digit given: pictures")), SHAPE, "the benchmark")
    return model.inpaint([caption.text for caption in captions], real, hole, seed=SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--n", type=int, default=200, help="captions of each kind")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    bench, file = ScenesBench(), OUT / "mistakes.json"
    recorded: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows: list[Row] = []
    every = bench.captions(6 * chosen.n)
    for name in dict.fromkeys((*MODELS, *chosen.models)):
        if name not in chosen.models:
            rows += [row for row in recorded if row["model"] == name]
            continue
        model = load_model(name)
        for kind in ASKED:
            captions = [caption for caption in every if caption.category == kind][: chosen.n]
            texts = [caption.text for caption in captions]
            drawn = {"as it is run": model.sample(texts, seed=SEED)}
            if isinstance(model.sampler, MaskedSampler):
                own = model.sampler
                drawn["one digit given"] = one_given(model, captions)
                model.sampler = dataclasses.replace(own, steps=1)
                drawn["all at once"] = model.sample(texts, seed=SEED)
                model.sampler = own
            for how, images in drawn.items():
                reading = bench.parser.read(to_uint8(images))
                row: Row = {"model": name, "captions": kind, "drawn": how, "N": len(captions)}
                row["right"] = scene_eval(captions, reading)["sceneeval"]
                rows.append(row | mistakes(captions, reading))
                print(*rows[-1].values(), flush=True)
    record(
        "Mistakes with two digits",
        "Which mistakes text-to-image models make where a caption asks for two digits, by the frozen parser.",
        "python benchmarks/mistakes.py",
        rows,
    )


if __name__ == "__main__":
    main()
