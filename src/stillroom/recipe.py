"""Recipes: everything that determines a run, as one YAML file that reproduces it.

A recipe is read strictly. An unknown key, a wrong type or a value out of range is a :class:`UserError` that names the
key, says what is allowed and suggests the nearest known key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from stillroom.engine.config import EngineConfig
from stillroom.engine.track import names_of
from stillroom.errors import UserError
from stillroom.parsing import parse_yaml, read_yaml

DEFAULT = "lightgen-quick"
"""The recipe of ``stillroom run`` without arguments."""

SHIPPED = Path(__file__).parent / "recipes"


@dataclass
class Evaluate:
    """How the finished student is scored."""

    n: int = field(default=5000, metadata={"min": 0})
    """Samples for the scores; 0 skips scoring."""
    seed: int = field(default=0, metadata={"min": 0, "max": 2**63 - 1})
    """Seed of those samples."""


@dataclass
class Recipe:
    """Everything that determines a run."""

    method: str
    """Slug of the method."""
    name: str = ""
    """Name of the run's folder; empty: the method's slug."""
    teacher: str = ""
    """A shipped teacher by name, or a model folder; several, where the method takes them, by commas; empty: none."""
    student: str = ""
    """What is trained: a network by name, a model folder, or a run; empty: a copy of the teacher."""
    data: str = "fashion"
    """A shipped data set by name, or a folder."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's own options."""
    lora: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Role name -> LoRA settings: that network becomes an adapter on the teacher's weights."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Steps, batch, optimizers, precision, averages, checkpoints."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """How the finished student is scored."""
    track: str = ""
    """Where the rows of metrics.jsonl go as well: tensorboard, trackio, wandb; several by commas."""

    # --- in ----------------------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = (), **given: Any) -> Recipe:
        """Read a shipped recipe by slug, a YAML file, or a run folder; then apply overrides.

        ``overrides`` are ``key=value`` texts with dotted keys (``engine.steps=100``); ``given`` are keys with values.
        Raises :class:`UserError`, and never anything else, for whatever is wrong with the input.
        """
        return cls.from_dict(override(_read(source), overrides, given))

    def changed(self, *overrides: str) -> Recipe:
        """This recipe with ``key=value`` overrides. Raises UserError as :meth:`load` does."""
        return Recipe.from_dict(override(self.to_dict(), overrides))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Recipe:
        """Build and check a recipe. Options are checked against the method's own ``Options``."""
        known = dict(tree)
        if "method" not in known:
            raise UserError("recipe key 'method' is missing", cure="`stillroom methods` lists them all")
        options = known.pop("options", None) or {}
        if not isinstance(options, Mapping):
            options = _convert(options, dict, "options")  # a text that is no mapping is refused here
        recipe = _construct(cls, known, "", extra={"options": options})
        recipe.options = dataclasses.asdict(_construct(_options_of(recipe.method), dict(options), "options."))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*|", recipe.name):
            raise UserError(
                f"recipe key 'name' must be letters, digits, '.', '_' or '-', got {recipe.name!r}",
                cure="for example dmd2-seed1",
            )
        recipe.name = recipe.name or recipe.method
        names_of(recipe.track)
        recipe._check_against_method()
        return recipe

    def _check_against_method(self) -> None:
        from stillroom.method import Optim, get_method

        turns = [turn.name for turn in get_method(self.method).turns_for(self.method_options())]
        for turn, settings in self.engine.optim.items():
            if turn != "all" and turn not in turns:
                raise _unknown(f"engine.optim.{turn}", [f"engine.optim.{name}" for name in ("all", *turns)])
            if not isinstance(settings, Mapping):
                raise UserError(f"recipe key 'engine.optim.{turn}' must be a mapping, got {settings!r}")
            _construct(Optim, dict(settings), f"engine.optim.{turn}.")
        self._check_lora()
        averages = ["student", *(str(entry.get("name", "ema")) for entry in self.engine.ema)]
        if self.engine.export not in averages:
            raise UserError(
                f"recipe key 'engine.export' is {self.engine.export!r}{_hint(self.engine.export, averages)}",
                cure=f"allowed here: {', '.join(averages)}",
            )

    def _check_lora(self) -> None:
        if not self.lora:
            return
        from stillroom.surgery.lora import lora_role

        kinds = typing.get_type_hints(lora_role)
        for name in ("teacher", "role", "return"):
            del kinds[name]
        for role, settings in self.lora.items():
            for key, value in settings.items():
                if key not in kinds:
                    raise _unknown(f"lora.{role}.{key}", [f"lora.{role}.{kind}" for kind in kinds])
                settings[key] = _convert(value, kinds[key], f"lora.{role}.{key}")

    # --- out ---------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain types only, every default filled in; ``Recipe.from_dict`` gives the same recipe back."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def hash(self) -> str:
        """Twelve hex digits of SHA-256 over all that determines the result (name, trackers and offload do not)."""
        tree = {key: value for key, value in self.to_dict().items() if key not in ("name", "track")}
        tree["engine"].pop("offload")
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    def method_options(self) -> Any:
        """The options as an instance of the method's ``Options``."""
        return _construct(_options_of(self.method), dict(self.options), "options.")


