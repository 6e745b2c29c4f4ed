"""Data distillation, as a method's options say it: which images the teachers draw for the student to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SynthesisOptions:
    """Images that a student of captions learns from."""

    images: int = field(default=0, metadata={"min": 0})
    """Images that the teachers draw before the training; 0: those stored in ``data`` are used as they are."""
    route: Literal["one", "all", "round-robin"] = "round-robin"
    """Which teacher draws a caption: one chosen at random, all of them, or each in its turn."""
    filters: list[str] = field(default_factory=list)
    """Names of the filters that an image must pass."""
    small: int = field(default=0, metadata={"min": 0})
    """Side in pixels of the images of the first stage, which learns at a lower resolution; 0: no such images."""
    mirror: bool = False
    """Whether mirrored images are encoded as well (options.mirror picks them)."""
    pairs: int = field(default=1024, metadata={"min": 0})
    """Real pictures with captions for the preference stage, where the data set can draw them."""
    seed: int = field(default=0, metadata={"min": 0, "max": 2**31 - 1})
    """Seed of captions, images and pairs."""
