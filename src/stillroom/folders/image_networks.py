"""Image classifiers as transformers keeps them: one network and the names of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from stillroom.errors import UserError, nearest, reading
from stillroom.folders.pretrained import CONFIG
from stillroom.folders.processors import pixels_of
from stillroom.folders.transformers_layout import config_from_file
from stillroom.parsing import read_json

SIDE_FILE = "stillroom.json"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet-small": {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"},
    "resnet-18": {
        "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic",
    },
    "resnet-50": {
        "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
    },
}  # fmt: skip
"""Untrained networks by name: ``ResNetConfig`` without channels and classes."""


def channels_of(network: Any) -> tuple[int, ...]:
    """Channels that images may have: those of the network, then those that its processor spreads over them."""
    if (whole := getattr(network, "whole", None)) is not None:  # of two heads
        return channels_of(whole)
    config = config_of(network)
    own = getattr(config, "num_channels", None) or config.vision_config.num_channels
    return (own, 1) if own > 1 and pixels_of(network) else (own,)


def config_of(network: Any) -> Any:
    """The config of a classifier of transformers. Raises UserError for any other network."""
    config = getattr(network, "config", None)
    seen = hasattr(config, "num_channels") or hasattr(getattr(config, "vision_config", None), "num_channels")
    if not (hasattr(config, "num_labels") and seen):
        raise UserError(
            f"the network {type(network).__name__} is no image classifier of transformers",
            cure="give an AutoModelForImageClassification",
        )
    return config


def make_classifier(name: str, channels: int, classes: int) -> nn.Module:
    """An untrained network of :data:`ARCHITECTURES`, or of the config in a JSON file, with so many channels and
    classes. Raises UserError for an unknown name and for a config of no classifier."""
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

    if name.endswith(".json"):
        file = Path(name).expanduser()
        config = config_from_file(file, num_channels=channels, num_labels=classes)
        with reading(file):
            return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    if name not in ARCHITECTURES:
        raise UserError(
            f"no classifier {name!r}{nearest(name, ARCHITECTURES)}",
            cure=f"give a model's folder, or one of: {', '.join(ARCHITECTURES)}",
        )
    settings: dict[str, Any] = {"num_channels": channels, "num_labels": classes, **ARCHITECTURES[name]}
    return ResNetForImageClassification(ResNetConfig(**settings))


ENCODERS = (
    "ViTMAEModel", "ViTMAEForPreTraining", "ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel",
    "CLIPVisionModel",
)  # fmt: skip
"""Classes of transformers that an encoder's folder may hold: a class token, then one token for each patch."""
VISION_OF = {"CLIPModel": "CLIPVisionModel", "CLIPVisionModelWithProjection": "CLIPVisionModel"}
"""Classes of which one part is an encoder."""


def class_names(classifier: Any) -> list[str]:
    """What a trained classifier, or one in a folder of transformers, calls its outputs, in order; none where it is no
    classifier or does not say. ``LABEL_0`` and so on are transformers' names for none, and are given as they are."""
    if not isinstance(classifier, Path):
        config: Any = getattr(classifier, "config", None)
        named = getattr(classifier, "classes", None) or getattr(config, "id2label", None)
    elif "Classification" not in architecture(classifier):
        return []
    else:
        side = read_json(classifier / SIDE_FILE) if (classifier / SIDE_FILE).is_file() else {}
        named = side.get("classes") or read_json(classifier / CONFIG).get("id2label")
    if isinstance(named, dict) and all(str(key).isdecimal() for key in named):
        named = [named[key] for key in sorted(named, key=int)]
    return [str(name) for name in named] if isinstance(named, list) else []


def architecture(folder: Path) -> str:
    """The class of transformers that a folder holds, by its config; empty where it says none."""
    if not (folder / CONFIG).is_file():
        return ""
    named = read_json(folder / CONFIG).get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""
