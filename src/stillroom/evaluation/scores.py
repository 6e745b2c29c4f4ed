"""A score: how a measured number is called, which way is better, and when it is bad enough to say so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Score:
    """One number of a model's scores.

    key: in results and claims. name: in print; where it depends on them, with extractor and sample size. better: which
    way. unit: empty for shares and bare numbers. worst: what a training that diverged is given, so that it loses every
    comparison. label: short, for the tiles at the top of a report; empty: no tile. alarm: the doctor speaks when the
    student is beyond ``alarm`` times its best teacher's (0: never), and ``says`` what is wrong and gives ``advice``.
    """

    key: str
    name: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: float | None = None
    label: str = ""
    alarm: float = 0.0
    says: str = "the student is far from its teacher"
    advice: str = ""

    @property
    def arrow(self) -> str:
        return "↑" if self.better == "higher" else "↓"

    @property
    def lost(self) -> float:
        """The score of a training that diverged: 0 where more is better, else infinite, unless ``worst`` says so."""
        if self.worst is not None:
            return self.worst
        return 0.0 if self.better == "higher" else math.inf

    def called(self, name: str) -> Score:
        """The same score under another name."""
        return dataclasses.replace(self, name=name)

    def alarms(self, student: float, teacher: float) -> bool:
        if not self.alarm:
            return False
        return student > self.alarm * teacher if self.better == "lower" else student < self.alarm * teacher

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what is at its default."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """Unknown keys, of a later version, are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def named(scores: Iterable[Score], names: Mapping[str, str]) -> tuple[Score, ...]:
    """The scores under the names that ``names`` has for their keys."""
    return tuple(score.called(names.get(score.key, score.name)) for score in scores)
