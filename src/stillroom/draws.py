"""The randomness of a run: seeds, and the draws of a turn."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def mix(*numbers: int | str) -> int:
    """A 63-bit seed from numbers, far from those of neighbouring numbers."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Draws:
    """All randomness of a turn. Every draw is made for the *global* batch and sliced to this process's rows, so that
    the same recipe gives the same numbers on one process, on many, and under gradient accumulation.

    ``rows``: this micro-batch's rows of the ``total`` rows of the step. ``shared``: the generator of :meth:`index`,
    where ``generator`` draws this micro-batch alone.
    """

    def __init__(
        self, generator: torch.Generator, rows: slice, total: int, shared: torch.Generator | None = None
    ) -> None:
        self.generator, self.rows, self.total, self.shared = generator, rows, total, shared or generator

    @property
    def local(self) -> int:
        return self.rows.stop - self.rows.start

    def _global(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] != self.local:
            raise ValueError(f"a draw's first dimension must be the micro-batch size {self.local}, got {shape[0]}")
        return (self.total, *shape[1:])

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32, ``shape[0]`` = rows of this micro-batch."""
        return torch.randn(self._global(shape), generator=self.generator, device=self.generator.device)[self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on [0, 1), float32."""
        return torch.rand(self._global(shape), generator=self.generator, device=self.generator.device)[self.rows]

    def integers(self, high: int) -> Tensor:
        """Uniform in {0..high-1}, int64, one for each row of this micro-batch."""
        return (self.uniform(self.local) * high).long().clamp(max=high - 1)

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(*x.shape).to(x)

    def index(self, high: int) -> int:
        """One integer in {0..high-1}, shared by the whole batch and by all processes."""
        return self._integer(high, self.shared)

    def seed(self) -> int:
        """A seed for draws of another kind, of ``total`` rows from which ``rows`` are taken."""
        return self._integer(2**31 - 1, self.generator)

    def _integer(self, high: int, generator: torch.Generator) -> int:
        return int(torch.randint(high, (), generator=generator, device=generator.device))
