"""A frozen text encoder whose states on known texts were computed once: as a teacher it costs next to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STATES, STARTS = "states", "starts"


class StoredStates:
    """States of texts, found by their tokens. Copies of a network share them.

    ids: int64 ``[N, L]``, padded at the end; lengths: ``[N]``. stored: what :func:`stored_states` made of them.
    """

    def __init__(self, ids: Tensor, lengths: Tensor, stored: Mapping[str, Tensor]) -> None:
        self.states, self.starts = stored[STATES], stored[STARTS].tolist()
        rows = zip(ids.tolist(), lengths.tolist(), strict=True)
        self.places = {tuple(row[:length]): place for place, (row, length) in enumerate(rows)}

    def __deepcopy__(self, memo: Any) -> StoredStates:
        return self

    def find(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """float32 ``[layers, B, L, D]``, 0 where ``mask [B, L]`` is; None where a text is not known."""
        keep = mask.bool()
        texts = [tuple(row[seen].tolist()) for row, seen in zip(ids, keep, strict=True)]
        if any(text not in self.places for text in texts):
            return None
        found = self.states.new_zeros(len(self.states), *ids.shape, self.states.shape[-1], dtype=torch.float32)
        for row, text in enumerate(texts):
            start = self.starts[self.places[text]]
            found[:, row, keep[row]] = self.states[:, start : start + len(text)].float()
        return found


class Recall(nn.Module):
    """Stands where blocks stood: what leaves it is the state that is known already."""

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return state


class StoredEncoder(nn.Module):
    """A ``BertForSequenceClassification`` of whose blocks the outputs of some are kept: those alone are its ``blocks``.

    layers: the blocks that are kept, from 1, the last one last. A batch with an unknown text goes through the network.
    Answers are logits ``[B, classes]``.
    """

    def __init__(self, network: Any, layers: Sequence[int], known: StoredStates) -> None:
        super().__init__()
        self.network, self.layers, self.known = network, tuple(layers), known
        self.blocks = nn.ModuleList(Recall() for _ in layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        body = self.network.base_model
        x = body.embeddings(input_ids=input_ids)
        states = self.known.find(input_ids, attention_mask)
        if states is None:
            states = kept_layers(self.network, input_ids, attention_mask, self.layers)
        for block, state in zip(self.blocks, states, strict=True):
            x = block(x, state)
        return self.network.classifier(body.pooler(x))


def kept_layers(network: Any, ids: Tensor, mask: Tensor, layers: Sequence[int]) -> Tensor:
    """Outputs of these blocks, ``[layers, B, L, D]``."""
    found = network.base_model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    return torch.stack([found[layer] for layer in layers])


@torch.no_grad()
def stored_states(
    network: nn.Module, ids: Tensor, lengths: Tensor, layers: Sequence[int], batch: int = 64
) -> dict[str, Tensor]:
    """``states`` float16 ``[layers, tokens, D]``, text after text without padding, and ``starts`` int64 ``[N]``, where
    each begins. Texts of like length go through the network together."""
    ends = lengths.cumsum(0)
    states = None
    for rows in lengths.argsort(stable=True).split(batch):
        longest = int(lengths[rows].max())
        mask = torch.arange(longest) < lengths[rows, None]
        found = kept_layers(network, ids[rows, :longest], mask, layers).half()
        if states is None:
            states = found.new_empty(len(layers), int(ends[-1]), found.shape[-1])
        for place, row in enumerate(rows.tolist()):
            length = int(lengths[row])
            states[:, int(ends[row]) - length : int(ends[row])] = found[:, place, :length]
    assert states is not None
    return {STATES: states, STARTS: ends - lengths}
