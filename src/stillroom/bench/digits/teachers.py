"""Teachers of digits that are wrong in known ways: the same class again and again, images at random, or by knowing
only what captions say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.augment.images import shifted
from stillroom.networks.prompt_classifier import PromptClassifier

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("a photo of the digit {}.", "the number {}.")
ZETA = 0.07
"""Temperature of the text-image models that are trained here."""
MISCAPTIONED = 0.2
"""Share of the captions that name a random class."""


def fit(network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, steps: int) -> None:
    """Train a classifier on labels: AdamW, batch 64, images moved by up to a pixel."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        moved = shifted(images[rows], torch.rand(64, 2, generator=generator), 1)
        optimizer.zero_grad()
        F.cross_entropy(network(moved), labels[rows]).backward()
        optimizer.step()


def tiny_clip(words: Sequence[str], prompts: Sequence[str], size: int, patch: int, width: int = 32) -> tuple[Any, Any]:
    """An untrained ``CLIPModel`` for grey images of ``size`` pixels, and a tokenizer of the words that the prompts are
    made of."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    texts = [prompt.replace("{}", word) for prompt in prompts for word in words]
    said = sorted({word.lower() for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<start>", "<end>", *said])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    ends = [("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    length = max(len(tokenizer.encode(text).ids) for text in texts)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, pad_token="<pad>", unk_token="<unk>", bos_token="<start>",
        eos_token="<end>",
    )  # fmt: skip
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        logit_scale_init_value=math.log(1 / ZETA),
        text_config={
            **shape, "num_hidden_layers": 1, "vocab_size": len(vocabulary), "max_position_embeddings": length,
            "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "projection_dim": width,
        },
        vision_config={
            **shape, "image_size": size, "patch_size": patch, "num_channels": 1, "projection_dim": width,
        },
        projection_dim=width,
    )  # fmt: skip
    return CLIPModel(config), fast


def train_clip(
    model: PromptClassifier, images: Tensor, labels: Tensor, prompts: Sequence[str], seed: int, steps: int, lr: float
) -> None:
    """Contrastive training on images ``[N, C, H, W]`` and captions, one of the prompts with the name of the class;
    images of one class in a batch of 64 count as matches of each other's captions."""
    generator = torch.Generator().manual_seed(seed)
    clip: Any = model.clip
    clip.logit_scale.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    clip.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        moved = shifted(images[rows], torch.rand(64, 2, generator=generator), 1)
        which = torch.randint(len(prompts), (64,), generator=generator).tolist()
        names = [model.classes[c] for c in labels[rows].tolist()]
        texts = [prompts[i].replace("{}", name) for i, name in zip(which, names, strict=True)]
        a = F.normalize(model.image_features(moved), dim=-1)
        b = F.normalize(model._text_features(texts), dim=-1)
        logits = a @ b.T / ZETA
        match = (labels[rows][:, None] == labels[rows]).float()
        match = match / match.sum(1, keepdim=True)
        loss = -(match * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clip.eval()
    model.ask(prompts, ZETA)


def caption_teacher(images: Tensor, labels: Tensor, seed: int) -> PromptClassifier:
    """A small CLIPModel that has read captions of 8x8 digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PromptClassifier(*tiny_clip(WORDS, PROMPTS, 8, 2), WORDS)
        train_clip(model, images, labels, PROMPTS, seed, steps=400, lr=2e-3)
    return model.eval()