def shipped() -> list[str]:
    """Slugs of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


# --- reading ----------------------------------------------------------------------------------------------------------
class _Text(str):
    """A value typed on the command line: parsed as YAML unless its key wants text."""


def _read(source: str | Path) -> dict[str, Any]:
    """The keys of a recipe. A file that says ``base: NAME`` holds only what differs from that shipped recipe."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{source}.yaml"
        if "/" in str(source) or not path.is_file():
            return _bare(str(source))
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"recipe file {path} does not exist", cure=f"shipped recipes: {', '.join(shipped())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values", cure="start it with `method: <slug>`")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if base not in shipped() or base == path.stem:
        raise UserError(
            f"{path}: base {base!r} is no shipped recipe{_hint(str(base), shipped())}",
            cure=f"give one of: {', '.join(shipped())}",
        )
    merged = _read(base)
    for key, value in tree.items():
        _put(merged, str(key), value)
    return merged


def _bare(slug: str) -> dict[str, Any]:
    """A method without a shipped recipe (a plug-in's) runs with its defaults."""
    from stillroom.method import methods

    known = methods()
    if slug not in known:
        raise UserError(
            f"no method or recipe {slug!r}{_hint(slug, [*known, *shipped()])}",
            cure="`stillroom methods` lists them all; a recipe file ends in .yaml",
        )
    return {"method": slug}


def override(
    tree: dict[str, Any], overrides: Sequence[str], given: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """``tree``, with dotted keys of ``given`` and then ``key=value`` texts put into it. A value that is typed as a text
    is parsed as YAML when its key's type is known. Raises UserError for a text of another form."""
    for key, value in given.items():
        _put(tree, key, value)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"override {text!r} is not of the form key=value", cure="for example engine.steps=100")
        # A whole mapping is merged into what is there, as dotted keys are.
        _put(tree, key, parse_yaml(value, f"override {key}") if value.lstrip().startswith("{") else _Text(value))
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. What lies on the way and is no mapping is left for the type check to name."""
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        inner = tree.get(part)
        if inner is None:
            inner = tree[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"recipe key {key!r} is unknown: {'.'.join(path[: depth + 1])!r} holds no further keys")
        tree = inner
    if isinstance(value, Mapping) and isinstance(tree.get(last), dict):
        for name, item in value.items():
            _put(tree[last], name, item)
    else:
        tree[last] = copy.deepcopy(value)


RENAMED = {"options.start": "student", "synthesis": "options.synthesis"}
"""Keys of earlier recipes, of methods that know them no more, and what they are called now."""


# --- checking ---------------------------------------------------------------------------------------------------------
def _options_of(slug: str) -> type:
    from stillroom.method import get_method

    return get_method(slug).Options


def known_keys(slug: str) -> list[str]:
    """All dotted keys of a recipe for this method."""
    keys = []
    for item in dataclasses.fields(Recipe):
        inner = {
            "engine": EngineConfig,
            "evaluate": Evaluate,
            "options": _options_of(slug),
        }.get(item.name)
        keys += [f"{item.name}.{f.name}" for f in dataclasses.fields(inner)] if inner else [item.name]
    return keys


def _hint(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, by the whole dotted key or by its last part."""
    known = list(known)
    if word in RENAMED:
        return f" (did you mean {RENAMED[word]!r}?)"
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
        return f" (did you mean {close[0]!r}?)"
    by_tail = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(word.rsplit(".", 1)[-1], by_tail, n=1, cutoff=0.6)
    return f" (did you mean {by_tail[close[0]]!r}?)" if close else ""


