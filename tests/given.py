"""What a method's ``build`` may ask for, from plain networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stillroom.diffusion.denoiser import Denoiser


def given(networks: Any) -> dict[str, Any]:
    """Of a denoiser, a space, or a student's network and then its teachers'."""
    first, *others = networks if isinstance(networks, Sequence) else (networks,)
    if isinstance(first, Denoiser):
        return {"teacher": first, "teachers": [first]}
    if not isinstance(first, nn.Module):
        return {"space": first}
    return {"student": first, "teachers": others} | ({"teacher": others[0]} if len(others) == 1 else {})
