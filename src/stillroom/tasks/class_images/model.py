"""A denoiser that draws classes, with its sampler, as a folder in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler, Sampler, sampler_from_dict
from stillroom.errors import UserError, reading
from stillroom.folders.denoisers import SIDE_FILE, load_denoiser, save_denoiser
from stillroom.parsing import read_json
from stillroom.surgery.modules import device_of


class ImageGenerator:
    """A denoiser and the sampler it is run with; what ``stillroom.load`` returns.

    classes: names of the condition's classes in label order (may be empty).
    """

    def __init__(self, denoiser: Denoiser, sampler: Sampler, classes: Sequence[str] = ()) -> None:
        self.denoiser, self.sampler, self.classes = denoiser.eval(), sampler, list(classes)

    @torch.no_grad()
    def sample(self, cond: Tensor | Sequence[int] | dict[str, Tensor] | int, seed: int = 0, batch: int = 250) -> Tensor:
        """Samples ``[N, C, H, W]`` float32, one per condition, on the CPU.

        cond: class labels ``[N]``, a dictionary of conditions with N rows, or a number of unconditional samples.
        Sample i depends on ``seed`` and on the batch size only through its own noise.
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
        for start in range(0, n, batch):
            size = min(batch, n - start)
            noise = torch.randn(size, *self.denoiser.shape, generator=generator).to(device)
            part = {k: v[start : start + size].to(device) for k, v in conditions.items()}
            out.append(self.sampler.sample(self.denoiser, noise, part, generator).float().cpu())
        return torch.cat(out)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, **extra: Any) -> None:
        """Write the folder; ``extra`` entries are added to ``stillroom.json``. ``dtype``: of the weights in the file
        (default: as they are)."""
        folder = Path(folder)
        side = save_denoiser(self.denoiser, folder, dtype)
        side |= {"sampler": self.sampler.to_dict(), "classes": self.classes, **extra}
        (folder / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")

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
