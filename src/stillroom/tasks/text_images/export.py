"""A text-to-image generator for other runtimes: a denoiser's call, or a masked generator's four parts.

A masked generator's sampler is a loop whose steps differ in shape, so the loop stays outside the files, and each file
takes all tokens under a mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.masking import MaskedSampler, token_counts
from stillroom.errors import UserError
from stillroom.networks.mar import MAR
from stillroom.networks.text_encoder import TOKENIZER, TextEncoder
from stillroom.networks.token_head import TokenDiffusionHead, respaced, time_features
from stillroom.task import Part
from stillroom.tasks.parts import (
    Decode,
    denoiser_facts,
    denoiser_parts,
    exported_denoiser,
    text_features,
    token_ids,
    with_parts,
)

if TYPE_CHECKING:
    from stillroom.tasks.text_images.model import TextImageGenerator


def parts(model: TextImageGenerator, whole: bool) -> dict[str, Part]:
    """Of a masked generator :func:`masked_parts`; of a denoiser ``model``, and ``generator`` for the ``whole``."""
    if not isinstance(model.network, Denoiser):
        return masked_parts(model, whole)
    denoiser = exported_denoiser(model.network)
    names, features = tuple(denoiser.null), text_features(model.cond([""]))
    return denoiser_parts(denoiser, model.sampler, names, features, whole, model.space.codec)


def facts(model: TextImageGenerator) -> dict[str, Any]:
    if not isinstance(model.network, Denoiser):
        return masked_facts(model)
    return denoiser_facts(exported_denoiser(model.network), model.sampler)


def extras(model: TextImageGenerator, folder: Path) -> None:
    """The tokenizer, for a masked generator's ``text_encoder``."""
    if not isinstance(model.network, Denoiser):
        model.space.text.tokenizer.save_pretrained(folder / TOKENIZER)


# --- a masked generator -----------------------------------------------------------------------------------------------
class TextStates(nn.Module):
    """Ids and mask of captions ``[B, L]`` to the states ``[B, L, W]`` that the masked network reads."""

    def __init__(self, text: TextEncoder, mar: MAR) -> None:
        super().__init__()
        self.network, self.mar = text.network, with_parts(mar, "align_in", "align_blocks", "align_norm")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.network(input_ids=input_ids, attention_mask=attention_mask.bool()).last_hidden_state.float()
        return self.mar.align(states * attention_mask.unsqueeze(-1))


