"""The picture of teacher and students: every class from the same noise, many steps beside one.

    python benchmarks/pictures.py RUN_OR_STUDENT_DIR... [--out docs/images/teacher-student.png]

The rows are classes, the blocks teacher at many steps, teacher at one, then each student.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT
from torch import Tensor

from stillroom.bench.fashion.bench import ClassImagesBench
from stillroom.diffusion.sampling import FewStepSampler
from stillroom.pictures import load_generator
from stillroom.tasks.class_images.model import ImageGenerator

PER_CLASS, GAP, SEED = 5, 2, 0
CELL_INCHES = 0.3


def name_of(folder: Path) -> str:
    """The method of a run; of a bare student folder, its own name."""
    recipe = folder / "recipe.yaml"
    return yaml.safe_load(recipe.read_text())["method"] if recipe.exists() else folder.name


def mosaic(images: Tensor, columns: int) -> Tensor:
    """``[N, 1, H, W]`` in [-1, 1] as one sheet ``[rows * H, columns * W]`` in [0, 1]: dark garments, white gaps."""
    ink = 1 - (images[:, 0].clamp(-1, 1) + 1) / 2
    ink = torch.nn.functional.pad(ink, (0, GAP, 0, GAP), value=1.0)
    rows = ink.reshape(-1, columns, *ink.shape[1:])
    return rows.permute(0, 2, 1, 3).reshape(len(rows) * ink.shape[1], columns * ink.shape[2])[:-GAP, :-GAP]


def draw(blocks: list[tuple[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    classes = blocks[0][1].classes
    labels = torch.arange(len(classes)).repeat_interleave(PER_CLASS)
    size = (0.9 + len(blocks) * (PER_CLASS * CELL_INCHES + 0.15), 0.5 + len(classes) * CELL_INCHES)
    figure, axes = plt.subplots(1, len(blocks), figsize=size, layout="constrained", squeeze=False)
    for i, (axis, (title, model)) in enumerate(zip(axes[0], blocks)):
        sheet = mosaic(model.sample(labels, seed=SEED), PER_CLASS)
        axis.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        nfe = model.sampler.nfe
        axis.set_title(f"{title}\n{nfe} network evaluation{'s' if nfe > 1 else ''}", fontsize=8)
        axis.set_xticks([])
        cell = model.denoiser.shape[-2] + GAP
        middles = [cell * row + (cell - GAP) / 2 for row in range(len(classes))]
        axis.set_yticks(middles if i == 0 else [], classes if i == 0 else [], fontsize=8)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("students", type=Path, nargs="+", help="run folders or student folders")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "teacher-student.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher: Any = load_generator(ClassImagesBench().teacher_dir)
    once = ImageGenerator(teacher.denoiser, FewStepSampler((1.0,)), teacher.classes)
    blocks = [("teacher, many steps", teacher), ("teacher, one step", once)]
    blocks += [(f"student, {name_of(folder)}", load_generator(folder)) for folder in arguments.students]
    draw(blocks, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
