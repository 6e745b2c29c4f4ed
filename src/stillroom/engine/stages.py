"""A run's stages laid out over its steps, each with the data that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stillroom.engine.config import EngineConfig
from stillroom.engine.player import learning_rate_factor
from stillroom.errors import UserError
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


def lay_out(stages: Sequence[Stage], steps: int, data: Any, slug: str) -> list[Span]:
    """The stages by their shares of ``steps``. Raises UserError where a stage reads a part that the data lack."""
    total, done, start, spans = sum(stage.share for stage in stages), 0.0, 0, []
    for stage in stages:
        done += stage.share
        end = round(steps * done / total)
        spans.append(Span(stage, start, end, _part(stage, data, slug)))
        start = end
    return spans


def _part(stage: Stage, data: Any, slug: str) -> Any:
    if not stage.data:
        return data
    parts: Mapping[str, Any] = getattr(data, "parts", {})
    if stage.data not in parts:
        raise UserError(
            f"stage {stage.name!r} of {slug!r} reads the data's part {stage.data!r}{nearest(stage.data, parts)}, "
            "which is not there",
            cure=f"its parts: {', '.join(parts)}" if parts else "give data with that part",
        )
    return parts[stage.data]
