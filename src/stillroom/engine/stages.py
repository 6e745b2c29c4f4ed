"""A run's stages laid out over its steps, each with the data that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stillroom.draws import mix
from stillroom.engine.config import EngineConfig
from stillroom.engine.player import learning_rate_factor
from stillroom.errors import UserError
from stillroom.files import write
from stillroom.method import Stage, nearest


class Span(NamedTuple):
    """``stage`` runs from step ``start`` until before ``end`` on ``data``."""

    stage: Stage
    start: int
    end: int
    data: Any

    def learning_rate_factor(self, step: int, config: EngineConfig) -> float:
        """The factor on every turn's learning rate at ``step``, warm-up and schedule included."""
        start, end = (self.start, self.end) if self.stage.own_schedule else (0, config.steps)
        return self.stage.lr * learning_rate_factor(step - start, end - start, config.warmup, config.schedule)


class Streams:
    """Several data read at once: a batch holds one batch of each, by name, all of one size. Each has an order of its
    own: rows of equally long data do not meet the same rows again and again."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.streams = dict(parts)

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Any]:
        seeds = [seed, *(mix(seed, name) for name in list(self.streams)[1:])]
        return {
            name: part.batch(own, step, size, rows)
            for own, (name, part) in zip(seeds, self.streams.items(), strict=True)
        }


class Beside:
    """Data with what a method has made for its rows: ``columns``, name -> ``[N, ...]``. Batches of the data say which
    rows they hold (``index``)."""

    def __init__(self, data: Any, columns: Mapping[str, Tensor]) -> None:
        self.data, self.columns = data, dict(columns)

    def batch(self, seed: int, step: int, size: int, rows: slice) -> dict[str, Any]:
        found = dict(self.data.batch(seed, step, size, rows))
        return found | {name: column[found["index"]] for name, column in self.columns.items()}


class StageData:
    """Keeps what methods make for their stages in ``folder``: ``<number of the stage>.safetensors``, from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def keep(self, number: int, columns: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {name: column.contiguous() for name, column in columns.items()}
        write(self._file(number), lambda aside: save_file(kept, aside))

    def read(self, number: int) -> dict[str, Tensor]:
        """Raises UserError for a missing or damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._file(number))
        except (OSError, SafetensorError) as problem:
            raise UserError(
                f"{self._file(number)} does not hold what the stage was reading ({problem})", cure="start a new run"
            ) from None


def lay_out(stages: Sequence[Stage], steps: int, data: Any, slug: str) -> list[Span]:
    """The stages by their shares of ``steps``. Raises UserError where a stage reads a part that the data lack."""
    total, done, start, spans = sum(stage.share for stage in stages), 0.0, 0, []
    for stage in stages:
        done += stage.share
        end = round(steps * done / total)
        spans.append(Span(stage, start, end, _read_by(stage, data, slug)))
        start = end
    return spans


def _read_by(stage: Stage, data: Any, slug: str) -> Any:
    if isinstance(stage.data, tuple):
        return Streams({name: _part(stage, name, data, slug) for name in stage.data})
    return _part(stage, stage.data, data, slug) if stage.data else data


def _part(stage: Stage, name: str, data: Any, slug: str) -> Any:
    parts: Mapping[str, Any] = getattr(data, "parts", {})
    if name not in parts:
        raise UserError(
            f"stage {stage.name!r} of {slug!r} reads the data's part {name!r}{nearest(name, parts)}, "
            "which is not there",
            cure=f"its parts: {', '.join(parts)}" if parts else "give data with that part",
        )
    return parts[name]
