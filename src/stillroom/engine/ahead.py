"""The next step's batches, made by a thread while the device is at work on this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

Make = Callable[[Any, int], list[Any]]
"""``(what is read, step)`` to the micro-batches of that step."""


class Ahead:
    """Calls ``make`` for the step after the one that is asked for. Batches are a pure function of the step, so they are
    the same made early; those of other data than are read then (a new stage) are thrown away."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self._thread = ThreadPoolExecutor(1, "stillroom-batches")
        self._next: tuple[Any, int, Future[list[Any]]] | None = None

    def take(self, reading: Any, step: int, more: bool) -> list[Any]:
        """The batches of ``step``; ``more``: whether the next step will read the same data."""
        kept, self._next = self._next, None
        if kept is None or kept[0] is not reading or kept[1] != step:
            kept = reading, step, self._thread.submit(self.make, reading, step)
        found = kept[2].result()
        if more:
            self._next = reading, step + 1, self._thread.submit(self.make, reading, step + 1)
        return found


def pinned(batch: Any) -> Any:
    """A copy in memory that a CUDA device reads by itself, so that the host need not wait."""
    if isinstance(batch, list):
        return [pinned(part) for part in batch]
    if isinstance(batch, Mapping):
        kind: Any = type(batch) if isinstance(batch, dict) else dict
        return kind({key: pinned(value) for key, value in batch.items()})
    return batch.pin_memory() if isinstance(batch, Tensor) and batch.device.type == "cpu" else batch
