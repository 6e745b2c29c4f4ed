"""Rows of tables as people have them: CSV and TSV of several dialects, JSONL, parquet; UTF-8 or UTF-16, gzipped or not.

Each row comes with its place, ``FILE:LINE``; what cannot be read is named by it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stillroom.errors import UserError
from stillroom.files import unpacked
from stillroom.parsing import parse_json

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
CAPTION_KEYS = ("caption", "text", "prompt")
"""Columns that may hold a caption, the first found."""
Row = tuple[str, dict[str, Any]]
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}
_PACKED = {b"\x1f\x8b": "gzip-compressed", b"PK\x03\x04": "a zip archive or an Excel file"}


def kind_of(file: Path) -> str:
    """One of :data:`KINDS`, by the name of a file, gzipped or not; empty for another."""
    name = file.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), "")


def rows(file: Path, wanted: Sequence[str], example: str) -> Iterator[Row]:
    """Rows of a table, ``{column: value}``, each with its place. Rows without any value are passed over.

    wanted: the columns that the caller knows, by which a CSV's delimiter is told. example: a row in JSON, for messages.
    Raises UserError, naming file and line, for what is no such table.
    """
    kind = kind_of(file)
    if kind == ".jsonl":
        return _json_rows(file, example)
    if kind == ".parquet":
        return _parquet_rows(file)
    if kind:
        return _csv_rows(file, wanted, _DELIMITERS[kind])
    raise UserError(f"{file} is no table", cure=f"give one of {', '.join(KINDS)} (or .gz of it)")


# --- text -------------------------------------------------------------------------------------------------------------
def read_text(file: Path) -> str:
    """The text of a file: UTF-8 or, with its mark, UTF-16. Raises UserError naming file and line for anything else."""
    try:
        content = unpacked(file)
    except (OSError, EOFError, ValueError, zlib.error) as problem:
        raise UserError(f"cannot read {file}: {problem}", cure="give UTF-8 text, gzipped or not") from None
    for start, what in _PACKED.items():
        if content.startswith(start):
            cure = f"name it {file.name}.gz" if what.startswith("gzip") else "save it as CSV in UTF-8"
            raise UserError(f"{file} is {what}, not text", cure=cure)
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise UserError(
            f"{file}, line {line} is not {'UTF-16' if wide else 'UTF-8'}", cure="save the file as UTF-8"
        ) from None


def lines(text: str) -> list[str]:
    """Lines as editors count them. Other signs that Unicode calls line ends (U+2028, U+0085) are part of a text."""
    found = re.split(r"\r\n|\n|\r", text)
    return found[:-1] if not found[-1] else found


# --- JSON -------------------------------------------------------------------------------------------------------------
def _json_rows(file: Path, example: str) -> Iterator[Row]:
    for number, line in enumerate(lines(read_text(file)), 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = parse_json(line)
        except ValueError as problem:
            what = f"{place}: this line is no JSON ({problem})"
            raise UserError(what, cure=f"write {example} on each line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: this line is no JSON object", cure=f"write {example} on each line")
        yield place, row


# --- CSV --------------------------------------------------------------------------------------------------------------
def _csv_rows(file: Path, wanted: Sequence[str], delimiters: str) -> Iterator[Row]:
    text, skipped = read_text(file), 0
    if (at := text.find("\0")) >= 0:  # UTF-16 without its mark
        line = len(lines(text[:at])) or 1
        raise UserError(f"{file}:{line} holds a zero byte", cure="save the file as UTF-8")
    if declared := re.match(r'"?sep=(.)"?(\r\n|\n|\r)', text):  # Excel's own first line
        text, delimiters, skipped = text[declared.end() :], declared[1], 1
    with _any_length(len(text)):
        known = {mark: _heading(text, mark) for mark in delimiters}
        delimiter = max(known, key=lambda mark: len({*wanted} & {*known[mark]}))  # the first of equals
        names = known[delimiter]
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise UserError(f"{file}:{1 + skipped}: there are two columns {twice!r}", cure="keep one of them")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        found, begun = [], 0
        try:
            for values in reader:
                line, begun = begun + 1 + skipped, reader.line_num
                if "".join(values).strip():
                    found.append((line, values))
        except csv.Error as problem:
            begun, told = begun + 1 + skipped, str(problem)
            if told == "unexpected end of data":
                told = "a quote is opened here that is never closed"
            raise UserError(
                f"{file}:{begun}: {told}",
                cure="put a text with quotes or line ends in double quotes, and double the quotes inside",
            ) from None
    for line, values in found[1:]:
        if len(values) > len(names) and "".join(values[len(names) :]).strip():
            raise UserError(
                f"{file}:{line}: {len(values)} values for {len(names)} columns",
                cure=f"put a text that holds {delimiter!r} in double quotes",
            )
        yield f"{file}:{line}", dict(zip(names, values))


def _heading(text: str, delimiter: str) -> list[str]:
    """The names in the first row that has any; none where it cannot be read."""
    try:
        for values in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            if "".join(values).strip():
                return [value.strip().lstrip("\ufeff") for value in values]
    except csv.Error:
        pass
    return []


@contextlib.contextmanager
def _any_length(limit: int) -> Iterator[None]:
    """The csv module refuses fields above 131,072 characters, unless it is told otherwise."""
    before = csv.field_size_limit(max(limit + 1, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)


# --- parquet ----------------------------------------------------------------------------------------------------------
def parquet_reader() -> Any:
    """pyarrow's module. Raises UserError without it."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("parquet files are read by pyarrow", cure="pip install 'stillroom[data]'") from None
    return parquet


def _parquet_rows(file: Path) -> Iterator[Row]:
    parquet = parquet_reader()
    try:
        table = parquet.read_table(file)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot read {file}: {str(problem)[:200]}", cure="copy the file again") from None
    for name, feature in (about.get("info", {}).get("features") or {}).items():
        if name in columns and isinstance(feature, dict) and "names" in feature:  # numbers of named classes
            known = dict(enumerate(feature["names"]))
            columns[name] = [known.get(value, value) for value in columns[name]]
    for number in range(len(next(iter(columns.values()), []))):
        yield f"{file}, row {number + 1}", {name: values[number] for name, values in columns.items()}
