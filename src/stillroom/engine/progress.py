"""What a run says while it runs: a live bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

PATIENCE = 2.0
"""Seconds that something must take to be shown at all, besides training."""
_TITLE: ContextVar[str] = ContextVar("title", default="")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """Progress over ``total`` steps, on stderr. ``every``: seconds between two plain lines. ``patience``: seconds
    before anything is shown."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        title: str = "train",
        show: bool = True,
        every: float = 20.0,
        patience: float = 0.0,
    ) -> None:
        self.total, self.start, self.title, self.every, self.patience = total, start, title, every, patience
        self.began = self.spoke = time.monotonic()
        self.text = ""
        self.show = show
        self.said = not patience
        self.bar: Any = None
        if show and not patience and sys.stderr.isatty():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[text]}"),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, text="")
        self.bar.start()

    def update(self, done: float, numbers: Mapping[str, float] | None = None) -> None:
        """``done`` steps are done; ``numbers`` (losses) replace those shown beside the bar."""
        if not self.show:
            return
        if not self.said:
            if time.monotonic() - self.began < self.patience or done == self.total:
                return
            self.said, self.spoke = True, -self.every  # the first plain line comes at once
            if sys.stderr.isatty():
                self._open_bar()
        if numbers is not None:
            self.text = "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:4])
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=self.text)
            return
        now = time.monotonic()
        if now - self.spoke >= self.every or done == self.total:
            self.spoke = now
            elapsed = now - self.began
            ahead = f", {_clock(elapsed / (done - self.start) * (self.total - done))} left" if done > self.start else ""
            self.say(f"{self.title} {int(done)}/{self.total}  {_clock(elapsed)} gone{ahead}  {self.text}".rstrip())

    def say(self, line: str) -> None:
        """One line, above the bar."""
        if not self.show:
            return
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextmanager
def showing(title: str) -> Iterator[None]:
    """Inside, :class:`Parts` that take over two seconds are shown under this title."""
    token = _TITLE.set(title)
    try:
        yield
    finally:
        _TITLE.reset(token)


class Parts:
    """The starts of the parts of ``n`` things, ``size`` at a time, one after the other; their progress is shown inside
    :func:`showing`. :meth:`within` tells how far the part at hand has come."""

    def __init__(self, n: int, size: int) -> None:
        self.starts, self.place = range(0, n, size), 0
        self.progress = Progress(n, title=_TITLE.get(), show=bool(_TITLE.get()), patience=PATIENCE)

    def __iter__(self) -> Iterator[int]:
        try:
            for place in self.starts:
                self.place = place
                self.progress.update(place)
                yield place
            self.progress.update(self.starts.stop)
        finally:
            self.progress.close()

    def within(self, share: float) -> None:
        """The part at hand is done to this share."""
        size = min(self.starts.step, self.starts.stop - self.place)
        self.progress.update(self.place + min(share, 0.999) * size)
