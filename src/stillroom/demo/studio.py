"""What happens when a visitor presses a button: from the values on the page to what the page then shows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stillroom.demo.cards import Entry, filled, notice, picture_uri, sheet
from stillroom.demo.exhibits import (
    MOST_IMAGES,
    Drawing,
    Exhibit,
    hole_from_brush,
    image_from_file,
    message,
    whole_number,
)
from stillroom.errors import UserError

LARGEST_SEED = 2**31 - 1
SHELF = 12
"""Pictures kept to paint on."""


@dataclass(frozen=True)
class Picture:
    """A picture that can be painted on, ``[C, H, W]``."""

    id: int
    image: Tensor


@dataclass(frozen=True)
class Shown:
    """What a button changes on the page; None leaves it as it is. ``choose``: the picture to put under the brush."""

    notice: str = ""
    cards: str | None = None
    shelf: list[Picture] | None = None
    choose: int | None = None


@dataclass
class Studio:
    """The models of the page. Teachers draw at their own settings, the student at the visitor's."""

    student: Exhibit
    teachers: Sequence[Exhibit]
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def role(self) -> str:
        """What the student is called: without teachers beside it, it may be anything."""
        return "student" if self.teachers else "model"

    def draw(
        self, wish: Any, seed: Any, n: Any, settings: Mapping[str, Any], shelf: Sequence[Picture]
    ) -> Iterator[Shown]:
        """The student's pictures, then each teacher's, shown as they come."""
        try:
            wish = str(wish or "").strip()
            seed, n = whole_number(seed, "the seed", 0, LARGEST_SEED), whole_number(n, "images", 1, MOST_IMAGES)
            self.student.model.check(wish)
        except Exception as problem:  # what a visitor types must never break the page
            yield Shown(notice(message(problem)))
            return
        exhibits = {self.role: [self.student], "teacher": list(self.teachers)}
        entries = [Entry(exhibit.name, role) for role, group in exhibits.items() for exhibit in group]
        yield Shown(cards=sheet(wish, seed, n, entries))
        for i, exhibit in enumerate(itertools.chain(*exhibits.values())):
            changes = settings if i == 0 else {}
            entries[i] = self._entry(entries[i], exhibit, changes, lambda e, c: e.draw(wish, n, seed, **c))
            shown = Shown(cards=sheet(wish, seed, n, entries))
            drawing = entries[0].drawing
            if i == 0 and drawing is not None and self.student.model.fills:
                new = self._pictures(drawing.images)
                shown = Shown(cards=shown.cards, shelf=[*new, *shelf][:SHELF], choose=new[0].id)
            yield shown

    def fill(
        self, painted: Any, wish: Any, seed: Any, n: Any, settings: Mapping[str, Any], shelf: Sequence[Picture]
    ) -> Shown:
        """The painted hole of a picture, filled by the student.

        painted: JSON of what the brush reports: ``id`` of the picture and ``strokes`` (see :func:`hole_from_brush`).
        """
        try:
            wish = str(wish or "").strip()
            seed, n = whole_number(seed, "the seed", 0, LARGEST_SEED), whole_number(n, "images", 1, MOST_IMAGES)
            picture, hole = self._painted(painted, shelf)
            self.student.model.check(wish)
        except Exception as problem:  # as above
            return Shown(notice(message(problem)))
        entry = self._entry(
            Entry(self.student.name, self.role),
            self.student,
            settings,
            lambda e, c: e.fill(wish, picture.image, hole, n, seed, **c),
        )
        if entry.drawing is None:
            return Shown(notice(entry.problem))
        new = self._pictures(entry.drawing.images)
        kept = [picture, *(old for old in shelf if old.id != picture.id)]
        return Shown(cards=filled(wish, seed, picture.image, hole, entry), shelf=[*new, *kept][:SHELF])

    def upload(self, path: str | Path | None, shelf: Sequence[Picture]) -> Shown:
        """A visitor's file, put under the brush."""
        if path is None:
            return Shown()
        try:
            (new,) = self._pictures([image_from_file(path, self.student.model.image_size)])
        except Exception as problem:  # as above
            return Shown(notice(message(problem)))
        return Shown(shelf=[new, *shelf][:SHELF], choose=new.id)

    def easel(self, shown: Shown) -> str:
        """JSON for the brush's canvas: the pictures to paint on, and which of them to take up."""
        height, width = self.student.model.image_size
        pictures = [{"id": picture.id, "src": picture_uri(picture.image)} for picture in shown.shelf or ()]
        sizes = {"height": height, "width": width, "cell": self.student.model.cell}
        return json.dumps({"pictures": pictures, "choose": shown.choose or 0, **sizes})

    def _pictures(self, images: Any) -> list[Picture]:
        return [Picture(next(self._ids), image) for image in images]

    def _painted(self, painted: Any, shelf: Sequence[Picture]) -> tuple[Picture, Tensor]:
        try:
            told = json.loads(painted or "{}")
            chosen, strokes = int(told.get("id", 0)), str(told.get("strokes", ""))
        except (ValueError, TypeError, AttributeError):
            raise UserError("the strokes cannot be read", cure="paint again") from None
        picture = next((picture for picture in shelf if picture.id == chosen), None)
        if picture is None:
            raise UserError("there is no picture under the brush", cure="draw one first, or upload one")
        height, width = picture.image.shape[1:]
        return picture, hole_from_brush(strokes or "0" * (height * width), (height, width), self.student.model.cell)

    @staticmethod
    def _entry(entry: Entry, exhibit: Exhibit, settings: Mapping[str, Any], draw: Any) -> Entry:
        """``entry`` with what was drawn, or with why it could not; the others draw on."""
        try:
            drawing: Drawing = draw(exhibit, dict(settings))
            return Entry(entry.name, entry.role, drawing, exhibit.facts(**settings))
        except Exception as problem:  # as above
            return Entry(entry.name, entry.role, problem=message(problem))