class Conditions(nn.Module):
    """What the known ones of ``tokens [B, N, d]`` (``known [B, N]``, bool) and the text's states say about every place:
    ``conditions [B, N, W]``, and the same without the text, ``unconditional``.

    The encoder takes all places, of which a known one sees the known ones alone; what it says about the others is
    dropped.
    """

    encoder_positions: Tensor
    decoder_positions: Tensor
    cross_positions: Tensor
    itself: Tensor

    def __init__(self, mar: MAR, grid: tuple[int, int]) -> None:
        super().__init__()
        self.network = with_parts(
            mar, "encoder_in", "encoder_in_norm", "encoder_blocks", "encoder_norm", "mask_token", "decoder_in",
            "decoder_blocks", "decoder_norm", "cross_in", "cross_blocks", "cross_norm", "null_text",
        )  # fmt: skip
        for name in ("encoder_positions", "decoder_positions", "cross_positions"):
            self.register_buffer(name, mar.positions(getattr(mar, name), grid).detach().clone())
        self.register_buffer("itself", torch.eye(grid[0] * grid[1], dtype=torch.bool))

    def forward(self, tokens: Tensor, known: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        mar = self.network
        x = mar.encoder_in_norm(mar.encoder_in(tokens) + self.encoder_positions)
        # An unknown place sees itself as well: a softmax over nothing is not a number.
        seen = (known.unsqueeze(1) | self.itself).unsqueeze(1)
        for block in mar.encoder_blocks:
            x = block(x, seen)
        x = torch.where(known.unsqueeze(-1), mar.decoder_in(mar.encoder_norm(x)), mar.mask_token)
        x = x + self.decoder_positions
        for block in mar.decoder_blocks:
            x = block(x)
        x = mar.cross_in(mar.decoder_norm(x)) + self.cross_positions
        return self._cross(x, text), self._cross(x, mar.null_text.expand(text.shape[0], -1, -1))

    def _cross(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.network.cross_blocks:
            x = block(x, *block.remember(text))
        return self.network.cross_norm(x)


def models_conditions(
    mar: MAR, grid: tuple[int, int], tokens: Tensor, known: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as :class:`Conditions` by the model's own way, which gathers the known tokens: equally many in each
    row."""
    visible = known.long().argsort(dim=1, descending=True)[:, : int(known[0].sum())]
    everywhere = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    memory = mar.keys_and_values(torch.cat([text, mar.null_text.expand_as(text)]))
    given, null = mar.cross(mar.decode(tokens, visible, grid), everywhere, memory, grid).chunk(2)
    return given, null


class TokenHead(nn.Module):
    """The head: noisy tokens ``[B, d]``, times ``[B]`` (integers) and conditions ``[B, W]`` to the head's own ``output
    [B, d]`` (the noise in them, or v) and ``between [B, d]``: where between its bounds the logarithm of the step's
    variance lies (0: the lower)."""

    def __init__(self, head: TokenDiffusionHead) -> None:
        super().__init__()
        self.network = head

    def forward(self, noisy: Tensor, time: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        return self._answer(noisy, self.network.embed_time(time_features(time)), conditions)

    def as_the_model(self, noisy: Tensor, time: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        return self._answer(noisy, self.network.times(time), conditions)

    def _answer(self, noisy: Tensor, times: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        output, place = self.network(noisy, times + self.network.embed_z(conditions))
        return output, torch.zeros_like(output) if place is None else (place + 1) / 2


class DecodeTokens(nn.Module):
    """Tokens ``[B, N, d]`` to images ``[B, 3, H, W]`` in [-1, 1]."""

    def __init__(self, mar: MAR, grid: tuple[int, int], decode: Decode) -> None:
        super().__init__()
        self.mar, self.grid, self.network = with_parts(mar), grid, decode

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(self.mar.latents(tokens, self.grid))


def masked_parts(model: TextImageGenerator, whole: bool = False) -> dict[str, Part]:
    """``text_encoder``, ``transformer``, ``head``, ``decoder``. Raises UserError where the ``whole`` is asked for."""
    if whole:
        raise UserError("a masked generator is exported in parts, with a loop around them", cure="leave --whole out")
    text, codec, (mar, grid) = model.space.text, model.space.codec, masked_network(model)
    places, dim, length = grid[0] * grid[1], mar.token_dim, text.length
    head = TokenHead(mar.head)

    def masked(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        count = int(torch.randint(places, (), generator=generator))
        known = torch.rand(batch, places, generator=generator).argsort(1) < count
        tokens = torch.randn(batch, places, dim, generator=generator)
        return tokens, known, torch.randn(batch, length, mar.width, generator=generator)

    def noisy(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        time = torch.randint(mar.head.process.steps, (batch,), generator=generator)
        token, z = (torch.randn(batch, width, generator=generator) for width in (dim, mar.width))
        return token, time, z

    def drawn(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(batch, places, dim, generator=generator),)

    def conditions(tokens: Tensor, known: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return models_conditions(mar, grid, tokens, known, text)

    def pictures(tokens: Tensor) -> Tensor:
        return codec.decode(mar.latents(tokens, grid))

    return {
        "text_encoder": Part(
            TextStates(text, mar), ("input_ids", "attention_mask"), ("text",), token_ids(text.tokenizer, length)
        ),
        "transformer": Part(
            Conditions(mar, grid), ("tokens", "known", "text"), ("conditions", "unconditional"), masked,
            reference=conditions,
        ),
        "head": Part(
            head, ("noisy", "time", "conditions"), ("output", "between"), noisy, reference=head.as_the_model
        ),
        "decoder": Part(
            DecodeTokens(mar, grid, Decode(codec)), ("tokens",), ("images",), drawn, reference=pictures
        ),
    }  # fmt: skip


def masked_network(model: TextImageGenerator) -> tuple[MAR, tuple[int, int]]:
    """The network, and rows and columns of tokens of a picture."""
    mar = model.network
    assert isinstance(mar, MAR)
    return mar, mar.grid_of(torch.empty(1, *model.space.shape, device="meta"))


def masked_facts(model: TextImageGenerator) -> dict[str, Any]:
    """What a loop around the files needs (docs/export.md): the ``length`` of captions in tokens; how many ``tokens`` an
    image has, and their width; the ``steps``, in which the last of a random order are predicted, from how many are
    ``left`` to how many are left ``after``; and the ``head``'s own steps, the noisiest first
    (:class:`~stillroom.networks.token_head.Respaced`), each with how its answer becomes a clean token: ``x0_of_sample
    noisy + x0_of_output output``."""
    sampler, (mar, (rows, columns)) = model.sampler, masked_network(model)
    assert isinstance(sampler, MaskedSampler)
    counts, table = token_counts(rows * columns, sampler.steps), respaced(mar.head.process, sampler.head_steps)
    x0 = (table.signal, -table.noise) if mar.head.prediction == "v" else (1 / table.signal, -table.noise / table.signal)
    every = vars(table) | {"x0_of_sample": x0[0], "x0_of_output": x0[1]}
    fields = {name: values.tolist() for name, values in every.items()}
    fields["time"] = fields.pop("times")
    return {
        "sampler": sampler.to_dict(),
        "length": model.space.text.length,
        "tokens": [rows * columns, mar.token_dim],
        "steps": [
            {"left": left, "after": after, "guidance": sampler.guidance_at(1 - after / counts[0])}
            for left, after in zip(counts, counts[1:], strict=False)
        ],
        "head": [{name: values[i] for name, values in fields.items()} for i in reversed(range(len(table.times)))],
    }
