"""A text-image model as a classifier: classes are texts, and an image has the class whose text it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.folders.pretrained import load_pretrained
from stillroom.folders.transformers_layout import auto_tokenizer, check_pads
from stillroom.folders.weights import save_pretrained
from stillroom.parsing import read_json

PROMPTS = ("a photo of a {}.",)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of pixels in [0, 1]: what the published CLIP models were trained with (arXiv 2103.00020)."""
Average = Literal["normalised", "plain"]


class PromptClassifier(nn.Module):
    """A ``transformers.CLIPModel`` with the names of classes: images ``[B, C, H, W]`` in [-1, 1] to logits
    ``[B, classes]``, ``cos(image feature, text feature of the class) / zeta`` (arXiv 2103.00020; zeta = 0.01).

    Images are resized to the model's own size and normalised as it expects; grey ones fill all its channels.
    channels: of the images; by default those of the model.
    """

    text: Tensor  # [classes, D], of length 1
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        channels: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.classes = clip, tokenizer, list(classes)
        vision: Any = self._config.vision_config
        given = channels or int(vision.num_channels)
        if given not in (1, vision.num_channels):
            raise UserError(
                f"images have {given} channels, the text-image model takes {vision.num_channels}",
                cure="give images with as many channels, or grey ones",
            )
        self.config = SimpleNamespace(num_labels=len(self.classes), num_channels=given)
        coloured = vision.num_channels == 3
        for name, values in (
            ("mean", mean or (CLIP_MEAN if coloured else (0.5,))),
            ("std", std or (CLIP_STD if coloured else (0.5,))),
        ):
            self.register_buffer(name, torch.tensor(list(values))[:, None, None])
        self.register_buffer("text", torch.zeros(0))
        self.ask()

    @property
    def _config(self) -> Any:
        return self.clip.config

    @torch.no_grad()
    def ask(self, prompts: Sequence[str] = PROMPTS, zeta: float = 0.01, average: Average = "normalised") -> None:
        """Say the classes in other words. A class's text feature is the mean of its prompts' features, each
        ``normalised`` or ``plain`` (as DHO's code has it), scaled to length 1.

        Raises UserError for a prompt without the place ``{}`` of the class's name.
        """
        if not prompts or any("{}" not in prompt for prompt in prompts):
            raise UserError(
                f"prompts {list(prompts)} do not all have a place for the class",
                cure='write {} where the name goes: "a photo of a {}."',
            )
        if zeta <= 0:
            raise UserError(f"zeta is a temperature above 0, not {zeta}", cure="CLIP's is 0.01")
        self.zeta = zeta
        check_pads(self.tokenizer, "the text-image model")
        texts = [prompt.replace("{}", name) for name in self.classes for prompt in prompts]
        features = self._text_features(texts).view(len(self.classes), len(prompts), -1)
        if average == "normalised":
            features = F.normalize(features, dim=-1)
        self.text = F.normalize(features.mean(1), dim=-1)

    def _text_features(self, texts: list[str]) -> Tensor:
        clip: Any = self.clip
        tokens = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=clip.config.text_config.max_position_embeddings,
            padding_side="right",
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.mean.device)
        found = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return clip.text_projection(found.pooler_output).float()

    def image_features(self, images: Tensor) -> Tensor:
        """``[B, D]``, not normalised."""
        clip: Any = self.clip
        vision = clip.config.vision_config
        pixels = (images.float() + 1) / 2
        if pixels.shape[-1] != vision.image_size or pixels.shape[-2] != vision.image_size:
            pixels = F.interpolate(pixels, (vision.image_size,) * 2, mode="bicubic", antialias=True)
        pixels = (pixels.expand(-1, vision.num_channels, -1, -1) - self.mean) / self.std
        return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output).float()

    def forward(self, images: Tensor, cache: FewShotCache | None = None) -> Tensor:
        features = F.normalize(self.image_features(images), dim=-1)
        logits = features @ self.text.T / self.zeta
        return logits if cache is None else logits + cache(features)

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Write the folder that :meth:`load`, and transformers, read."""
        save_pretrained(self.clip, folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path, classes: Sequence[str], channels: int = 0) -> PromptClassifier:
        """Read a folder with a ``CLIPModel`` and its tokenizer. Mean and deviation of the pixels are those of
        ``preprocessor_config.json``, or CLIP's own where there is none. Raises UserError for what is missing, damaged
        or does not fit."""
        from transformers import CLIPModel

        folder = Path(folder)
        clip, tokenizer = load_pretrained(CLIPModel, folder), auto_tokenizer(folder)
        file = folder / "preprocessor_config.json"
        seen = read_json(file) if file.is_file() else {}
        return cls(clip, tokenizer, classes, channels, seen.get("image_mean", ()), seen.get("image_std", ()))


class FewShotCache(nn.Module):
    """What labelled images add to a text-image model's logits (Tip-Adapter, arXiv 2111.03930): ``a exp(-b (1 - f
    A^T)) V`` for image features ``f [B, D]`` of length 1. The keys ``A [N, D]`` begin as the labelled images' own
    features; training them is Tip-Adapter-F. ``V`` are the labels, one-hot.

    strength: a. sharpness: b.
    """

    values: Tensor

    def __init__(
        self, features: Tensor, labels: Tensor, classes: int, strength: float = 1.0, sharpness: float = 5.5
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(F.normalize(features.detach().clone(), dim=-1))
        self.register_buffer("values", F.one_hot(labels, classes).to(features.dtype))
        self.strength, self.sharpness = strength, sharpness

    def forward(self, features: Tensor) -> Tensor:
        return self.strength * (self.sharpness * (features @ self.keys.T - 1)).exp() @ self.values


def is_text_image_model(folder: Path) -> bool:
    """Whether a folder holds a ``CLIPModel`` of transformers."""
    config = folder / "config.json"
    return config.is_file() and "CLIPModel" in (read_json(config).get("architectures") or ())
