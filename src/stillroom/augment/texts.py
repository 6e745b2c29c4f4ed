"""Texts changed as token ids: random edits, replacement in context, and the weights of mixup. All randomness comes from
a turn's draws."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from stillroom.draws import Draws

EDITS = ("replace", "insert", "swap", "delete")


def random_edits(
    ids: Tensor,
    mask: Tensor,
    draw: Draws,
    rate: float,
    neighbours: Tensor,
    special: Collection[int],
    pad: int,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(ids [B, l], mask [B, l])`` in which each token was edited with probability ``rate``, in one of four ways with
    equal chances (arXiv 1901.11196): replaced by a neighbour, followed by a neighbour, swapped with the next token,
    or deleted.

    ids ``[B, L]`` with its mask, True where a token counts. neighbours: int ``[V, k]``, tokens of like meaning
    (:func:`nearest_tokens`). Special tokens stay, and so does the last ordinary token of a row. longest: no token is
    put into a text that would then be longer than this (0: no limit).
    """
    u = draw.uniform(len(ids), ids.shape[1], 3).tolist()
    keep = set(special)
    rows: list[list[int]] = []
    for row, (tokens, count) in enumerate(zip(ids.tolist(), mask.sum(1).tolist(), strict=True)):
        tokens, found, at = tokens[:count], [], 0
        ordinary = sum(token not in keep for token in tokens)
        while at < count:
            token, (chance, kind, which) = tokens[at], u[row][at]
            at += 1
            if token in keep or chance >= rate:
                found.append(token)
                continue
            like = int(neighbours[token, int(which * neighbours.shape[1])])
            edit = EDITS[int(kind * len(EDITS))]
            if edit == "replace":
                found.append(like)
            elif edit == "insert" and (not longest or len(found) + 2 + count - at <= longest):
                found += [token, like]
            elif edit == "swap" and at < count and tokens[at] not in keep:
                found += [tokens[at], token]
                at += 1
            elif edit == "delete" and ordinary > 1:
                ordinary -= 1
            else:
                found.append(token)
        rows.append(found)
    width = max(map(len, rows))
    edited = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=ids.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return edited, torch.arange(width, device=ids.device) < lengths[:, None]


@torch.no_grad()
def contextual_replacement(
    ids: Tensor, mask: Tensor, draw: Draws, rate: float, masked_lm: nn.Module, mask_id: int, special: Collection[int]
) -> Tensor:
    """``ids [B, L]`` in which each ordinary token was, with probability ``rate``, hidden and then drawn anew from what
    a masked language model makes of the rest (arXiv 1812.06705, without its condition on the label). All hidden tokens
    of a text are drawn at once; the special ones are neither hidden nor drawn.

    mask ``[B, L]``, True where a token counts. masked_lm answers ``input_ids`` and ``attention_mask`` with
    ``logits [B, L, V]``.
    """
    barred = torch.tensor(sorted(special), device=ids.device, dtype=torch.long)
    u = draw.uniform(len(ids), ids.shape[1], 2).to(ids.device)
    hidden = (u[..., 0] < rate) & mask & ~torch.isin(ids, barred)
    logits = masked_lm(input_ids=ids.masked_fill(hidden, mask_id), attention_mask=mask.long()).logits[hidden].float()
    logits[:, barred] = -torch.inf
    up_to = logits.softmax(-1).double().cumsum(-1)
    found = torch.searchsorted(up_to, (u[..., 1][hidden].double() * up_to[:, -1])[:, None], right=True)
    return ids.masked_scatter(hidden, found[:, 0])


@torch.no_grad()
def nearest_tokens(table: Tensor, special: Collection[int], count: int = 8, block: int = 1024) -> Tensor:
    """int64 ``[V, count]``: the tokens whose embeddings have the largest cosine with each token's, itself and special
    tokens left out. table ``[V, D]``."""
    unit = torch.nn.functional.normalize(table.float(), dim=-1)
    barred = torch.tensor(sorted(special), device=table.device, dtype=torch.long)
    found = []
    for start in range(0, len(unit), block):
        likeness = unit[start : start + block] @ unit.T
        likeness[:, barred] = -torch.inf
        rows = torch.arange(len(likeness), device=table.device)
        likeness[rows, rows + start] = -torch.inf
        found.append(likeness.topk(count, dim=-1).indices)
    return torch.cat(found).cpu()


def mixup_weights(rows: int, draw: Draws, concentration: float) -> Tensor:
    """One ``Beta(a, a)`` weight for each row, ``[rows]`` float32 (arXiv 1710.09412)."""
    random = np.random.default_rng(draw.seed())
    weights = random.beta(concentration, concentration, draw.total)[draw.rows]
    assert len(weights) == rows
    return torch.from_numpy(weights).float()
