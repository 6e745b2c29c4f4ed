"""JSON and YAML of other people's: whatever they hold, they are read in little time and memory, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from stillroom.errors import UserError

DEEPEST = 100
"""Levels that a JSON or YAML file may be nested."""
LARGEST_YAML = 1 << 16
"""Bytes of a YAML file; recipes have a few thousand."""
MOST_VALUES = 50_000
"""Values of a YAML file, each use of an alias counted anew."""


def parse_json(text: str | bytes, nan: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError for what is no JSON, for more than :data:`DEEPEST` levels and, unless
    ``nan``, for NaN."""
    try:
        tree = json.loads(text, parse_constant=None if nan else _constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [tree], 0
    while level := [inner for value in level for inner in _inside(value)]:
        if (depth := depth + 1) > DEEPEST:
            raise ValueError("it is nested too deeply")
    return tree


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value")
    return float(name)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


MERGE = "tag:yaml.org,2002:merge"


# YAML 1.2's core schema, by the first letters of what it names. PyYAML's own, of YAML 1.1, makes 8 of 010, 90 of 1:30,
# True of on and a date of 2026-11-29, and leaves 1e-4 a text.
_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)


class Written(int):
    """A whole number that a file writes otherwise than Python would (007), as a text the way it stands there."""

    text = ""

    def __str__(self) -> str:
        return self.text or int.__repr__(self)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but plain words and numbers are read as YAML 1.2 says, a key given twice is an error, and
    neither nesting nor aliases can grow without bound."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._size(node, {})
        return node

    def _size(self, node: yaml.Node, known: dict[int, int]) -> int:
        """Values below a node. A node within itself has been entered, but not left."""
        if (size := known.get(id(node))) is not None:
            if not size:
                raise yaml.constructor.ConstructorError(None, None, "an alias stands inside itself", node.start_mark)
            return size
        known[id(node)] = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        size = 1 + sum(self._size(one, known) for one in inner)
        if size > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "it holds too many values", node.start_mark)
        known[id(node)] = size
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain word", key_node.start_mark)
            if key_node.tag == MERGE:
                continue
            if (key := self.construct_object(key_node, deep=True)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = int(text if base == 10 else text[2:], base)
        if text == str(number):
            return number
        written = Written(number)
        written.text = text
        return written


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or of YAML 1.2 would take for something else."""

    yaml_implicit_resolvers = {first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _kind, _words, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_words})$"), [*_first])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"$"), [""])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


_Dumper.add_representer(Written, lambda dumper, number: dumper.represent_int(int(number)))


def dump_yaml(tree: Any) -> str:
    """Plain values as a YAML text, which :func:`parse_yaml` gives back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text: plain data, never objects. Raises UserError naming ``where`` and line for what is no
    YAML, for tags of other languages, for more than :data:`DEEPEST` levels or :data:`MOST_VALUES` values."""
    if len(text) > LARGEST_YAML:
        raise UserError(f"{where}: {len(text):,} characters are too many", cure=f"at most {LARGEST_YAML:,} are read")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises FileNotFoundError without it, and UserError as :func:`parse_yaml` does."""
    try:
        if (size := path.stat().st_size) > LARGEST_YAML:
            raise UserError(f"{path} has {size:,} bytes", cure=f"at most {LARGEST_YAML:,} are read")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", cure="give a file of UTF-8 text") from error
    return parse_yaml(text, str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises UserError where there is none."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing", cure="point at a complete folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error})", cure="restore the file") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping", cure="restore the file")
    return found
