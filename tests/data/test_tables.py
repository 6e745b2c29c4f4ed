"""Tables as people have them: what is read of each dialect, and that everything else is named by its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stillroom.data.captioned_folders import read_captions
from stillroom.data.prompt_sources import prompt_source
from stillroom.data.tables import kind_of, rows
from stillroom.data.texts import load_texts
from stillroom.errors import UserError

WANTED, EXAMPLE = ("text", "label"), '{"text": "..."}'
TEXTS = [("a dull film", "neg"), ("good, but long", "pos"), ('they said "no"', "neg"), ("two\nlines", "pos")]


def table(pairs: Sequence[Any] = tuple(TEXTS), head: Sequence[str] = WANTED, **dialect: Any) -> str:
    file = io.StringIO()
    writer = csv.writer(file, **dialect)
    writer.writerow(head)
    writer.writerows(pairs)
    return file.getvalue()


def found(file: Path) -> list[tuple[Any, Any]]:
    return [(row["text"], row["label"]) for _, row in rows(file, WANTED, EXAMPLE)]


def lines(pairs: Sequence[Any] = tuple(TEXTS)) -> str:
    return "".join(json.dumps({"text": t, "label": b}, ensure_ascii=False) + "\n" for t, b in pairs)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", table().encode()),
        ("unix.csv", table(lineterminator="\n").encode()),
        ("mac.csv", table(lineterminator="\r", quoting=csv.QUOTE_ALL).encode()),
        ("excel.csv", b"\xef\xbb\xbf" + table().encode()),
        ("semicolons.csv", table(delimiter=";").encode()),
        ("tabs.csv", table(delimiter="\t").encode()),
        ("bars.csv", table(delimiter="|").encode()),
        ("declared.csv", b"sep=;\r\n" + table(delimiter=";").encode()),
        ("all quoted.csv", table(quoting=csv.QUOTE_ALL).encode()),
        ("unicode.csv", table(delimiter="\t").encode("utf-16")),
        ("big.csv", b"\xfe\xff" + table().encode("utf-16-be")),
        ("a.tsv", table(delimiter="\t").encode()),
        ("commas.tsv", table().encode()),
        ("a.csv.gz", gzip.compress(table().encode())),
        ("empty rows.csv", (table() + "\r\n,\r\n , \r\n").encode()),
        ("more columns.csv", table([(*pair, "7") for pair in TEXTS], (*WANTED, "")).encode()),
        ("other order.csv", table([(1, b, a) for a, b in TEXTS], ("id", " label", "text ")).encode()),
        ("a.jsonl", lines().encode()),
        ("windows.jsonl", b"\xef\xbb\xbf" + lines().replace("\n", "\r\n").encode()),
        ("wide.jsonl", lines().encode("utf-16")),
        ("blank lines.jsonl", (lines().replace("\n", "\n\n") + "\n \n").encode()),
        ("a.jsonl.gz", gzip.compress(lines().encode())),
    ],
)
def test_dialects(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert found(tmp_path / name) == TEXTS


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_other_signs_end_no_line(tmp_path: Path, sign: str) -> None:
    pairs = [(f"a{sign}b", "x"), ("c", "y")]
    (tmp_path / "a.csv").write_text(table(pairs), newline="")
    (tmp_path / "a.jsonl").write_text(lines(pairs))
    assert found(tmp_path / "a.csv") == found(tmp_path / "a.jsonl") == pairs
    (tmp_path / "a.txt").write_text(f"a{sign}b\nc\n")
    assert read_captions(tmp_path / "a.txt").texts == ["a b", "c"]


def test_long_fields_are_read_and_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    pairs = [("bad " * 40_000, "neg"), ("good", "pos")]
    (tmp_path / "a.csv").write_text(table(pairs))
    before = csv.field_size_limit()
    assert found(tmp_path / "a.csv") == pairs
    assert csv.field_size_limit() == before


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('sep=,\ntext,label\n"one\ntwo",x\n\nthree,y\n')
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    places = [[place.rpartition("/")[2] for place, _ in rows(tmp_path / name, WANTED, EXAMPLE)]
              for name in ("a.csv", "a.jsonl")]  # fmt: skip
    assert places == [["a.csv:3", "a.csv:6"], ["a.jsonl:2", "a.jsonl:4"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "b", "label": 2},\n',
            r"a\.jsonl:2: this line is no JSON",
        ),
        ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]\n', r"a\.jsonl:1: this line is no JSON"),
        ("a.jsonl", b'[{"text": "a"}]\n', r"a\.jsonl:1: this line is no JSON object"),
        ("a.jsonl", b'{"text": NaN}\n', r"a\.jsonl:1: this line is no JSON \(NaN"),
        ("a.csv", b"text,label\na,x\ngood, but long,y\n", r"a\.csv:3: 3 values for 2 columns; .*',' in double quotes"),
        ("a.csv", b'text,label\na,x\n"b,y\nc,x\nd,y\n', r"a\.csv:3: a quote is opened here that is never closed"),
        ("a.csv", b'text,label\na,x\n"b" and c,y\n', r"a\.csv:3: ',' expected after"),
        ("a.csv", b"text,text,label\na,b,x\n", r"a\.csv:1: there are two columns 'text'"),
        ("a.csv", b"text,label\na\0,x\n", r"a\.csv:2 holds a zero byte; save the file as UTF-8"),
        ("a.csv", "text,label\na,x\nt\xf6,y\n".encode("latin-1"), r"a\.csv, line 3 is not UTF-8"),
        ("a.csv", b"\xff\xfet\0e\0x", r"a\.csv, line 1 is not UTF-16"),
        ("a.csv", gzip.compress(b"text,label\n"), r"a\.csv is gzip-compressed, not text; name it a\.csv\.gz"),
        ("a.csv", b"PK\x03\x04....", r"a\.csv is a zip archive or an Excel file.*save it as CSV"),
        ("a.csv.gz", b"text,label\na,x\n", r"cannot read .*a\.csv\.gz"),
        ("a.xlsx", b"", "is no table"),
    ],
)
def test_what_is_no_such_table_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(rows(tmp_path / name, WANTED, EXAMPLE))
    assert "\n" not in str(caught.value)


def test_kinds_by_name() -> None:
    names = ("a.csv", "A.CSV", "a.tsv.gz", "a.jsonl", "a.parquet", "a.json", "csv", "a.csv.zip")
    assert [kind_of(Path(name)) for name in names] == [".csv", ".csv", ".tsv", ".jsonl", ".parquet", "", "", ""]


# --- captions and prompts ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["caption", "text", "prompt"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "csv.gz"])
def test_captions_of_tables(tmp_path: Path, key: str, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    texts = ["a red cat", "a blue dog, asleep"]
    if ending == "jsonl":
        file.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts) + "\n\n")
    else:
        content = table([(1, text) for text in texts], ("id", key), delimiter="\t" if ending == "tsv" else ",").encode()
        file.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert read_captions(file).texts == texts
    assert [text for text, _ in prompt_source(str(file))] == texts


def test_a_table_of_one_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\na red cat\n")
    assert read_captions(tmp_path / "a.csv").texts == ["a red cat"]
    (tmp_path / "a.csv").write_text("words\na red cat\n")
    with pytest.raises(UserError, match=r"a\.csv:2 has no caption or text or prompt; it has: words"):
        read_captions(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text('["a red cat"]')
    with pytest.raises(UserError, match=r"a\.json is one JSON text, not lines; save it as \.jsonl"):
        read_captions(tmp_path / "a.json")


# --- parquet ----------------------------------------------------------------------------------------------------------
def test_parquet_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"parquet files are read by pyarrow; pip install 'stillroom\[data\]'"):
        load_texts(tmp_path / "a.parquet")


def test_texts_of_parquet_with_the_names_of_their_classes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    made = pyarrow.table({"text": [f"text {i}" for i in range(10)], "label": [i % 2 for i in range(10)]})
    parquet.write_table(made, tmp_path / "plain.parquet")
    names = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    parquet.write_table(made.replace_schema_metadata({"huggingface": json.dumps(names)}), tmp_path / "hf.parquet")
    assert load_texts(tmp_path / "plain.parquet", "all").classes == ["0", "1"]
    assert load_texts(tmp_path / "hf.parquet", "all").classes == ["neg", "pos"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot read .*bad\.parquet"):
        load_texts(tmp_path / "bad.parquet")
