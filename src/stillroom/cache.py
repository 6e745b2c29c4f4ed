"""What is made once and kept: in one folder, under names that tell all that it depends on, its code among it."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillroom.errors import UserError
from stillroom.files import locked, make_folder, write


def cache_folder() -> Path:
    """``$STILLROOM_CACHE``, else ``$XDG_CACHE_HOME/stillroom``, else ``~/.cache/stillroom``."""
    if chosen := os.environ.get("STILLROOM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stillroom"


# --- what is kept -----------------------------------------------------------------------------------------------------
def kept(
    name: str, make: Callable[[], dict[str, Tensor]], *, code: Iterable[object] = (), parts: Iterable[object] = ()
) -> dict[str, Tensor]:
    """The tensors that ``make`` gives, made once.

    name: where they lie in the cache, "glosses/tuned". code: what they are made by, for :func:`code_of`. parts: all
    else that they depend on, each told apart by its ``str``. While one process makes them, others wait. A cache that
    cannot be written costs time, not results; a damaged file is made again.
    """

    def made() -> dict[str, Tensor]:
        return {key: value.detach().cpu().clone().contiguous() for key, value in make().items()}

    return _kept(_file(name, "safetensors", code, parts), made, load_file, save_file)


def kept_json(name: str, make: Callable[[], Any], *, code: Iterable[object] = (), parts: Iterable[object] = ()) -> Any:
    """:func:`kept` for numbers and texts: what JSON can hold, as JSON gives it back."""

    def save(value: Any, file: Path) -> None:
        file.write_text(json.dumps(value), encoding="utf-8")

    return _kept(
        _file(name, "json", code, parts),
        lambda: json.loads(json.dumps(make())),
        lambda file: json.loads(file.read_text(encoding="utf-8")),
        save,
    )


def _file(name: str, kind: str, code: Iterable[object], parts: Iterable[object]) -> Path:
    told = json.dumps([code_of(*code), *map(str, parts)])
    return cache_folder() / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:24]}.{kind}"


def _kept(file: Path, make: Callable[[], Any], read: Callable[[Path], Any], save: Callable[[Any, Path], None]) -> Any:
    unread = (OSError, ValueError, SafetensorError)
    with contextlib.suppress(*unread):
        return read(file)
    with _alone(file.with_name(f"{file.name}.lock")):
        with contextlib.suppress(*unread):
            return read(file)  # another process was at it
        value = make()
        with contextlib.suppress(UserError):
            make_folder(file.parent)
            write(file, functools.partial(save, value))
    return value


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(UserError):  # a cache that cannot be written is shared with nobody
            stack.enter_context(locked(lock))
        yield


# --- what code made it ------------------------------------------------------------------------------------------------
def code_of(*objects: object) -> str:
    """A hash of the modules in which functions, classes or modules are defined, and of all modules of their packages
    and of this one that these import, directly or not. Comments and docstrings do not count."""
    waiting = {_module(one) for one in objects}
    seen: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in seen or (file := _source(name)) is None:
            continue
        seen[name], imported = _read(file, name)
        waiting |= imported
    return hashlib.sha256(json.dumps(sorted(seen.items())).encode()).hexdigest()


def _module(one: object) -> str:
    if isinstance(one, ModuleType):
        return one.__name__
    return (one if inspect.isroutine(one) or inspect.isclass(one) else type(one)).__module__


def _source(name: str) -> Path | None:
    """The file of a module of a package that is loaded; None for compiled code and for names of no module."""
    top, *rest = name.split(".")
    root = getattr(sys.modules.get(top), "__file__", None)
    if root is None or (not rest and Path(root).suffix != ".py"):
        return None
    if not rest:
        return Path(root)
    place = Path(root).parent.joinpath(*rest)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


@functools.cache
def _read(file: Path, name: str) -> tuple[str, set[str]]:
    """The hash of a module, and the names that it imports of its own package and of this one."""
    tree = _Bare().visit(ast.parse(file.read_text(encoding="utf-8")))
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    ours = (f"{__package__}.", f"{name.split('.')[0]}.")
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), {one for one in found if one.startswith(ours)}


class _Bare(ast.NodeTransformer):
    """Without docstrings and without imports that only annotations need."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = [ast.Pass()]
        return self.generic_visit(node)
