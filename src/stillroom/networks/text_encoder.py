"""A frozen text encoder: a tokenizer and a T5 encoder, as they lie in the folder of a text-to-image model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UserError, nearest, shortened
from stillroom.folders.pretrained import load_pretrained
from stillroom.folders.transformers_layout import auto_tokenizer, check_pads, token_limit
from stillroom.folders.weights import save_pretrained
from stillroom.parsing import read_json
from stillroom.surgery.freezing import frozen
from stillroom.surgery.modules import device_of, weights_hash

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
LENGTH = 128
"""Tokens of a caption where the tokenizer itself knows no shorter limit: LightGen's (arXiv 2503.08619)."""

CONDITIONS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
"""What :meth:`TextEncoder.encode` gives, under the names that diffusers' networks take."""


class TextEncoder(nn.Module):
    """Captions to features; frozen. Any tokenizer of ``transformers`` beside any ``T5EncoderModel`` will do.

    length: tokens of a caption, the end token included; shorter captions are padded.
    Raises UserError when the tokenizer knows more words than the network has embeddings.
    """

    def __init__(self, tokenizer: Any, network: nn.Module, length: int = LENGTH) -> None:
        super().__init__()
        check_pads(tokenizer, "the text encoder")
        self.tokenizer, self.network, self.length = tokenizer, frozen(network.float()), int(length)
        rows = int(self._config.vocab_size)
        if len(tokenizer) > rows:
            raise UserError(
                f"the tokenizer knows {len(tokenizer):,} tokens, but the text encoder has {rows:,} embeddings",
                cure=f"use the {TOKENIZER}/ and {TEXT_ENCODER}/ of one model",
            )

    @property
    def _config(self) -> Any:
        return self.network.config

    @property
    def width(self) -> int:
        """D: numbers per token."""
        return int(self._config.d_model)

    @cached_property
    def name(self) -> str:
        """``t5@1a2b3c4d``: the first eight hex digits of the weights' SHA-256."""
        return f"t5@{weights_hash(self.network)[:8]}"

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch: int = 256) -> dict[str, Tensor]:
        """``encoder_hidden_states [B, L, D]`` float32 (zero where padded), ``encoder_attention_mask [B, L]`` bool (True
        = a token of the caption) and ``pooled_projections [B, D]`` (their mean over the caption's tokens).

        The empty caption is the unconditional one: its only token is the end. Captions are not checked here (see
        :meth:`check`); what is longer than L tokens is cut.
        """
        device, found = device_of(self.network), []
        for start in range(0, len(captions), batch):
            tokens = self.tokenizer(
                list(captions[start : start + batch]), padding="max_length", max_length=self.length, truncation=True,
                return_attention_mask=True, return_tensors="pt",
            ).to(device)  # fmt: skip
            mask = tokens["attention_mask"].bool()
            states = self.network(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state.float()
            states = states * mask.unsqueeze(-1)
            found.append((states, mask, states.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)))
        return {name: torch.cat(parts) for name, parts in zip(CONDITIONS, zip(*found, strict=True), strict=True)}

    # --- what can be said -----------------------------------------------------------------------------------------
    def unknown_words(self, caption: str) -> list[str]:
        """The words of ``caption`` that the tokenizer has no token for, each once, in order."""
        unknown = self.tokenizer.unk_token_id
        words = list(dict.fromkeys(re.findall(r"\S+", caption)))
        tokens = self.tokenizer(words, add_special_tokens=False, truncation=False).input_ids if words else []
        return [word for word, parts in zip(words, tokens, strict=True) if unknown in parts]

    def check(self, caption: Any) -> None:
        """Raises UserError for a caption that is not text, is empty, is longer than L tokens or has unknown words."""
        if not isinstance(caption, str):
            raise UserError(f"a caption is text, not {type(caption).__name__}", cure="give one string per image")
        if not caption.strip():
            raise UserError("the caption is empty", cure="say what the image is to show")
        tokens = len(self.tokenizer(caption, truncation=False, verbose=False).input_ids)
        if tokens > self.length:
            raise UserError(
                f"the caption {shortened(caption)} has {tokens:,} tokens, {self.length} are read",
                cure="say it in fewer words",
            )
        if unknown := self.unknown_words(caption):
            special = set(self.tokenizer.all_special_tokens)
            known = sorted(word for word in self.tokenizer.get_vocab() if word not in special)
            hints = ", ".join(f"{shortened(word)}{nearest(word.lower()[:40], known)}" for word in unknown)
            raise UserError(
                f"the caption {shortened(caption)} has words that the text encoder was never shown: {hints}",
                cure=f"it knows {', '.join(known)}" if len(known) <= 100 else "use common words",
            )

    # --- folders --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Write ``text_encoder/`` (safetensors) and ``tokenizer/`` into ``folder``."""
        folder = Path(folder)
        save_pretrained(self.network, folder / TEXT_ENCODER)
        self.tokenizer.save_pretrained(folder / TOKENIZER)

    @classmethod
    def load(cls, folder: str | Path, length: int | None = None) -> TextEncoder:
        """Read ``text_encoder/`` and ``tokenizer/`` of ``folder``. ``length`` defaults to the tokenizer's own limit, or
        to 128 tokens where that is larger. Raises UserError for what is missing, damaged or does not fit."""
        from transformers import T5EncoderModel

        folder = Path(folder)
        kinds = read_json(folder / TEXT_ENCODER / "config.json").get("architectures") or ["T5EncoderModel"]
        if not any(kind.startswith(("T5", "MT5", "UMT5")) for kind in kinds):
            raise UserError(f"{folder / TEXT_ENCODER} holds a {kinds[0]}", cure="give a T5EncoderModel")
        read_json(folder / TOKENIZER / "tokenizer_config.json")
        tokenizer: Any = auto_tokenizer(folder / TOKENIZER)
        network = load_pretrained(T5EncoderModel, folder / TEXT_ENCODER)
        return cls(tokenizer, network, length or token_limit(tokenizer, LENGTH))
