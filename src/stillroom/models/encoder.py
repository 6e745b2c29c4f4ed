"""Image encoders as transformers keeps them, and a classifier on their mean token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.sampling import ForwardPass, Sampler
from stillroom.errors import UserError
from stillroom.models.classifier import CONFIG, pretrained
from stillroom.models.families import device_of, read_json
from stillroom.models.folder import SIDE_FILE
from stillroom.models.mae import encode

PROCESSOR = "preprocessor_config.json"
ENCODERS = (
    "ViTMAEModel", "ViTMAEForPreTraining", "ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel",
    "CLIPVisionModel",
)  # fmt: skip
"""Classes of transformers that an encoder's folder may hold: a class token, then one token for each patch."""
VISION_OF = {"CLIPModel": "CLIPVisionModel", "CLIPVisionModelWithProjection": "CLIPVisionModel"}
"""Classes of which one part is an encoder."""


class ImageEncoder:
    """A network that describes images; what ``stillroom.load`` returns for one. Images are float32 ``[N, C, H, W]`` in
    [-1, 1]."""

    def __init__(self, network: nn.Module, sampler: Sampler | None = None) -> None:
        self.network, self.sampler = network.eval(), sampler or ForwardPass()

    @torch.no_grad()
    def tokens(self, images: Tensor, batch: int = 250) -> Tensor:
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
        parts = [encode(encoder, part.to(device))[:, 1:].float().cpu() for part in images.split(batch)]
        return torch.cat(parts)

    def features(self, images: Tensor, batch: int = 250) -> Tensor:
        """The mean token of each image, ``[N, D]``."""
        return torch.cat([self.tokens(part, batch).mean(1) for part in images.split(batch)])

    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write the folder as ``save_pretrained`` does, the processor's settings too; ``extra`` entries go into
        ``stillroom.json`` beside it."""
        network: Any = self.network
        network.save_pretrained(folder)
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


def is_encoder(folder: Path) -> bool:
    """Whether a model folder holds an image encoder of transformers."""
    return architecture(folder) in ENCODERS


def architecture(folder: Path) -> str:
    """The class of transformers that a folder holds, by its config; empty where it says none."""
    if not (folder / CONFIG).is_file():
        return ""
    named = read_json(folder / CONFIG).get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


class PooledClassifier(nn.Module):
    """Class logits ``[B, classes]`` from the mean patch token of an encoder: layer norm, then a linear map, the usual
    way to fine-tune a masked autoencoder."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size  # type: ignore[union-attr]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(encode(self.encoder, images)[:, 1:].mean(1)))


def encoder_of(network: Any) -> Any:
    """The encoder inside a masked autoencoder or a classifier, or the network itself."""
    if isinstance(network, PooledClassifier):
        return network.encoder
    if type(network).__name__.endswith("CLIPVisionModel"):  # FSDP renames the class
        return network
    return getattr(network, "base_model", network)  # transformers' name for a model without its heads


def check_encoder(network: Any, name: str) -> Any:
    """The encoder inside a network. Raises UserError for one whose last states are no tokens of patches."""
    encoder = encoder_of(network)
    if type(encoder).__name__ not in ENCODERS:
        raise UserError(
            f"network {name!r} is a {type(encoder).__name__}, whose states are not those of single patches",
            cure=f"known classes: {', '.join(ENCODERS)}",
        )
    return encoder


def make_vit_classifier(encoder: Any, classes: int, kind: str) -> nn.Module:
    """A DeiT of transformers in the shape of a masked autoencoder's encoder, with new heads (standard deviation 2e-5)
    and a distillation token. kind: ``DeiTForImageClassificationWithTeacher``, one head at the class token and one at
    the distillation token, averaged for the answer; or ``DeiTForImageClassification``, the first alone."""
    import transformers

    theirs = encoder.config
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "image_size", "patch_size", "num_channels", "qkv_bias",
    )  # fmt: skip
    settings: dict[str, Any] = {name: getattr(theirs, name) for name in names}
    settings["num_labels"] = classes
    network = getattr(transformers, kind)(transformers.DeiTConfig(**settings))
    for name, head in network.named_children():
        if name.endswith("classifier"):
            nn.init.trunc_normal_(head.weight, std=2e-5)
            nn.init.zeros_(head.bias)
    nn.init.trunc_normal_(network.deit.embeddings.distillation_token, std=0.02)
    return carry_encoder(encoder, network)


@torch.no_grad()
def carry_encoder(encoder: nn.Module, classifier: Any) -> nn.Module:
    """Copy an encoder's weights into a DeiT of its shape, by name. Distillation token and heads stay; the token's
    position becomes 0. Raises UserError where anything else is left over."""
    weights = dict(encoder.state_dict())
    position = weights.pop("embeddings.position_embeddings")
    between = torch.zeros_like(position[:, :1])
    weights["embeddings.position_embeddings"] = torch.cat([position[:, :1], between, position[:, 1:]], 1)
    report = classifier.deit.load_state_dict(weights, strict=False)
    left = [*(k for k in report.missing_keys if k != "embeddings.distillation_token"), *report.unexpected_keys]
    if left:
        raise UserError(f"the encoder has no place for {left[0]!r} in a DeiT", cure="give a ViTMAEModel as the student")
    return classifier