def _unknown(key: str, siblings: Iterable[str], everywhere: Iterable[str] = ()) -> UserError:
    siblings = list(siblings)
    hint = _hint(key, siblings) or _hint(key, everywhere)
    # The list of an engine's or a method's keys is long: it is given only to those who need it.
    return UserError(f"unknown recipe key {key!r}{hint}", cure="" if hint else f"known here: {', '.join(siblings)}")


def _construct(cls: type, tree: dict[str, Any], prefix: str, extra: Mapping[str, Any] | None = None) -> Any:
    """An instance of the dataclass from plain values, each converted to its field's type or refused by name."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = dict(extra or {})
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in fields:
            slug = str(tree.get("method", "")) if not prefix else ""
            raise _unknown(key, [prefix + f for f in fields], _keys_or_none(slug))
        values[name] = _convert(value, hints[name], key)
        limits = fields[name].metadata
        low, high = limits.get("min", -math.inf), limits.get("max", math.inf)
        if (
            isinstance(values[name], int | float)
            and not isinstance(values[name], bool)
            and not low <= values[name] <= high
        ):
            allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"recipe key {key!r} must be {allowed}, got {values[name]}")
    try:
        return cls(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe key {prefix.rstrip('.') or 'method'!r}: {error}") from error


def _keys_or_none(slug: str) -> list[str]:
    try:
        return known_keys(slug)
    except UserError:
        return []


def _convert(value: Any, kind: Any, key: str) -> Any:
    if isinstance(value, _Text):
        value = str(value) if kind is str else parse_yaml(value, f"override {key}")
    result = _fit(value, kind, key)
    if result is _NO:
        raise UserError(f"recipe key {key!r} must be {describe(kind)}, got {value!r:.200}{_choice_hint(value, kind)}")
    return result


_NO = object()


def _fit(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``, or ``_NO``. Integers pass as floats, whole floats as integers, booleans as neither."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        return _construct(kind, dict(value), f"{key}.") if isinstance(value, Mapping) else _NO
    if origin is Literal:
        return value if value in arguments and type(value) in {type(a) for a in arguments} else _NO
    if origin in (Union, types.UnionType):
        fits = (_fit(value, argument, key) for argument in sorted(arguments, key=lambda a: not _exact(value, a)))
        return next((fit for fit in fits if fit is not _NO), _NO)
    if kind is types.NoneType:
        return None if value is None else _NO
    if kind is bool:
        return value if isinstance(value, bool) else _NO
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        return (
            kind(value) if number and (kind is float or (math.isfinite(value) and float(value).is_integer())) else _NO
        )
    if kind is str:
        return (
            value
            if isinstance(value, str)
            else str(value)
            if isinstance(value, int | Path) and not isinstance(value, bool)
            else _NO
        )
    if (origin or kind) in (list, tuple, Sequence):
        return _fit_sequence(value, origin or kind, arguments, key)
    if (origin or kind) in (dict, Mapping):
        if not isinstance(value, Mapping):
            return _NO
        inner = arguments[1] if len(arguments) == 2 else Any
        return {str(name): _convert(item, inner, f"{key}.{name}") for name, item in value.items()}
    return value


def _fit_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return _NO
        kinds = list(arguments)
    else:
        kinds = [arguments[0] if arguments else Any] * len(value)
    items = [_convert(item, kind, f"{key}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))]
    return tuple(items) if origin is tuple else items


def _exact(value: Any, kind: Any) -> bool:
    return isinstance(kind, type) and type(value) is kind


def _choices(kind: Any) -> list[str]:
    return [str(argument) for argument in get_args(kind)] if get_origin(kind) is Literal else []


def _choice_hint(value: Any, kind: Any) -> str:
    return _hint(value, _choices(kind)) if isinstance(value, str) else ""


def describe(kind: Any) -> str:
    """What a value of this type looks like, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    if kind in names:
        return names[kind]
    if (origin or kind) is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} values"
    if (origin or kind) in (list, tuple, Sequence):
        return f"a list (each {describe(arguments[0])})" if arguments else "a list"
    return "a mapping"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
