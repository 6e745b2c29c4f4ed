"""Recipes: everything that determines a run, as one YAML file that reproduces it.

A recipe is read strictly. An unknown key, a wrong type or a value out of range is a :class:`UserError` that names the
key, says what is allowed and suggests the nearest known key.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from stillroom.engine.config import EngineConfig
from stillroom.engine.track import names_of
from stillroom.errors import UserError
from stillroom.parsing import dump_yaml, parse_yaml, read_yaml
from stillroom.values import Typed, construct, convert, nearest_key, unknown

if TYPE_CHECKING:
    from stillroom.method import Turn

DEFAULT = "lightgen-quick"
"""The recipe of ``stillroom run`` without arguments."""

SHIPPED = Path(__file__).parent / "recipes"
PAPERS = SHIPPED / "papers"


@dataclass
class Evaluate:
    """How the finished student is drawn, timed and scored."""

    n: int = field(default=5000, metadata={"min": 0})
    """Samples for the scores; 0 skips timing and scoring."""
    seed: int = field(default=0, metadata={"min": 0, "max": 2**63 - 1})
    """Seed of those samples, and of those on the sheets."""
    samples: int = field(default=80, metadata={"min": 0})
    """Pictures on each model's sheet, at most; 0 draws none."""
    teachers: Literal["auto", "always", "never"] = "auto"
    """Whether teachers are drawn, timed and scored beside the student; auto: if a picture takes up to 1 TFLOP."""


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
    folder: str = ""
    """Where relative paths begin; a run notes its working folder here, so that it can be resumed from any other."""

    # --- in ----------------------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = (), **given: Any) -> Recipe:
        """Read a shipped recipe by slug, a YAML file, or a run folder; then apply overrides.

        ``overrides`` are ``key=value`` texts with dotted keys (``engine.steps=100``); ``given`` are keys with values.
        Raises :class:`UserError`, and never anything else, for whatever is wrong with the input.
        """
        tree = _read(source)
        folder = tree.get("folder")
        tree = override(tree, overrides, given)
        if folder and tree.get("folder") == folder:  # what is named now is named from here
            changed = {*given, *(text.partition("=")[0] for text in overrides)}
            for key in changed & {"teacher", "student", "data"}:
                if isinstance(named := tree[key], str):
                    tree[key] = type(named)(",".join(map(from_here, named.split(","))))
        return cls.from_dict(tree)

    def changed(self, *overrides: str) -> Recipe:
        """This recipe with ``key=value`` overrides. Raises UserError as :meth:`load` does."""
        return Recipe.from_dict(override(self.to_dict(), overrides))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Recipe:
        """Build and check a recipe. Options are checked against the method's own ``Options``."""
        from stillroom.method import get_method

        known = dict(tree)
        if "method" not in known:
            raise UserError("recipe key 'method' is missing", cure="`stillroom methods` lists them all")
        options = known.pop("options", None) or {}
        if not isinstance(options, Mapping):
            options = convert(options, dict, "options")  # a text that is no mapping is refused here
        recipe = construct(cls, known, "", {"options": options}, _keys_of(str(known["method"])))
        method = get_method(recipe.method)
        options = construct(method.Options, recipe.options, "options.")
        recipe.options = dataclasses.asdict(options)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*|", recipe.name):
            raise UserError(
                f"recipe key 'name' must be letters, digits, '.', '_' or '-', got {recipe.name!r}",
                cure="for example dmd2-seed1",
            )
        recipe.name = recipe.name or recipe.method
        names_of(recipe.track)
        recipe.engine.check_turns(list(method.declared_turns()))  # those that are switched off may have settings too
        recipe._check_turns(method.turns_for(options))
        return recipe

    def trained(self) -> list[str]:
        """The roles that the method's turns train with these options."""
        from stillroom.method import get_method

        method = get_method(self.method)
        return _trained(method.turns_for(construct(method.Options, self.options, "options.")))

    def _check_turns(self, turns: Sequence[Turn]) -> None:
        trained = _trained(turns)
        self._check_lora(trained)
        averages = ["student"]
        for i, entry in enumerate(self.engine.ema):
            if (of := entry.get("of", "student")) not in trained and trained:
                raise UserError(
                    f"recipe key 'engine.ema[{i}].of' is {of!r}{nearest_key(of, trained)}",
                    cure=f"trained here: {', '.join(trained)}",
                )
            averages.append(entry.get("name", "ema"))
        if self.engine.export not in averages:
            raise UserError(
                f"recipe key 'engine.export' is {self.engine.export!r}{nearest_key(self.engine.export, averages)}",
                cure=f"allowed here: {', '.join(averages)}",
            )

    def _check_lora(self, trained: list[str]) -> None:
        """Types, limits and roles; whether the role's network takes an adapter is seen when it is built."""
        if not self.lora:
            return
        from stillroom.surgery.lora import lora_role

        kinds = typing.get_type_hints(lora_role, include_extras=True)
        for name in ("teacher", "role", "return"):
            del kinds[name]
        for role, settings in self.lora.items():
            if role not in trained:
                raise unknown(f"lora.{role}", [f"lora.{name}" for name in trained])
            for key, value in settings.items():
                if key not in kinds:
                    raise unknown(f"lora.{role}.{key}", [f"lora.{role}.{kind}" for kind in kinds])
                settings[key] = convert(value, kinds[key], f"lora.{role}.{key}")

    # --- out ---------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain types only, every default filled in; ``Recipe.from_dict`` gives the same recipe back."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return dump_yaml(self.to_dict())

    def hash(self) -> str:
        """Twelve hex digits of SHA-256 over all that determines the student and its scores (name, trackers, working
        folder, offload, and what else is drawn do not)."""
        tree = {key: value for key, value in self.to_dict().items() if key not in ("name", "track", "folder")}
        tree["engine"].pop("offload")
        for key in ("samples", "teachers"):
            tree["evaluate"].pop(key)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """While it lasts the working folder is that where the recipe's relative paths begin, if it is still there."""
        with contextlib.chdir(self.folder if self.folder and Path(self.folder).is_dir() else "."):
            yield

    def method_options(self) -> Any:
        """The options as an instance of the method's ``Options``."""
        return construct(_options_of(self.method), dict(self.options), "options.")


