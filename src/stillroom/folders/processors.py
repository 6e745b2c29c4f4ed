"""What the processor of an image classifier does to images before its network sees them, by tensors, on any device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.errors import UserError, reading
from stillroom.folders.transformers_layout import PLAIN
from stillroom.parsing import read_json

PROCESSOR = "preprocessor_config.json"
PROCESSORS = ("ViT", "DeiT", "Beit", "ConvNext", "Bit", "CLIP", "Siglip", "MobileNetV1", "MobileNetV2")
"""Image processors of transformers that resize, cut out the middle, rescale and normalise, and nothing else."""
_MODES = {2: "bilinear", 3: "bicubic"}
"""By Pillow's numbers; both are antialiased."""


@dataclass(frozen=True)
class Pixels:
    """A hook before a network's forward pass: images ``[B, C, H, W]`` in [-1, 1] become what the network knows.

    settings: the processor's, as in its file. channels: of the network; grey images fill all of them. resize:
    ``(height, width)``, or the length of the shorter side, 0: none. crop: ``(height, width)`` of the middle, or ().
    ``((x + 1) / 2 scale - mean) / std`` is what the network sees. Pillow rounds resized pixels to whole numbers of 255;
    here nothing is rounded.
    """

    settings: Mapping[str, Any]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0
    resize: tuple[int, int] | int = 0
    crop: tuple[int, int] | tuple[()] = ()
    mode: str = "bilinear"

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.of(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": self.of(kwargs["pixel_values"])}

    def of(self, images: Tensor) -> Tensor:
        """``[B, channels, height, width]``, as the network wants them."""
        if self.plain:
            return images.expand(-1, self.channels, -1, -1)
        x = self._cropped(self._resized((images + 1) / 2)) * self.scale
        mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x.expand(-1, self.channels, -1, -1) - mean) / std

    def _resized(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if isinstance(self.resize, int):
            short, long = min(height, width), max(height, width)
            sides = (self.resize, int(self.resize * long / short))
            wanted = sides if height <= width else sides[::-1]
        else:
            wanted = self.resize
        if not self.resize or wanted == (height, width):
            return x
        for sides in ((height, wanted[1]), wanted):  # Pillow, too, cuts values off after each of the two
            x = F.interpolate(x, sides, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        return x

    def _cropped(self, x: Tensor) -> Tensor:
        if not self.crop:
            return x
        height, width = self.crop
        down, across = max(0, height - x.shape[-2]), max(0, width - x.shape[-1])
        x = F.pad(x, (across - across // 2, across // 2, down - down // 2, down // 2))
        top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
        return x[..., top : top + height, left : left + width]

    @property
    def plain(self) -> bool:
        """Whether the network sees images as they are, in [-1, 1]."""
        middle = (0.5,) * self.channels
        return self.mean == self.std == middle and self.scale == 1 and not self.resize and not self.crop

    @classmethod
    def read(cls, folder: Path, channels: int) -> Pixels:
        """The settings of a folder's ``preprocessor_config.json``. Raises UserError, naming the file, for a damaged one
        and for a processor that does something else to images."""
        file = folder / PROCESSOR
        settings = read_json(file)
        with reading(file):
            from transformers import AutoImageProcessor

            made: Any = AutoImageProcessor.from_pretrained(folder, **PLAIN)
            kind = type(made).__name__.removesuffix("Pil").removesuffix("Fast").removesuffix("ImageProcessor")
            if kind not in PROCESSORS:
                raise UserError(f"{file} is for a {kind}ImageProcessor", cure=f"known kinds: {', '.join(PROCESSORS)}")
            normalised = bool(made.do_normalize)
            mean = _numbers(made.image_mean if normalised else 0.0, channels)
            std = _numbers(made.image_std if normalised else 1.0, channels)
            if len(mean) != channels or len(std) != channels or not all(std):
                raise UserError(f"{file}: mean and deviation are for another number of channels than {channels}")
            scale = 255 * float(made.rescale_factor) if made.do_rescale else 255.0
            resize, mode, crop = _side(made), "bilinear", ()
            if resize:
                if int(made.resample) not in _MODES:
                    raise UserError(f"{file} resizes with resample {int(made.resample)}", cure="give 2 or 3")
                mode = _MODES[int(made.resample)]
            if kind == "ConvNext" and isinstance(resize, int) and resize:
                crop = (resize, resize) if resize < 384 else ()
                resize = int(resize / made.crop_pct) if resize < 384 else (resize, resize)
            elif getattr(made, "do_center_crop", False):
                crop = (int(made.crop_size["height"]), int(made.crop_size["width"]))
            return cls(settings, channels, mean, std, 1.0 if abs(scale - 1) < 1e-6 else scale, resize, crop, mode)

    def attach(self, network: nn.Module) -> None:
        """Let the network see images through this; a plain one changes nothing."""
        if not self.plain or self.channels > 1:
            network.register_forward_pre_hook(self, with_kwargs=True)


def _numbers(value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    return (float(value),) * channels if isinstance(value, int | float) else tuple(float(one) for one in value)


def _side(made: Any) -> tuple[int, int] | int:
    """Of a processor: ``(height, width)``, the shorter side, or 0 for none."""
    if not made.do_resize:
        return 0
    size = dict(made.size) if isinstance(made.size, Mapping) else vars(made.size)
    if size.get("shortest_edge"):
        return int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])


def pixels_of(network: nn.Module) -> Pixels | None:
    """The hook that :meth:`Pixels.attach` put on a network, if it did."""
    return next((hook for hook in network._forward_pre_hooks.values() if isinstance(hook, Pixels)), None)


def save_processor(network: nn.Module, folder: Path, channels: int) -> None:
    """Write the ``preprocessor_config.json`` of a classifier, with which its processor and the hook agree."""
    middle = [0.5] * channels
    plain = {
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": middle, "image_std": middle,
    }  # fmt: skip
    hook = pixels_of(network)
    settings = dict(hook.settings) if hook is not None else plain
    (folder / PROCESSOR).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
