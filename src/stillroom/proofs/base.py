"""What a proof is: a bench, arms that are trained on it, and claims that compare them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Level = Literal["mechanism", "image", "text"]
"""On a bench with closed forms or of minutes; or on one of images, or of texts."""


@dataclass(frozen=True)
class Arm:
    """One way to get a student. Seed and bench are added when it runs.

    method: slug; empty: nothing is trained and the teacher itself is run by ``sampler``.
    options, engine: of the method's ``Options`` and of ``EngineConfig``.
    lora: roles that become adapters.
    teacher: ``bench``, the bench's own; ``shuffled`` answers for the wrong class (or image), ``untrained`` has random
    weights: controls that must fail; or the name of another teacher that the bench has.
    data: what the arm learns from, in the words of its bench; empty: the bench's own data.
    after: the arm whose finished student this one starts from, trained first at the same seed.
    student: a finished model to go on from, by a name that the bench knows; empty: the bench's own student.
    recorded: options under which results were recorded and which say today's ``student``: of the key alone.
    """

    name: str
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = "bench"
    sampler: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    after: Arm | None = None
    student: str = ""
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def with_(self, name: str, **changes: Any) -> Arm:
        """A variation: mappings (``options``, ``engine``, ...) are merged key by key, other fields replaced."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        for key, value in changes.items():
            values[key] = merge(values[key], value) if isinstance(value, Mapping) else value
        return Arm(name, **values)

    def key(self, bench: str, seed: int) -> str:
        """Content hash of everything that determines the result; equal arms of two proofs share one run."""
        tree = {**self.content(), "world": bench, "seed": seed}  # a bench's older name: recorded keys stay
        return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def content(self) -> dict[str, Any]:
        """All that determines the result, of the arm it starts from too; the name does not."""
        tree = asdict(self)
        del tree["name"]
        if recorded := tree.pop("recorded"):
            tree["options"] |= recorded
            del tree["student"]
        for optional in ("data", "after", "student"):  # left out where unused, so that older results keep their keys
            if not tree.get(optional):
                tree.pop(optional, None)
        if self.after is not None:
            tree["after"] = self.after.content()
        return tree


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, nested mappings merged."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return out


@dataclass(frozen=True)
class Claim:
    """``metric(left) op factor * metric(right) + offset``, or ``metric(left) op bound`` where ``right`` is empty.

    paper: the place in the paper that claims it. Factor and offset are the margin, fixed before the runs; shares are
    compared by an offset, distances by a factor.
    """

    id: str
    statement: str
    paper: str
    metric: str
    left: str
    op: Literal["<=", ">="]
    factor: float = 1.0
    right: str = ""
    bound: float | None = None
    offset: float = 0.0

    def holds(self, left: float, right: float | None) -> bool:
        limit = self.bound if right is None else self.factor * right + self.offset
        assert limit is not None
        return left <= limit if self.op == "<=" else left >= limit

    def verdict(self, lefts: list[float], rights: list[float | None]) -> str:
        """``holds`` if the inequality, margin included, holds for every seed, ``fails`` if for none, else
        ``unresolved``. lefts, rights: the two arms' values, seed by seed: each seed's arms are compared with each
        other, never their means. A value that is not a number makes the inequality false."""
        results = [self.holds(a, b) for a, b in zip(lefts, rights, strict=True)]
        return "holds" if all(results) else "unresolved" if any(results) else "fails"

    @property
    def margin(self) -> str:
        if self.right:
            times = f"{self.factor:g} x " if self.factor != 1 or not self.offset else ""
            plus = f" {'-' if self.offset < 0 else '+'} {abs(self.offset):g}" if self.offset else ""
            return f"{self.left} {self.op} {times}{self.right}{plus}"
        return f"{self.left} {self.op} {self.bound:g}"


@dataclass(frozen=True)
class Proof:
    """Arms and claims of one method at one level. ``note`` says what a bench of this size cannot show."""

    method: str
    level: Level
    bench: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    note: str = ""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"proof {self.method}: two arms share a name")
        for claim in self.claims:
            for side in (claim.left, claim.right):
                if side and side not in names:
                    raise ValueError(f"proof {self.method}, claim {claim.id}: no arm {side!r}")
