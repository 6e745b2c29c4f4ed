"""Plain values, as YAML and JSON hold them, and what dataclasses and functions ask of them: a type, and limits.

A field's metadata, or the mapping of an ``Annotated``, sets the limits of its numbers: ``min``, ``max``, ``above`` and
``below`` (the end itself excluded), ``infinite: True`` where .inf is legal, ``filled: True`` for a list that may not
be empty; ``cure`` says what to write instead. What is wrong is a :class:`UserError` that names key and limits.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from stillroom.errors import UserError
from stillroom.parsing import parse_yaml

Limits = Mapping[str, Any]
NONE: Limits = MappingProxyType({})
RENAMED = {"options.start": "student", "synthesis": "options.synthesis"}
"""Keys of earlier recipes, of methods that know them no more, and what they are called now."""


class Typed(str):
    """A value typed on the command line: parsed as YAML unless its key wants text."""


# --- a record ---------------------------------------------------------------------------------------------------------
def construct(
    cls: type, tree: Mapping[str, Any], prefix: str, given: Mapping[str, Any] = NONE, everywhere: Iterable[str] = ()
) -> Any:
    """An instance of the dataclass from plain values, each converted to its field's type or refused by name.

    prefix: of the keys, ``engine.``. given: fields that are ready. everywhere: keys of other records, for the hint.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = dict(given)
    for name, value in tree.items():
        if name not in fields:
            raise unknown(f"{prefix}{name}", [prefix + field for field in fields], everywhere)
        values[name] = convert(value, hints[name], f"{prefix}{name}", fields[name].metadata)
    try:
        return cls(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe key {prefix.rstrip('.') or 'method'!r}: {error}") from error


def fit_fields(record: Any, prefix: str) -> None:
    """Convert the fields of a dataclass's instance in place; for its ``__post_init__``."""
    hints = typing.get_type_hints(type(record), include_extras=True)
    for field in dataclasses.fields(record):
        fitting = convert(getattr(record, field.name), hints[field.name], f"{prefix}{field.name}", field.metadata)
        setattr(record, field.name, fitting)


def unknown(key: str, siblings: Iterable[str], everywhere: Iterable[str] = ()) -> UserError:
    """The error for a key that nobody knows. siblings: the keys that are known there."""
    siblings = list(siblings)
    hint = nearest_key(key, siblings) or nearest_key(key, everywhere)
    # The list of an engine's or a method's keys is long: it is given only to those who need it.
    return UserError(f"unknown recipe key {key!r}{hint}", cure="" if hint else f"known here: {', '.join(siblings)}")


def nearest_key(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, by the whole dotted key or by its last part."""
    known = list(known)
    if word in RENAMED:
        return f" (did you mean {RENAMED[word]!r}?)"
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
        return f" (did you mean {close[0]!r}?)"
    by_tail = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(word.rsplit(".", 1)[-1], by_tail, n=1, cutoff=0.6)
    return f" (did you mean {by_tail[close[0]]!r}?)" if close else ""


# --- one value --------------------------------------------------------------------------------------------------------
def convert(value: Any, kind: Any, key: str, limits: Limits = NONE) -> Any:
    """``value`` as ``kind``. Integers pass as floats, whole floats as integers, booleans as neither."""
    if get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
        limits = {name: limit for one in (limits, *extras) for name, limit in one.items()}
    if isinstance(value, Typed):
        value = str(value) if kind is str else parse_yaml(value, f"override {key}")
    result = _fit(value, kind, key, limits)
    if result is _NO or not _within(result, limits):
        allowed = describe(kind) + describe_limits(limits)
        raise UserError(
            f"recipe key {key!r} must be {allowed}, got {value!r:.200}{_choice_hint(value, kind)}",
            cure=limits.get("cure", ""),
        )
    return result


_NO = object()


def _within(value: Any, limits: Limits) -> bool:
    if isinstance(value, list | tuple | dict):
        return bool(value) or not limits.get("filled")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        limits.get("min", -math.inf) <= value <= limits.get("max", math.inf)
        and ("above" not in limits or value > limits["above"])
        and ("below" not in limits or value < limits["below"])
        and (not math.isinf(value) or bool(limits.get("infinite")))
    )


def _fit(value: Any, kind: Any, key: str, limits: Limits) -> Any:
    """``value`` as ``kind``, or ``_NO``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        return construct(kind, dict(value), f"{key}.") if isinstance(value, Mapping) else _NO
    if origin is Literal:
        return value if value in arguments and type(value) in {type(a) for a in arguments} else _NO
    if origin in (Union, types.UnionType):
        fits = (
            _fit(value, argument, key, limits) for argument in sorted(arguments, key=lambda a: not _exact(value, a))
        )
        return next((fit for fit in fits if fit is not _NO), _NO)
    if kind is types.NoneType:
        return None if value is None else _NO
    if kind is bool:
        return value if isinstance(value, bool) else _NO
    if kind in (int, float):
        return _number(value, kind)
    if kind is str:
        return _text(value)
    if (origin or kind) in (list, tuple, Sequence):
        return _fit_sequence(value, origin or kind, arguments, key, limits)
    if (origin or kind) in (dict, Mapping):
        if not isinstance(value, Mapping):
            return _NO
        inner = arguments[1] if len(arguments) == 2 else Any
        return {str(name): convert(item, inner, f"{key}.{name}", limits) for name, item in value.items()}
    return value


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return _NO
    if kind is int and not (math.isfinite(value) and value == math.floor(value)):
        return _NO
    try:
        return kind(value)
    except OverflowError:  # a whole number beyond all floats
        return _NO


def _text(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | Path) and not isinstance(value, bool) else _NO


def _fit_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], key: str, limits: Limits) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return _NO
        kinds = list(arguments)
    else:
        kinds = [arguments[0] if arguments else Any] * len(value)
    items = [
        convert(item, kind, f"{key}[{i}]", limits) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def _exact(value: Any, kind: Any) -> bool:
    return isinstance(kind, type) and type(value) is kind


def _choice_hint(value: Any, kind: Any) -> str:
    choices = [str(argument) for argument in get_args(kind)] if get_origin(kind) is Literal else []
    return nearest_key(value, choices) if isinstance(value, str) else ""


# --- in words ---------------------------------------------------------------------------------------------------------
def describe(kind: Any) -> str:
    """What a value of this type looks like."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    if kind in names:
        return names[kind]
    if kind is Any:  # which only a number without end is refused as
        return "finite"
    if (origin or kind) is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} values"
    if (origin or kind) in (list, tuple, Sequence):
        return f"a list (each {describe(arguments[0])})" if arguments else "a list"
    return "a mapping"


def describe_limits(limits: Limits) -> str:
    """The limits, as they follow what :func:`describe` says."""
    low = f"at least {limits['min']}" if "min" in limits else f"above {limits['above']}" if "above" in limits else ""
    high = f"at most {limits['max']}" if "max" in limits else f"below {limits['below']}" if "below" in limits else ""
    if "min" in limits and "max" in limits:
        return f" from {limits['min']} to {limits['max']}"
    filled = "with at least one value" if limits.get("filled") else ""
    told = " and ".join(filter(None, (low, high, filled)))
    return f", {told}" if told else ""
