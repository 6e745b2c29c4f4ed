"""What distillation reads of a text encoder: hidden states, attention scores before their softmax, logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UserError
from stillroom.losses.features import relation
from stillroom.networks.recognition import class_logits
from stillroom.surgery.taps import Tap, Taps, block_paths, module_paths, projection_path, split_heads

WITHOUT_ATTENTION = "leave attention out: options.attention=none"


@dataclass
class Reading:
    """Of one batch. hidden: layer -> ``[B, L, D]``. scores: layer -> ``[B, heads, L, L]``, ``q k' / sqrt(d)``, without
    mask. logits: ``[B, classes]``."""

    logits: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)


class EncoderReader:
    """Reads chosen layers of an encoder: any text classifier of transformers, or a module that is called with
    ``input_ids`` and ``attention_mask`` and holds its blocks in one ``ModuleList``.

    Layer 0 is what goes into the first block (the embeddings), layer l the output of block l, counted from 1.
    hidden, attention: the layers whose states and whose attention scores are read.
    Raises UserError where the network has no such blocks, projections or number of heads.
    """

    def __init__(self, network: nn.Module, hidden: Sequence[int] = (), attention: Sequence[int] = ()) -> None:
        self.network, self.hidden, self.attention = network, tuple(hidden), tuple(attention)
        blocks = block_paths(network)
        layers = getattr(getattr(network, "config", None), "num_hidden_layers", len(blocks))
        if len(blocks) == 1 < layers:
            raise UserError(
                f"{type(network).__name__} runs one block {layers} times",
                cure="give an encoder whose layers have weights of their own",
            )
        taps: dict[str, str | Tap] = {}
        for layer in self.hidden:
            taps[f"h{layer}"] = Tap(blocks[0], "input") if layer == 0 else blocks[layer - 1]
        for layer in self.attention:
            for part, which in (("q", "query"), ("k", "key")):
                taps[f"{part}{layer}"] = projection_path(network, blocks[layer - 1], which, cure=WITHOUT_ATTENTION)
        self.heads = heads_of(network) if self.attention else 0
        self.taps = Taps(network, taps) if taps else None

    def __call__(self, batch: Mapping[str, Any]) -> Reading:
        inputs = text_inputs(batch)
        if self.taps is None:
            return Reading(class_logits(self.network, inputs))
        with self.taps.recording() as found:
            logits = class_logits(self.network, inputs)
        hidden = {layer: found[f"h{layer}"] for layer in self.hidden}
        scores = {
            layer: relation(*(split_heads(found[f"{part}{layer}"], self.heads) for part in "qk"))
            for layer in self.attention
        }
        return Reading(logits, hidden, scores)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tap (``h0``, ``h1``, ..., ``q1``, ``k1``) on two tokens."""
        if self.taps is None:
            return {}
        ids = torch.ones(1, 2, dtype=torch.long, device=next(self.network.parameters()).device)
        return self.taps.shapes(input_ids=ids, attention_mask=torch.ones_like(ids))


def text_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a text encoder is called with."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].long()}


def depth(network: nn.Module) -> int:
    """Number of blocks."""
    return len(block_paths(network))


def positions(network: nn.Module) -> int:
    """The longest text that a network reads; 0 where it does not say. RoBERTa and its like count places from that of
    the padding on."""
    limit = getattr(getattr(network, "config", None), "max_position_embeddings", 0)
    if not isinstance(limit, int):
        return 0
    return limit - (1 + padding if (padding := counted_from(network)) is not None else 0)


def counted_from(network: nn.Module) -> int | None:
    """The padding token by which a network counts places, if it does."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.padding_idx
    return None


def heads_of(network: nn.Module) -> int:
    """Attention heads of a block, by the network's config or its own attribute ``num_attention_heads``."""
    for holder in (getattr(network, "config", None), network):
        for name in ("num_attention_heads", "n_heads"):
            if isinstance(heads := getattr(holder, name, None), int):
                return heads
    raise UserError(
        f"{type(network).__name__} does not say how many attention heads it has",
        cure="give it an attribute num_attention_heads, or leave attention out: options.attention=none",
    )


def token_table(network: nn.Module) -> nn.Embedding:
    """The embedding that token ids go through: transformers' input embedding, or a module's largest one."""
    find = getattr(network, "get_input_embeddings", None)
    found = find() if callable(find) else None
    if isinstance(found, nn.Embedding):
        return found
    tables = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise UserError(f"{type(network).__name__} has no embedding of tokens", cure="give a text encoder")
    return max(tables, key=lambda table: table.num_embeddings)


@contextmanager
def mixed_inputs(network: nn.Module, order: Tensor, weight: Tensor) -> Iterator[None]:
    """While it lasts, each row's token embeddings are ``weight * its own + (1 - weight) * those of row order[i]``:
    mixup of texts. order ``[B]``, weight ``[B]`` in [0, 1]."""

    def mix(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        share = weight[:, None, None].to(output)
        return share * output + (1 - share) * output[order]

    handle = token_table(network).register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def copy_layers(student: nn.Module, teacher: nn.Module, layers: Sequence[int]) -> None:
    """Start a student of the teacher's width from the teacher's blocks ``layers`` (one for each of its own, from 0) and
    from its embeddings. Raises UserError where the shapes differ."""
    mine, theirs = module_paths(student), module_paths(teacher)
    pairs = [
        (mine[a], theirs[b])
        for a, b in zip(block_paths(student), (block_paths(teacher)[i] for i in layers), strict=True)
    ]
    embeddings = [
        next((modules[path] for path in modules if path.rsplit(".", 1)[-1] == "embeddings"), token_table(network))
        for modules, network in ((mine, student), (theirs, teacher))
    ]
    for to, source in (*pairs, (embeddings[0], embeddings[1])):
        try:
            to.load_state_dict(copy.deepcopy(source.state_dict()))
        except RuntimeError as problem:
            raise UserError(
                f"the student cannot start from the teacher's layers: {str(problem).splitlines()[-1].strip()}",
                cure="give both the same width and vocabulary, or start at random: options.start=random",
            ) from None
