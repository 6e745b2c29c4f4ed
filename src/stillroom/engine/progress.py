"""What a run says while it runs: a live bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """Progress over ``total`` steps, on stderr. ``every``: seconds between two plain lines."""

    def __init__(
        self, total: int, start: int = 0, title: str = "train", show: bool = True, every: float = 20.0
    ) -> None:
        self.total, self.start, self.title, self.every = total, start, title, every
        self.began = self.spoke = time.monotonic()
        self.text = ""
        self.show = show
        self.bar: Any = None
        if show and sys.stderr.isatty():
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

    def update(self, done: int, numbers: Mapping[str, float] | None = None) -> None:
        """``done`` steps are done; ``numbers`` (losses) replace those shown beside the bar."""
        if not self.show:
            return
        if numbers is not None:
            self.text = "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:4])
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=self.text)
            return
        now = time.monotonic()
        if now - self.spoke >= self.every or done == self.total:
            self.spoke = now
            elapsed = now - self.began
            left = elapsed / max(done - self.start, 1) * (self.total - done)
            self.say(
                f"{self.title} {done}/{self.total}  {_clock(elapsed)} gone, {_clock(left)} left  {self.text}".rstrip()
            )

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
