"""What a method's ``build`` may ask for, from plain networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.method import Method, get_method


def given(networks: Any) -> dict[str, Any]:
    """Of a denoiser, a space, or a student's network and then its teachers'."""
    first, *others = networks if isinstance(networks, Sequence) else (networks,)
    if isinstance(first, Denoiser):
        return {"teacher": first, "teachers": [first]}
    if not isinstance(first, nn.Module):
        return {"space": first}
    return {"student": first, "teachers": others} | ({"teacher": others[0]} if len(others) == 1 else {})


def maker(slug: str, options: Mapping[str, Any], networks: Any) -> Callable[[], Method]:
    """What makes the method on copies of these networks, each time anew."""
    cls = get_method(slug)

    def make() -> Method:
        method = cls(cls.Options(**options))
        method.build_from(given(copy.deepcopy(networks)))
        return method

    return make
