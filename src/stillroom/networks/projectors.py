"""Projectors: from a student's width to a teacher's, made from the shapes that a dry run of the taps finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from stillroom.errors import UserError, nearest

Kind = Literal["linear", "mlp", "identity"]
Shapes = Mapping[str, Sequence[int]]


class Projectors(nn.ModuleDict):
    """One projector for each pair of taps, by the student tap's name: :meth:`project`.

    student, teacher: shape of each feature, channels last, as :meth:`stillroom.surgery.taps.Taps.shapes` gives them.
    Make the projectors in a method's ``build``: their parameters then exist before optimizers, DDP and FSDP look for
    them.
    pairs: student tap -> teacher tap.
    kind: ``linear``; ``mlp`` (linear, GELU, linear; hidden = teacher's width); ``identity``, which needs equal widths.

    Raises UserError for a name without a shape, and for ``identity`` between widths that differ.
    """

    def __init__(self, student: Shapes, teacher: Shapes, pairs: Mapping[str, str], kind: Kind = "linear") -> None:
        super().__init__()
        self.keys_of = {name: name.replace(".", "/") for name in pairs}  # a ModuleDict allows no dots
        for name, target in pairs.items():
            width, wanted = _width(student, name, "student"), _width(teacher, target, "teacher")
            self[self.keys_of[name]] = projector(width, wanted, kind)

    def project(self, name: str, features: Tensor) -> Tensor:
        """Student features ``[..., D_S]`` of the named tap in the teacher's width, ``[..., D_T]``."""
        if name not in self.keys_of:
            raise UserError(
                f"no projector for tap {name!r}{nearest(name, self.keys_of)}", cure=f"taps: {', '.join(self.keys_of)}"
            )
        return self[self.keys_of[name]](features)


def projector(width: int, wanted: int, kind: Kind = "linear") -> nn.Module:
    """A map of the last dimension from ``width`` to ``wanted`` channels."""
    if kind == "linear":
        return nn.Linear(width, wanted)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, wanted), nn.GELU(), nn.Linear(wanted, wanted))
    if kind == "identity":
        if width != wanted:
            raise UserError(
                f"the student has {width} channels, the teacher {wanted}", cure="use a linear projector between them"
            )
        return nn.Identity()
    raise UserError(f"unknown projector {kind!r}", cure="one of: linear, mlp, identity")


def _width(shapes: Shapes, name: str, side: str) -> int:
    if name not in shapes:
        raise UserError(f"the {side} has no tap {name!r}{nearest(name, shapes)}", cure=f"its taps: {', '.join(shapes)}")
    return int(shapes[name][-1])
