"""Small texts, a tokenizer and encoders of a few thousand weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from stillroom.data.texts import TextData, Texts

WORDS = ("red", "blue", "dog", "cat", "runs", "sleeps", "a", "the", "small", "old", "stone", "river")
CLASSES = ["animal", "thing", "deed"]


@functools.cache
def tokenizer(words: tuple[str, ...] = WORDS) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=16,
    )  # fmt: skip


def _odd(model: Any, special: str = "[CLS] $A [SEP]", **settings: Any) -> Any:
    """A tokenizer around a model of ``tokenizers`` whose first tokens are those of :func:`tokenizer`."""
    from tokenizers import Tokenizer, pre_tokenizers, processors

    made = Tokenizer(model)
    made.pre_tokenizer = settings.pop("pre", pre_tokenizers.Whitespace())
    if special:
        made.post_processor = processors.TemplateProcessing(special, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**names, "mask_token": "[MASK]", **settings})


def odd_tokenizers() -> dict[str, Any]:
    """Tokenizers as people have them, by what is odd about them, of at most 19 tokens."""
    from tokenizers import models, pre_tokenizers

    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    vocabulary = {name: i for i, name in enumerate(names)}
    words = models.WordLevel(vocabulary, unk_token="[UNK]")
    pieces = [(name, 0.0) for name in names[:5]] + [(f"▁{word}", -1.0) for word in WORDS]
    letters = {name: i for i, name in enumerate((*names[:5], "Ġ", *"abcdelnor"))}
    made = {
        "no padding token": _odd(words, pad_token=None),
        "padding is the end": _odd(words, pad_token="[SEP]"),
        "padding is unknown": _odd(words, pad_token="[UNK]"),
        "left padding": _odd(words, padding_side="left"),
        "no special tokens": _odd(words, special=""),
        "no limit": _odd(words, model_max_length=int(1e30)),
        "no unknown token": _odd(models.WordLevel(vocabulary), special="", unk_token=None),
        "drops the unknown": _odd(models.BPE(letters, []), special="", unk_token=None),
        "bytes": _odd(models.BPE(letters, [], unk_token="[UNK]"), pre=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "pieces": _odd(models.Unigram(pieces, unk_id=1), pre=pre_tokenizers.Metaspace()),
        "no mask among its inputs": _odd(words, model_input_names=["input_ids"]),
        "added tokens": _odd(words),
    }
    made["added tokens"].add_tokens(["gold", "silver"])
    return made


def encoder(
    layers: int = 2, width: int = 8, heads: int = 2, seed: int = 0, classes: int = 3, vocabulary: int = 17, **more: Any
) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=32, num_labels=classes, **more,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def texts(n: int = 30, general: int = 12) -> Texts:
    generator = torch.Generator().manual_seed(0)

    def one() -> str:
        length = int(torch.randint(2, 7, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    labels = torch.arange(n) % 3
    return Texts([one() for _ in range(n)], labels, CLASSES, "tiny", general=[one() for _ in range(general)])


def data(n: int = 30) -> TextData:
    return texts(n).tokenised(tokenizer(), 12)