def shipped() -> list[str]:
    """Slugs of the recipes that come with the package, for its benches and shipped models."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def papers(slug: str = "") -> list[str]:
    """Names of the recipes that come with the package for public models, with what the papers used: papers/SLUG-MODEL.
    slug: only those of this method."""
    return sorted(f"{PAPERS.name}/{path.stem}" for path in PAPERS.glob(f"{slug}-*.yaml" if slug else "*.yaml"))


def _trained(turns: Sequence[Turn]) -> list[str]:
    return list(dict.fromkeys(role for turn in turns for role in turn.trains))


def named() -> list[str]:
    """Every name that :meth:`Recipe.load` finds a file for."""
    return [*shipped(), *papers()]


# --- reading ----------------------------------------------------------------------------------------------------------
def _read(source: str | Path) -> dict[str, Any]:
    """The keys of a recipe. A file that says ``base: NAME`` holds only what differs from that shipped recipe."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{source}.yaml"
        if str(source) not in named():
            return _bare(str(source))
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"recipe file {path} does not exist", cure=f"shipped recipes: {', '.join(named())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values", cure="start it with `method: <slug>`")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if base not in named() or SHIPPED / f"{base}.yaml" == path:
        raise UserError(
            f"{path}: base {base!r} is no shipped recipe{nearest_key(str(base), named())}",
            cure=f"give one of: {', '.join(named())}",
        )
    merged = _read(base)
    for key, value in tree.items():
        _put(merged, str(key), value)
    return merged


def from_here(name: str) -> str:
    """A teacher's, student's or data set's name; the absolute path where it is one that exists here."""
    place = name.strip()
    there = any(place and Path(one).expanduser().exists() for one in (place, place.rpartition("@")[0] or place))
    return str(Path(place).expanduser().absolute()) if there else name


def _bare(slug: str) -> dict[str, Any]:
    """A method without a shipped recipe (a plug-in's) runs with its defaults."""
    from stillroom.method import methods

    known = methods()
    if slug not in known:
        raise UserError(
            f"no method or recipe {slug!r}{nearest_key(slug, [*known, *named()])}",
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
        _put(tree, key, parse_yaml(value, f"override {key}") if value.lstrip().startswith("{") else Typed(value))
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
            _put(tree[last], str(name), item)
    else:
        tree[last] = copy.deepcopy(value)


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


def _keys_of(slug: str) -> Iterator[str]:
    """:func:`known_keys`, found when somebody asks; none for an unknown method."""
    with contextlib.suppress(UserError):
        yield from known_keys(slug)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
