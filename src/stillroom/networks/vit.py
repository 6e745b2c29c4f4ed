"""Image encoders as transformers keeps them, and a classifier on their mean token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.folders.image_networks import ENCODERS
from stillroom.networks.mae import encode

PROCESSOR = "preprocessor_config.json"


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
