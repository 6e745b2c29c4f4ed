"""LightGen's masked-autoregressive text-to-image network (arXiv 2503.08619; MAR, arXiv 2406.11838): an encoder of the
visible tokens, a decoder that puts mask tokens between them, a stack of text cross-attention, a diffusion head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.errors import UserError
from stillroom.networks.token_head import Prediction, Respaced, TokenDiffusionHead

Size = Literal["base", "large", "huge"]
PRESETS: dict[str, dict[str, int]] = {
    "base": {"width": 768, "heads": 12, "encoder_blocks": 12, "decoder_blocks": 12, "cross_blocks": 12},
    "large": {"width": 1024, "heads": 16, "encoder_blocks": 16, "decoder_blocks": 16, "cross_blocks": 16},
    "huge": {"width": 1280, "heads": 16, "encoder_blocks": 20, "decoder_blocks": 20, "cross_blocks": 20},
}
"""The released sizes; ``large`` is the one that the paper reports (0.79B parameters with its head)."""


def _at_least(low: int) -> Any:
    return field(default=None, metadata={"min": low})


@dataclass(frozen=True)
class MARSettings:
    """A network as a recipe describes it: a released size, and what differs from it (None: nothing does)."""

    preset: Size = "large"
    patch: int | None = _at_least(1)
    grid: tuple[int, int] | None = None
    width: int | None = _at_least(1)
    heads: int | None = _at_least(1)
    encoder_blocks: int | None = _at_least(0)
    decoder_blocks: int | None = _at_least(0)
    cross_blocks: int | None = _at_least(1)
    aligner_blocks: int | None = _at_least(0)
    mlp_ratio: float | None = _at_least(0)
    head_width: int | None = _at_least(1)
    head_blocks: int | None = _at_least(0)
    learned_variance: bool | None = None
    prediction: Prediction | None = None
    attention_dropout: float | None = _at_least(0)
    dropout: float | None = _at_least(0)
    position_std: float | None = _at_least(0)

    def make(self, **fixed: Any) -> MAR:
        """The network; ``fixed`` are settings that the data decide. Raises UserError for sizes that do not fit."""
        changed = {key: value for key, value in vars(self).items() if value is not None and key != "preset"}
        settings: dict[str, Any] = {**PRESETS[self.preset], **fixed, **changed}
        return MAR(**settings)


Memory = list[tuple[Tensor, Tensor]]
"""Keys and values ``[B, heads, T, width / heads]`` of the text, for each block of the cross-attention stack."""


class MaskedLoss(NamedTuple):
    """Per sample ``[B]``, averaged over its masked tokens and their draws; vb is None with fixed variance.
    z ``[B, M, W]``: what the head was told."""

    mse: Tensor
    vb: Tensor | None
    z: Tensor


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout, self.dropout = heads, attention_dropout, dropout
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``[B, N, parts * W]`` to ``parts`` times ``[B, heads, N, W / heads]``; N may be 0."""
        b, n, w = x.shape
        return x.view(b, n, parts, self.heads, w // parts // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """seen: bool, True where a query looks at a key; None: everywhere."""
        b, heads, n, width = q.shape
        dropped = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropped)
        y = self.out(y.transpose(1, 2).reshape(b, n, heads * width))
        return F.dropout(y, self.dropout, self.training)


class SelfAttention(Attention):
    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__(width, heads, attention_dropout, dropout)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.qkv(x), 3)
        return self.attend(q, k, v, seen)


class CrossAttention(Attention):
    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__(width, heads, attention_dropout, dropout)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.attend(self.split(self.q(x), 1)[0], keys, values)


