"""The engine of masked-token generators (MaskGIT, MAR, LightGen): which tokens are masked in training, in which order
and how many at a time they are predicted in sampling. Once predicted, a token stays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from stillroom.diffusion.denoiser import Cond
from stillroom.diffusion.sampling import Sampler
from stillroom.draws import Draws
from stillroom.errors import UserError

TEXT = "encoder_hidden_states"
"""The condition that masked generators read: text features ``[B, T, text_width]``. Padding is text like any other."""


class MaskedNetwork(Protocol):
    """What the sampler asks of a network. Tokens ``[B, N, d]``, places as indices ``[B, M]``."""

    def grid_of(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of latents ``[B, C, H, W]``."""

    def tokens(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, N, d]``, row by row."""

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of :meth:`tokens`."""

    def remember(self, text: Tensor, given: bool = True, null: bool = False) -> Any:
        """All that a text contributes to a whole sampling (keys and values): rows for the text itself where ``given``,
        then rows for the null text where ``null``."""

    def plan(self, head_steps: int) -> Any:
        """What every token sampled in ``head_steps`` steps of the head needs."""

    def fill(
        self,
        tokens: Tensor,
        visible: Tensor,
        at: Tensor,
        memory: Any,
        noise: Tensor,
        plan: Any,
        grid: tuple[int, int],
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        clip: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One step: tokens ``[B, M, d]`` for the places ``at``, given those at ``visible``, from unit ``noise``."""


@dataclass(frozen=True)
class MaskRatio:
    """The law of the share of tokens that a training step masks.

    law:
      - ``truncated-normal``: mean ``mean``, standard deviation ``std``, within [low, high] (MAR and LightGen);
      - ``cosine``: ``cos(pi u / 2)``, u uniform, within [low, high] (MaskGIT, arXiv 2202.04200).
    A small grid learns its later sampling steps, in which most tokens are visible, only under the cosine law with
    ``low: 0``.
    """

    law: Literal["truncated-normal", "cosine"] = "truncated-normal"
    mean: float = 1.0
    std: float = 0.25
    low: float = 0.7
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or self.std <= 0:
            raise ValueError(
                f"a mask ratio needs 0 <= low < high <= 1 and std > 0, got {self.low}, {self.high} and {self.std}"
            )

    def quantile(self, u: float) -> float:
        """The ratio at ``u`` in [0, 1): the law's quantile function (the cosine law's decreases)."""
        if self.law == "cosine":
            return min(max(math.cos(math.pi * u / 2), self.low), self.high)
        low, high = (
            0.5 * (1 + math.erf((edge - self.mean) / (self.std * math.sqrt(2)))) for edge in (self.low, self.high)
        )
        normal = torch.special.ndtri(torch.tensor(low + u * (high - low), dtype=torch.float64))
        return min(max(self.mean + self.std * float(normal), self.low), self.high)

    def sample(self, draw: Draws, tokens: int) -> int:
        """How many of ``tokens`` to mask: ONE number for the whole batch, at least 1, at most all."""
        return self.count(draw.index(1 << 24) / (1 << 24), tokens)

    def count(self, u: float, tokens: int) -> int:
        return min(max(math.ceil(self.quantile(u) * tokens), 1), tokens)


def random_orders(draw: Draws, tokens: int) -> Tensor:
    """A permutation of the places for each sample of the micro-batch, ``[B, tokens]``."""
    return draw.uniform(draw.local, tokens).argsort(1)


def token_counts(tokens: int, steps: int) -> list[int]:
    """How many tokens are still masked before each step and after the last: ``n_0 = tokens``, ``n_{s+1} = clamp(floor(
    tokens cos(pi/2 (s+1)/steps)), 1, n_s - 1)``, 0 at the end (arXiv 2406.11838). More steps than tokens are as many as
    there are tokens, one at a time. ``steps + 1`` numbers, strictly decreasing."""
    steps, counts = min(steps, tokens), [tokens]
    for s in range(1, steps):
        counts.append(max(1, min(math.floor(tokens * math.cos(math.pi / 2 * s / steps)), counts[-1] - 1)))
    return [*counts, 0]


@dataclass(frozen=True)
class MaskedSampler(Sampler):
    """Masked tokens are predicted a few at a time, in random order, each by a diffusion head of its own.

    steps: passes through the transformer. guidance: w; ``constant``, or ``linear``: ``1 + (w - 1) (share of tokens
    known after the step)``. temperature: of the head's noise. head_steps: of 1000. clip: > 0 bounds the head's x0.
    """

    name: ClassVar[str] = "masked"
    steps: int = 64
    guidance: float = 4.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    temperature: float = 1.0
    head_steps: int = 100
    clip: float = 0.0

    def __post_init__(self) -> None:
        for key, low, high in (("steps", 1, math.inf), ("head_steps", 1, 1000), ("temperature", 0, math.inf)):
            if not low <= getattr(self, key) <= high:
                allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"a masked sampler's {key} must be {allowed}, got {getattr(self, key)}")

    @property
    def nfe(self) -> int:
        """Passes through the transformer; the head takes ``head_steps`` small ones in each."""
        return self.steps * (1 if self.guidance in (0.0, 1.0) else 2)

    def shortest(self) -> MaskedSampler:
        return replace(self, steps=1, head_steps=1)

    def guidance_at(self, known: float) -> float:
        """w of the step after which the share ``known`` of the tokens is known."""
        return self.guidance if self.guidance_schedule == "constant" else 1 + (self.guidance - 1) * known

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        denoiser: MaskedNetwork,
        noise: Tensor,
        cond: Cond | None = None,
        generator: torch.Generator | None = None,
        known: Tensor | None = None,
        hole: Tensor | None = None,
    ) -> Tensor:
        """Latents ``[B, C, H, W]`` for the text features ``cond["encoder_hidden_states"]``.

        noise: unit, ``[B, C, H, W]``: gives the shape, and each token's chain starts from its own part of it.
        known, hole: to in-paint, latents ``[B, C, H, W]`` and bool ``[B, H, W]`` or ``[H, W]``, True = to be filled. A
        token is filled whole as soon as a part of it lies in the hole; all others come back as they were given.

        Raises UserError for text features or a hole that do not fit.
        """
        grid, text = denoiser.grid_of(noise), _text(cond, len(noise))
        places = grid[0] * grid[1]
        if (known is None) != (hole is None):
            raise UserError("in-painting needs both the known latents and the hole", cure="give both, or neither")
        if known is None or hole is None:
            return self._fill(denoiser, torch.zeros_like(noise), noise, text, generator, None)
        if known.shape != noise.shape or hole.shape not in (noise.shape[2:], (len(noise), *noise.shape[2:])):
            raise UserError(
                f"known latents {list(known.shape)} and hole {list(hole.shape)} do not fit {list(noise.shape)}",
                cure="the hole is one bool per latent cell: [B, H, W] or [H, W]",
            )
        cells = hole.bool().expand(len(noise), *noise.shape[2:])[:, None].expand_as(noise).to(noise)
        missing = denoiser.tokens(cells).any(-1)  # [B, N]
        filled = known.clone()
        counts = missing.sum(1)
        for count in counts.unique().tolist():  # samples with holes of one size make one rectangular batch
            rows = (counts == count).nonzero().squeeze(1)
            if count:
                part = None if count == places else missing[rows]
                filled[rows] = self._fill(denoiser, known[rows], noise[rows], text[rows], generator, part)
        return filled

    def _fill(
        self,
        network: MaskedNetwork,
        latents: Tensor,
        noise: Tensor,
        text: Tensor,
        generator: torch.Generator | None,
        missing: Tensor | None,
    ) -> Tensor:
        """``missing [B, N]``, True where a token is to be filled, equally many in each row; None: all."""
        grid, tokens, start = network.grid_of(noise), network.tokens(latents), network.tokens(noise)
        device = generator.device if generator is not None else tokens.device
        rank = torch.rand(tokens.shape[:2], generator=generator, device=device).to(tokens.device)
        if missing is not None:
            rank = torch.where(missing, rank, 2.0)  # known tokens come last, as if predicted first
        order = rank.argsort(1)
        total = tokens.shape[1] if missing is None else int(missing[0].sum())
        # Made once: the text's keys and values in every block, the head's time embeddings.
        memory = network.remember(text, given=self.guidance != 0.0, null=self.guidance != 1.0)
        plan = network.plan(self.head_steps)
        counts = token_counts(total, self.steps)
        for left, after in zip(counts[:-1], counts[1:], strict=True):
            at = order[:, after:left]
            index = at[..., None].expand(-1, -1, tokens.shape[-1])
            new = network.fill(
                tokens, order[:, left:], at, memory, start.gather(1, index), plan, grid,
                guidance=self.guidance_at((total - after) / total), temperature=self.temperature, clip=self.clip,
                generator=generator,
            )  # fmt: skip
            tokens = tokens.scatter(1, index, new.to(tokens))
        return network.latents(tokens, grid)


def _text(cond: Cond | None, samples: int) -> Tensor:
    text: Any = (cond or {}).get(TEXT)
    if text is None:
        raise UserError("a masked generator needs text features", cure=f"give the condition {TEXT}")
    if len(text) != samples:
        raise UserError(f"{len(text)} texts for {samples} samples", cure="give one text per sample")
    return text
