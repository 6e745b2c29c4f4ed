"""Arguments of the command line: from a list of words to a command, and every mistake in one line."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import operator
import re
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from stillroom.errors import UserError


def parse(commands: Sequence[type], argv: list[str]) -> Any:
    """The one of ``commands`` (by the names of their classes) that ``argv`` asks for. A mistake is one line, as every
    other error; ``--help`` exits."""
    if not argv:
        argv = ["--help"]
    names = [cls.__name__.lower() for cls in commands]
    if not argv[0].startswith("-") and argv[0] not in names:
        close = difflib.get_close_matches(argv[0], names, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown command {argv[0]!r}{hint}", cure=f"commands: {', '.join(names)}")
    kinds = [Annotated[cls, subcommand(name)] for cls, name in zip(commands, names, strict=True)]
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            return tyro.cli(
                functools.reduce(operator.or_, kinds),
                args=_overrides_last(argv),
                prog="stillroom",
                description="A teacher goes in, a smaller or faster student comes out.",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(error.getvalue()), cure=f"see `stillroom {argv[0]} --help`") from None


def _overrides_last(argv: list[str]) -> list[str]:
    """``run dmd2 engine.batch=8 --steps 5 options.x=1``: overrides may stand anywhere."""
    if argv[0] not in ("run", "plan", "teach"):
        return argv
    plain, moved = [], []
    for before, token in itertools.pairwise(argv):
        is_override = re.match(r"[A-Za-z_][\w.-]*=", token) and not before.startswith("--")
        (moved if is_override else plain).append(token)
    return [argv[0], *plain, *moved]


def _one_line(box: str) -> str:
    """tyro's boxed message in one line: what is wrong and, for a misspelt option, the nearest one."""
    lines = [line.strip("│╭╰╮╯ \t").strip("─ ") for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    if bad := re.search(r"Unrecognized options: (\S+?),? ", text + " "):
        meant = re.search(r"Perhaps you meant: (--[\w-]+)", text)
        return f"unknown argument {bad[1]!r}" + (f" (did you mean {meant[1]!r}?)" if meant else "")
    if bad := re.search(r"Error parsing (\S+?):.* from \['(.*?)'\]", text):
        return f"{bad[1]}: {bad[2]!r} is not of the right kind"
    if bad := re.search(r"invalid choice '(.*?)' for argument '(\S+?)'\. Expected one of \((.*?),?\)", text):
        return f"{bad[2]}: {bad[1]!r} is none of {bad[3]}"
    return text.split(" Argument helptext:")[0].split(" For full helptext")[0]
