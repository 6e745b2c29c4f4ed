"""The one error type that a user sees: what is wrong, where, and what would be right. The command line prints it on one
line and exits with code 2."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave (recipe, data, teacher, run folder), with its cure."""

    def __init__(self, message: str, cure: str = "") -> None:
        self.message, self.cure = " ".join(message.split()), " ".join(cure.split())
        super().__init__(f"{self.message}; {self.cure}" if cure else self.message)


class TrainingDiverged(UserError):
    """A loss or weight became NaN/inf or grew without bound. The last good checkpoint is intact."""


class DiskFull(UserError):
    """No space is left to write. What was finished before is intact, and a run goes on when there is room."""


@contextlib.contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Around code that builds something from a file or folder of the user's: whatever goes wrong there is the input's
    fault, so it is a :class:`UserError` that names ``place``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{place} cannot be read ({detail[:300]})", cure="restore it from a copy; a file in it is damaged"
        ) from error


def nearest(word: str, known: Iterable[str], count: int = 1) -> str:
    """`` (did you mean 'x'?)``, with up to ``count`` words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def shortened(text: str, limit: int = 60) -> str:
    """``text`` in quotes, cut after ``limit`` characters."""
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")
