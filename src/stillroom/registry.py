"""What is known by its name: methods, tasks, benches, filters; and what installed packages add to them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from stillroom.errors import UserError, nearest

T = TypeVar("T")


def offered(group: str) -> Iterator[Any]:
    """What installed packages offer under an entry-point group. Raises UserError for what cannot be imported."""
    for point in entry_points(group=group):
        try:
            found = point.load()
        except Exception as error:
            owner = point.dist.name if point.dist else point.value
            raise UserError(
                f"package {owner!r} offers {point.name!r} to {group}, but its import fails "
                f"({type(error).__name__}: {error})",
                cure=f"mend {point.value}, or uninstall {owner}",
            ) from error
        yield found


def named_function(entry: str, option: str, cure: str) -> Any:
    """A function of the user's own, ``package.module:function``, of an installed package or one on Python's path.
    option: what names it. Raises UserError for one that there is not."""
    module, _, name = entry.partition(":")
    try:
        function = getattr(importlib.import_module(module), name) if name else None
    except (ImportError, AttributeError, ValueError) as problem:
        raise UserError(f"{option}={entry!r} is not there ({problem})", cure=cure) from None
    if not callable(function):
        raise UserError(f"{option}={entry!r} names no function", cure=cure)
    return function


class Registry(Generic[T]):
    """Things of one kind by name. They add themselves when their module is imported; :meth:`known` imports those of
    ``package`` (``inside``: the module of each of its rooms; None: all its modules) and of other packages' entry points
    under ``group``. kind, kinds: what messages call them."""

    def __init__(self, kind: str, kinds: str, package: str = "", inside: str | None = None) -> None:
        self.kind, self.kinds, self.group = kind, kinds, f"stillroom.{kinds}"
        self.package, self.inside = package, inside
        self.found: dict[str, T] = {}

    def add(self, name: str, thing: T, key: Callable[[T], Any] = lambda thing: thing) -> T:
        """Make ``thing`` known; again, where a module is imported twice. ``key``: the class or function in it."""
        old, new = key(self.found.get(name, thing)), key(thing)
        if old.__qualname__ != new.__qualname__:
            raise ValueError(f"two {self.kinds} claim the name {name!r}: {old.__module__} and {new.__module__}")
        self.found[name] = thing
        return thing

    def known(self) -> dict[str, T]:
        """All of them, in the order of their names."""
        for module in self._modules():
            importlib.import_module(module)
        for _ in offered(self.group):
            pass
        return dict(sorted(self.found.items()))

    def _modules(self) -> Iterator[str]:
        if self.package:
            path, prefix = importlib.import_module(self.package).__path__, self.package + "."
            if self.inside is None:
                yield from (info.name for info in pkgutil.walk_packages(path, prefix) if not info.ispkg)
            else:
                yield from (f"{info.name}.{self.inside}" for info in pkgutil.iter_modules(path, prefix) if info.ispkg)

    def get(self, name: str, cure: str = "") -> T:
        """One by its name. Raises UserError for an unknown one, naming the nearest."""
        known = self.known()
        if name not in known:
            raise UserError(
                f"unknown {self.kind} {name!r}{nearest(name, known)}", cure=cure or f"known: {', '.join(known)}"
            )
        return known[name]