class MLP(nn.Module):
    def __init__(self, width: int, ratio: float, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up, self.down = nn.Linear(width, int(width * ratio)), nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.gelu(self.up(x)), self.dropout, self.training)
        return F.dropout(self.down(h), self.dropout, self.training)


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, ratio: float, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = SelfAttention(width, heads, attention_dropout, dropout)
        self.mlp = MLP(width, ratio, dropout)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """``q = LN(x); h = q + attention(q, text); h + MLP(LN(h))``: the residual starts from the *normalised* query, as in
    the released code. Image tokens do not see each other here."""

    forward_methods: ClassVar[tuple[str, ...]] = ("remember",)

    def __init__(self, width: int, heads: int, ratio: float, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm_q, self.norm_text, self.norm_mlp = norm(width), norm(width), norm(width)
        self.attention = CrossAttention(width, heads, attention_dropout, dropout)
        self.mlp = MLP(width, ratio, dropout)

    def remember(self, text: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.attention.split(self.attention.kv(self.norm_text(text)), 2)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.norm_q(x)
        h = q + self.attention(q, keys, values)
        return h + self.mlp(self.norm_mlp(h))


class MAR(nn.Module):
    """Text and some tokens of an image to the other tokens.

    channels, patch: a latent ``[B, channels, H, W]`` is cut into tokens of ``channels * patch^2`` numbers.
    grid: (rows, columns) of tokens that the three position tables are stored for; other grids get them resized.
    text_width: of the text features. aligner_blocks: transformer blocks of the text aligner.
    head_width, head_blocks, learned_variance, prediction: of the diffusion head.
    attention_dropout, dropout: of the transformer blocks. position_std: initial scale of the position tables; 0.02 is
    the paper's, a small network on a small grid learns places sooner from 0.5.

    Raises UserError for sizes that do not fit each other.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("remember", "plan", "fill")
    """What a sampler asks besides ``forward``: a sharded network gathers its weights there too."""

    def __init__(
        self,
        channels: int = 16,
        patch: int = 2,
        grid: Sequence[int] = (16, 16),
        text_width: int = 4096,
        width: int = 1024,
        heads: int = 16,
        encoder_blocks: int = 16,
        decoder_blocks: int = 16,
        cross_blocks: int = 16,
        aligner_blocks: int = 6,
        mlp_ratio: float = 4.0,
        head_width: int = 1536,
        head_blocks: int = 8,
        learned_variance: bool = True,
        attention_dropout: float = 0.1,
        dropout: float = 0.1,
        position_std: float = 0.02,
        prediction: Prediction = "eps",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            key: value for key, value in locals().items() if key not in ("self", "__class__")
        } | {"grid": list(grid)}
        if width % heads:
            raise UserError(
                f"MAR's width {width} does not split into {heads} heads", cure="choose heads that divide it"
            )
        if cross_blocks < 1:
            raise UserError(
                "a MAR without cross-attention blocks cannot read text", cure="set cross_blocks to 1 or more"
            )
        if len(grid) != 2 or min(grid) < 1:
            raise UserError(f"MAR's grid must be rows and columns of tokens, got {grid}", cure="for example [16, 16]")
        self.channels, self.patch, self.grid = channels, patch, (int(grid[0]), int(grid[1]))
        self.token_dim, self.width, self.position_std = channels * patch**2, width, position_std
        places = self.grid[0] * self.grid[1]

        def blocks(kind: type[nn.Module], count: int) -> nn.ModuleList:
            return nn.ModuleList(kind(width, heads, mlp_ratio, attention_dropout, dropout) for _ in range(count))

        self.align_in = nn.Sequential(
            nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.align_blocks, self.align_norm = blocks(Block, aligner_blocks), norm(width)
        self.null_text = nn.Parameter(torch.empty(1, 1, width))
        self.encoder_in, self.encoder_in_norm = nn.Linear(self.token_dim, width), norm(width)
        self.encoder_positions = nn.Parameter(torch.empty(1, places, width))
        self.encoder_blocks, self.encoder_norm = blocks(Block, encoder_blocks), norm(width)
        self.decoder_in = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_positions = nn.Parameter(torch.empty(1, places, width))
        self.decoder_blocks, self.decoder_norm = blocks(Block, decoder_blocks), norm(width)
        self.cross_in = nn.Linear(width, width)
        self.cross_positions = nn.Parameter(torch.empty(1, places, width))
        self.cross_blocks, self.cross_norm = blocks(CrossBlock, cross_blocks), norm(width)
        self.head = TokenDiffusionHead(
            self.token_dim, width, head_width, head_blocks, learned_variance, prediction=prediction
        )
        self.reset()

    def reset(self) -> None:
        """Xavier for products, normal for learned vectors, the head by its own rule."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for vector in (self.null_text, self.mask_token):
            nn.init.normal_(vector, std=0.02)
        for table in (self.encoder_positions, self.decoder_positions, self.cross_positions):
            nn.init.normal_(table, std=self.position_std)
        self.head.reset()

    # --- latents and tokens ---------------------------------------------------------------------------------------
    def grid_of(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of latents ``[B, C, H, W]``. Raises UserError where they do not fit."""
        channels, height, width = latents.shape[1:]
        if channels != self.channels or height % self.patch or width % self.patch:
            raise UserError(
                f"latents of {channels}x{height}x{width} do not fit a MAR of {self.channels} channels "
                f"and {self.patch}x{self.patch} patches",
                cure="use the codec and an image size that the network was made for",
            )
        return height // self.patch, width // self.patch

    def tokens(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, N, C p p]``, row by row."""
        (rows, columns), p = self.grid_of(latents), self.patch
        x = latents.reshape(len(latents), self.channels, rows, p, columns, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), rows * columns, self.token_dim)

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of :meth:`tokens`."""
        (rows, columns), p = grid, self.patch
        b = tokens.shape[0]  # len() would fix the batch of an exported network
        x = tokens.reshape(b, rows, columns, self.channels, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(b, self.channels, rows * p, columns * p)

    # --- the network's parts --------------------------------------------------------------------------------------
    def positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """The position table ``[1, N, W]`` for ``grid``: bicubic, with DINO's 0.1 that keeps rounding from costing a
        row."""
        if grid == self.grid:
            return table
        rows, columns = self.grid
        image = table.reshape(1, rows, columns, self.width).permute(0, 3, 1, 2)
        scale = ((grid[0] + 0.1) / rows, (grid[1] + 0.1) / columns)
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
        assert image.shape[2:] == grid
        return image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], self.width)

    def align(self, text: Tensor) -> Tensor:
        """Text features ``[B, T, text_width]`` to ``[B, T, W]``."""
        c = self.align_in(text)
        for block in self.align_blocks:
            c = block(c)
        return self.align_norm(c)

    def keys_and_values(self, aligned: Tensor) -> Memory:
        return [block.remember(aligned) for block in self.cross_blocks]  # type: ignore[operator]

    def decode(self, tokens: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the visible tokens ``visible [B, V]`` (indices; V may be 0) of ``tokens [B, N, d]`` say about every
        place: ``[B, N, W]``. The text has no part in it."""
        x = self.encoder_in(take(tokens, visible))
        x = self.encoder_in_norm(x + take(self.positions(self.encoder_positions, grid).expand(len(x), -1, -1), visible))
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_in(self.encoder_norm(x))
        places = self.mask_token.to(x.dtype).expand(len(x), tokens.shape[1], -1)
        x = places.scatter(1, visible[..., None].expand_as(x), x) + self.positions(self.decoder_positions, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)

    def cross(self, decoded: Tensor, at: Tensor, memory: Memory, grid: tuple[int, int]) -> Tensor:
        """``z [K B, M, W]`` at the places ``at [B, M]``, for ``K B`` rows of text, of which row ``k B + i`` goes with
        sample i. Only the places asked for are computed: no place sees another here."""
        x = self.cross_in(take(decoded, at))
        x = x + take(self.positions(self.cross_positions, grid).expand(len(x), -1, -1), at)
        x = x.repeat(len(memory[0][0]) // len(x), 1, 1)
        for block, (keys, values) in zip(self.cross_blocks, memory, strict=True):
            x = block(x, keys, values)
        return self.cross_norm(x)

    # --- training -------------------------------------------------------------------------------------------------
    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        order: Tensor,
        masked: int,
        t: Tensor,
        eps: Tensor,
        drop: Tensor | None = None,
    ) -> MaskedLoss:
        """Denoising errors of masked tokens, with everything random given.

        latents: ``[B, C, H, W]``, clean. text: ``[B / k, T, text_width]``; with k > 1, row i serves the samples i,
        i + B / k, ... order: ``[B, N]``, a permutation of the places; its first ``masked`` are masked. t: integers
        ``[B, R, masked]``; eps: ``[B, R, masked, token_dim]``, R draws per token. drop: bool ``[B / k]``, whose text
        is replaced by the null text (after the aligner). Raises UserError where the latents do not fit.
        """
        grid, tokens = self.grid_of(latents), self.tokens(latents)
        aligned = self.align(text)
        if drop is not None:
            aligned = torch.where(drop[:, None, None], self.null_text.to(aligned.dtype), aligned)
        aligned = aligned.repeat(len(latents) // len(aligned), 1, 1)
        hidden = order[:, :masked]
        decoded = self.decode(tokens, order[:, masked:], grid)
        z = self.cross(decoded, hidden, self.keys_and_values(aligned), grid)
        mse, vb = self.head.errors(z, take(tokens, hidden), t, eps)
        return MaskedLoss(mse.mean((1, 2)), None if vb is None else vb.mean((1, 2)), z)

    # --- sampling -------------------------------------------------------------------------------------------------
    def remember(self, text: Tensor, given: bool = True, null: bool = False) -> Memory:
        """All that the text ``[B, T, text_width]`` contributes to a whole sampling: rows for the text itself (where
        ``given``), then rows for the null text (where ``null``)."""
        parts = [self.align(text)] if given else []
        if null:
            parts.append(self.null_text.expand(len(text), text.shape[1], -1))
        return self.keys_and_values(torch.cat(parts))

    def plan(self, head_steps: int) -> tuple[Respaced, Tensor]:
        """What every token sampled in ``head_steps`` steps needs (see :meth:`TokenDiffusionHead.plan`)."""
        return self.head.plan(head_steps)

    def fill(
        self,
        tokens: Tensor,
        visible: Tensor,
        at: Tensor,
        memory: Memory,
        noise: Tensor,
        plan: tuple[Respaced, Tensor],
        grid: tuple[int, int],
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        clip: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One step of generation: tokens ``[B, M, d]`` for the places ``at [B, M]``, given those at ``visible``.

        memory: of :meth:`remember`, with null rows where ``guidance`` is to act. noise: unit, ``[B, M, d]``. The
        encoder and the decoder, which do not see the text, run once for both halves of the guidance.
        """
        z = self.cross(self.decode(tokens, visible, grid), at, memory, grid)
        z = z.reshape(-1, *noise.shape[:2], self.width).float()
        return self.head.sample(
            z, noise, plan, guidance=guidance, temperature=temperature, clip=clip, generator=generator
        )


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values [B, N, d]`` at ``index [B, M]``: ``[B, M, d]``."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
