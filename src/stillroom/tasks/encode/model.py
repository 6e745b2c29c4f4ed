"""Image encoders as transformers keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.source import load_data
from stillroom.diffusion.sampling import Sampler
from stillroom.engine.progress import Parts
from stillroom.errors import UserError
from stillroom.folders.denoisers import SIDE_FILE
from stillroom.folders.image_networks import ENCODERS, VISION_OF, architecture
from stillroom.folders.pretrained import pretrained
from stillroom.folders.weights import save_pretrained
from stillroom.networks.mae import encode
from stillroom.networks.recognition import ForwardPass
from stillroom.networks.vit import PROCESSOR, encoder_of
from stillroom.parsing import read_json
from stillroom.surgery.modules import device_of
from stillroom.task import FileJudge, Model, Part
from stillroom.tasks.classify.model import at_once


class ImageEncoder(Model):
    """A network that describes images; what ``stillroom.load`` returns for one. Images are float32 ``[N, C, H, W]`` in
    [-1, 1]."""

    noun = "an image encoder"
    does, usage = "describes images, it draws none", "stillroom.load(DIR).features(images)"
    int8 = True

    def __init__(self, network: nn.Module, sampler: Sampler | None = None) -> None:
        self.network, self.sampler = network.eval(), sampler or ForwardPass()

    @torch.no_grad()
    def tokens(self, images: Tensor, batch: int = 0) -> Tensor:
        """One token for each patch, ``[N, patches, D]`` float32, in reading order, on the CPU. Raises UserError for
        images of another size."""
        config: Any = self.network.config
        wanted = (config.num_channels, config.image_size, config.image_size)
        if tuple(images.shape[1:]) != wanted:
            raise UserError(
                f"images of shape {tuple(images.shape)} do not fit this encoder",
                cure=f"give [N, {', '.join(map(str, wanted))}]",
            )
        device, encoder = device_of(self.network), encoder_of(self.network)
        parts = images.split(batch or at_once(images))
        return torch.cat([encode(encoder, part.to(device))[:, 1:].float().cpu() for part in parts])

    def features(self, images: Tensor, batch: int = 0) -> Tensor:
        """The mean token of each image, ``[N, D]``."""
        batch = batch or at_once(images)
        starts = Parts(max(len(images), 1), batch)
        return torch.cat([self.tokens(images[start : start + batch], batch).mean(1) for start in starts])

    # --- other runtimes -------------------------------------------------------------------------------------------
    def parts(self, whole: bool = False, size: tuple[int, int] | None = None) -> dict[str, Part]:
        from stillroom.tasks.encode import export

        return export.parts(self, whole)

    def test_data(self, name: str) -> Any:
        return load_data(name, "test")

    def judge(self, data: str, test: Any) -> FileJudge:
        from stillroom.tasks.encode import export

        return export.judge(data, test)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write the folder as ``save_pretrained`` does, the processor's settings too; ``extra`` entries go into
        ``stillroom.json`` beside it."""
        network: Any = self.network
        save_pretrained(network, folder)
        config, folder = network.config, Path(folder)
        middle = [0.5] * config.num_channels
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": config.image_size, "width": config.image_size},
            "image_mean": getattr(config, "image_mean", None) or middle,
            "image_std": getattr(config, "image_std", None) or middle,
        }
        (folder / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")
        (folder / SIDE_FILE).write_text(json.dumps({"sampler": self.sampler.to_dict(), **extra}, indent=2) + "\n")

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """One of :data:`ENCODERS`."""
        return architecture(folder) in ENCODERS

    @classmethod
    def load(cls, folder: str | Path) -> ImageEncoder:
        """Read a folder of transformers with one of :data:`ENCODERS`, weights in safetensors only. Mean and standard
        deviation of its pixels come from its ``preprocessor_config.json``.

        Raises UserError for a missing, incomplete or damaged folder.
        """
        import transformers

        folder = Path(folder)
        name = architecture(folder)
        if name not in (*ENCODERS, *VISION_OF):
            raise UserError(
                f"{folder} holds {f'a {name}, ' if name else ''}no image encoder",
                cure=f"known classes: {', '.join((*ENCODERS, *VISION_OF))}",
            )
        network: Any = pretrained(getattr(transformers, VISION_OF.get(name, name)), folder)
        if (folder / PROCESSOR).is_file() and not hasattr(network.config, "image_mean"):
            processor = read_json(folder / PROCESSOR)
            if processor.get("image_mean") is not None:
                network.config.image_mean, network.config.image_std = processor["image_mean"], processor["image_std"]
        return cls(network)
