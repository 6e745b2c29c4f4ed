"""One small model of each family of transformers that may teach, as a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

import tiny_text

SIDE, CLASSES = 16, ("bar", "cross", "dot")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


class Family(NamedTuple):
    """title: for readers. cls, config: of transformers. settings: of the config. processor: of the images, if any."""

    title: str
    cls: str
    config: str
    settings: dict[str, Any]
    processor: dict[str, Any] = {}


PLAIN_VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
TO_12 = {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}, "resample": 2}
CUT_12 = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 12},
    "crop_pct": 0.75,
    "resample": 3,
}
MIDDLE_12 = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 14}, "do_center_crop": True,
    "crop_size": {"height": 12, "width": 12}, "resample": 3,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
TWO_STAGES = {**STAGES, "num_stages": 2}
CLIP_TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 17,
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 3),
}  # fmt: skip

CLASSIFIERS = {
    "vit": Family("ViT", "ViTForImageClassification", "ViTConfig", PLAIN_VIT, TO_12),
    "deit": Family("DeiT", "DeiTForImageClassification", "DeiTConfig", PLAIN_VIT, TO_12),
    "beit": Family("BEiT", "BeitForImageClassification", "BeitConfig", PLAIN_VIT, TO_12),
    "dinov2": Family("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", PLAIN_VIT, MIDDLE_12),
    "swin": Family(
        "Swin", "SwinForImageClassification", "SwinConfig",
        {"image_size": 12, "patch_size": 3, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
        TO_12,
    ),
    "convnext": Family("ConvNeXt", "ConvNextForImageClassification", "ConvNextConfig", TWO_STAGES, CUT_12),
    "convnextv2": Family(
        "ConvNeXt V2", "ConvNextV2ForImageClassification", "ConvNextV2Config", TWO_STAGES, CUT_12
    ),
    "resnet": Family(
        "ResNet", "ResNetForImageClassification", "ResNetConfig",
        {**STAGES, "embedding_size": 8, "layer_type": "basic"}, CUT_12,
    ),
    "regnet": Family(
        "RegNet", "RegNetForImageClassification", "RegNetConfig",
        {**STAGES, "embedding_size": 8, "groups_width": 8}, CUT_12,
    ),
    "mobilenet_v2": Family(
        "MobileNet V2", "MobileNetV2ForImageClassification", "MobileNetV2Config",
        {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "image_size": 16},
        {**MIDDLE_12, "image_processor_type": "MobileNetV2ImageProcessor"},
    ),
    "clip": Family(
        "CLIP's vision part", "CLIPForImageClassification", "CLIPConfig",
        {"vision_config": PLAIN_VIT, "text_config": CLIP_TEXT, "projection_dim": 8},
        {**MIDDLE_12, "image_processor_type": "CLIPImageProcessor"},
    ),
}  # fmt: skip
"""Image classifiers, of 3 channels."""

WHOLE = {**PLAIN_VIT, "image_size": SIDE}
WITH_DECODER = {
    **WHOLE, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}  # fmt: skip
SEEN = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
ENCODERS = {
    "vit_mae": Family("ViTMAE with its decoder", "ViTMAEForPreTraining", "ViTMAEConfig", WITH_DECODER, SEEN),
    "vit_mae_encoder": Family("ViTMAE, the encoder alone", "ViTMAEModel", "ViTMAEConfig", WITH_DECODER, SEEN),
    "vit": Family("ViT", "ViTModel", "ViTConfig", WHOLE, SEEN),
    "deit": Family("DeiT", "DeiTModel", "DeiTConfig", WHOLE, SEEN),
    "dinov2": Family("DINOv2", "Dinov2Model", "Dinov2Config", WHOLE, SEEN),
    "dinov2_with_registers": Family(
        "DINOv2 with registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", WHOLE, SEEN
    ),
    "clip_vision": Family("CLIP's vision part", "CLIPVisionModel", "CLIPVisionConfig", WHOLE, SEEN),
    "vit_classifier": Family("ViT with a head", "ViTForImageClassification", "ViTConfig", WHOLE, SEEN),
    "swin_classifier": Family(
        "Swin with a head", "SwinForImageClassification", "SwinConfig",
        {"image_size": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
        SEEN,
    ),
}  # fmt: skip
"""Image encoders, of 3 channels and 16 pixels."""

BERT = {
    "vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 24, "pad_token_id": 0,
}  # fmt: skip
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
TEXTS = {
    "bert": Family("BERT, MiniLM", "BertForSequenceClassification", "BertConfig", BERT),
    "roberta": Family("RoBERTa", "RobertaForSequenceClassification", "RobertaConfig", {**BERT, **SPECIAL}),
    "xlm_roberta": Family(
        "XLM-RoBERTa", "XLMRobertaForSequenceClassification", "XLMRobertaConfig", {**BERT, **SPECIAL}
    ),
    "distilbert": Family(
        "DistilBERT", "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 17, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 24,
         "pad_token_id": 0},
    ),
    "electra": Family("ELECTRA", "ElectraForSequenceClassification", "ElectraConfig", {**BERT, "embedding_size": 8}),
    "modernbert": Family(
        "ModernBERT", "ModernBertForSequenceClassification", "ModernBertConfig",
        {**BERT, **SPECIAL, "global_attn_every_n_layers": 2, "local_attention": 8},
    ),
    "deberta_v2": Family("DeBERTa V2, V3", "DebertaV2ForSequenceClassification", "DebertaV2Config", BERT),
    "albert": Family(
        "ALBERT", "AlbertForSequenceClassification", "AlbertConfig", {**BERT, **SPECIAL, "embedding_size": 8}
    ),
    "gpt2": Family(
        "GPT-2", "GPT2ForSequenceClassification", "GPT2Config",
        {"vocab_size": 17, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "pad_token_id": 0, **SPECIAL},
    ),
}  # fmt: skip
"""Text classifiers that read with the tokenizer of ``tiny_text``."""


def make_model(family: Family, seed: int = 0, **more: Any) -> Any:
    """The untrained network, of three classes where it has any."""
    config = getattr(transformers, family.config)(**family.settings, **more)
    if "For" in family.cls and "PreTraining" not in family.cls:
        config.num_labels = len(CLASSES)
    torch.manual_seed(seed)
    return getattr(transformers, family.cls)(config).eval()


def named(network: Any, classes: Any) -> Any:
    network.config.id2label = dict(enumerate(classes))
    network.config.label2id = {name: i for i, name in enumerate(classes)}
    return network


def save_images(family: Family, folder: Path, classes: Any = CLASSES, seed: int = 0) -> Path:
    """A folder with network and processor; weights that are not all alike, so that every image has its own answer."""
    network = shaken(make_model(family, seed))
    if "Classification" in family.cls:
        named(network, classes)
    network.save_pretrained(folder)
    processor = {"image_mean": MEAN, "image_std": STD, **family.processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_texts(family: Family, folder: Path, classes: Any = tiny_text.CLASSES, tokenizer: Any = None) -> Path:
    shaken(named(make_model(family), classes)).save_pretrained(folder)
    (tokenizer or tiny_text.tokenizer()).save_pretrained(folder)
    return folder


@torch.no_grad()
def shaken(network: nn.Module) -> Any:
    """With matrices that are larger than transformers draws them, whose answers differ visibly."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


SAVE: dict[str, tuple[dict[str, Family], Callable[..., Path]]] = {
    "classifiers": (CLASSIFIERS, save_images), "encoders": (ENCODERS, save_images), "texts": (TEXTS, save_texts),
}  # fmt: skip
