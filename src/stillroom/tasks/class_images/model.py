"""A denoiser that draws classes, with its sampler, as a folder in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.routed import RoutedDenoiser
from stillroom.diffusion.sampling import ODESampler, Sampler, sampler_from_dict
from stillroom.engine.progress import Parts
from stillroom.errors import UserError, nearest, reading
from stillroom.folders.denoisers import EXPERTS, NETWORK_FOLDERS, SIDE_FILE, load_denoiser, save_denoiser
from stillroom.folders.diffusers_networks import label_count
from stillroom.folders.pipelines import draws_pixels
from stillroom.parsing import read_json
from stillroom.pictures import PictureGenerator
from stillroom.surgery.modules import device_of
from stillroom.task import COLUMNS, Model, Part, Rows

ROWS = 10
"""Rows of a sample grid: classes, or rows of unconditional samples."""


class ImageGenerator(PictureGenerator):
    """A denoiser and the sampler it is run with; what ``stillroom.load`` returns.

    classes: names of the condition's classes in label order (may be empty).
    """

    noun = "an image generator"
    does, usage, asked_by = "draws classes", "stillroom.load(DIR).sample(labels)", "labels"
    most_at_once = 250

    def __init__(self, denoiser: Denoiser, sampler: Sampler, classes: Sequence[str] = ()) -> None:
        self.denoiser, self.sampler, self.classes = denoiser.eval(), sampler, list(classes)

    @property
    def module(self) -> Denoiser:
        return self.denoiser

    @property
    def choices(self) -> list[str]:
        """Names, else numbers, of the classes that can be asked for; empty for a model without classes."""
        return self.classes or [str(i) for i in range(class_count(self.denoiser))]

    @torch.no_grad()
    def sample(self, cond: Tensor | Sequence[int] | dict[str, Tensor] | int, seed: int = 0, batch: int = 0) -> Tensor:
        """Samples ``[N, C, H, W]`` float32, one per condition, on the CPU.

        cond: class labels ``[N]``, a dictionary of conditions with N rows, or a number of unconditional samples.
        Sample i depends on ``seed`` and on the batch size only through its own noise. batch: samples at once; 0: 250,
        or as many as :attr:`at_once` allows.
        """
        device = device_of(self.denoiser)
        if isinstance(cond, int):
            conditions, n = {}, cond
        elif isinstance(cond, dict):
            conditions = cond
            n = len(next(iter(cond.values())))
        else:
            conditions = {"label": torch.as_tensor(cond, dtype=torch.long)}
            n = len(conditions["label"])
        if n == 0:
            raise UserError("no samples were asked for", cure="give at least one label")
        if "label" in conditions and self.classes:
            labels = conditions["label"]
            bad = labels[(labels < 0) | (labels >= len(self.classes))]
            if len(bad):
                raise UserError(f"label {int(bad[0])} is not a class", cure=f"labels are 0 to {len(self.classes) - 1}")
        generator = torch.Generator().manual_seed(seed)
        out = []
        batch = batch or self.at_once
        for start in Parts(n, batch):
            size = min(batch, n - start)
            noise = torch.randn(size, *self.denoiser.shape, generator=generator).to(device)
            part = {k: v[start : start + size].to(device) for k, v in conditions.items()}
            out.append(self.sampler.sample(self.denoiser, noise, part, generator).float().cpu())
        return torch.cat(out)

    def join(self, others: Sequence[Model]) -> ImageGenerator:
        parts = [getattr(one, "denoiser", None) for one in (self, *others)]
        if not all(isinstance(part, RoutedDenoiser) for part in parts):
            raise UserError(
                "one of these is no student of a part of the classes",
                cure="give students that were trained apart (msd)",
            )
        for one in others:  # not their experts alone: what these are asked is the model's, too
            for fact in ("sampler", "classes"):
                if getattr(one, fact) != getattr(self, fact):
                    raise UserError(
                        f"these have other {fact}: {getattr(self, fact)} and {getattr(one, fact)}",
                        cure="give students of one recipe, which differ in options.only alone",
                    )
        first, *rest = parts
        return ImageGenerator(first.join(rest), self.sampler, self.classes)  # type: ignore[union-attr]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.denoiser.shape[1], self.denoiser.shape[2]

    def draw(self, wish: str, n: int, seed: int, **changes: Any) -> Tensor:
        generator = ImageGenerator(self.denoiser, self.changed(**changes), self.classes)
        return generator.sample([class_index(wish, self.choices)] * n if self.choices else n, seed=seed)

    def rows(self, asked: Sequence[str] = (), n: int = COLUMNS, seed: int = 0) -> Rows:
        """``n`` samples for each of the chosen classes, by number or name (default: all, at most ten). A model without
        classes gives ten rows without names."""
        classes = self.choices
        if not classes:
            if asked:
                raise UserError("this model takes no labels", cure="leave --labels away")
            return Rows([""] * ROWS, self.sample(ROWS * n, seed=seed).unflatten(0, (ROWS, n)))
        chosen = [class_index(label, classes) for label in asked] or list(range(min(len(classes), ROWS)))
        images = self.sample([index for index in chosen for _ in range(n)], seed=seed)
        return Rows([classes[index] for index in chosen], images.unflatten(0, (len(chosen), n)))

    # --- other runtimes -------------------------------------------------------------------------------------------
    def parts(self, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
        from stillroom.tasks.class_images import export

        return export.parts(self, whole)

    def export_facts(self) -> dict[str, Any]:
        from stillroom.tasks.class_images import export

        return export.facts(self)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, dtype: torch.dtype | None = None, **extra: Any) -> None:
        """Write the folder; ``extra`` entries are added to ``stillroom.json``. ``dtype``: of the weights in the file
        (default: as they are)."""
        folder = Path(folder)
        side = save_denoiser(self.denoiser, folder, dtype)
        side |= {"sampler": self.sampler.to_dict(), "classes": self.classes, **extra}
        (folder / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """A network in diffusers' layout, or several with a route between them, that read no text."""
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else {}
        others = (folder / "model_index.json").is_file() and not draws_pixels(folder)
        words = (folder / "text_encoder").is_dir() or others or "components" in side
        return not words and any((folder / name).is_dir() for name in (*NETWORK_FOLDERS, EXPERTS))

    @classmethod
    def load(cls, folder: str | Path) -> ImageGenerator:
        """Read a folder written by :meth:`save`, or a diffusers folder (then sampled by 25 Heun steps).

        Raises UserError for a missing, incomplete or corrupt folder, naming the file.
        """
        folder = Path(folder)
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else {}
        with reading(folder):
            sampler = sampler_from_dict(side["sampler"]) if "sampler" in side else ODESampler()
            return cls(load_denoiser(folder), sampler, side.get("classes", ()))


def class_index(label: str, classes: Sequence[str]) -> int:
    """The number of a class, by name or number. Raises UserError for one that there is not."""
    if label in classes:
        return list(classes).index(label)
    if label.isdigit() and int(label) < len(classes):
        return int(label)
    raise UserError(
        f"no class {label!r}{nearest(label, classes)}", cure=f"classes: {', '.join(classes)}, or their numbers"
    )


def class_count(denoiser: Denoiser) -> int:
    """Classes of a class-conditional denoiser, whose "unconditional" label comes after the last class, or is not known;
    else 0."""
    values = [value for name, value in denoiser.null.items() if "label" in name and isinstance(value, int)]
    return values[0] if values else label_count(denoiser.network)
