"""Data files to rows: what is tolerated, and what is refused with its line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.data.files import read_files
from retrain.types import UserError


def rows(path: Path, format: str = "auto") -> list[dict[str, Any]]:
    return [dict(row.columns) for row in read_files(path, format)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


TWO = [{"prompt": "a"}, {"prompt": "b, c"}]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.txt", b"\xef\xbb\xbfa\r\n\r\n  \nb, c"),
        ("x.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b, c"}\r\n'),
        ("x.ndjson", b'"a"\n"b, c"'),
        ("x.json", b'\xef\xbb\xbf[{"prompt": "a"},\r\n "b, c"]'),
        ("x.csv", b'\xef\xbb\xbfprompt\r\na\r\n\r\n"b, c"\r\n'),
        ("X.CSV", b'prompt\na\n"b, c"'),
    ],
)
def test_marks_line_ends_and_blank_lines_are_tolerated(
    tmp_path: Path, name: str, data: bytes
) -> None:
    assert rows(write(tmp_path / name, data)) == TWO


def test_a_quoted_field_may_span_lines_and_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b'prompt,n\n"a\nb",1\nc,2,3\n')
    reader = read_files(path)
    assert dict(next(reader).columns) == {"prompt": "a\nb", "n": "1"}
    with pytest.raises(UserError, match="line 4: 3 fields where the header has 2"):
        next(reader)


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2)))
def test_csv_written_by_the_standard_library_reads_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt", "b"], *cells])
    path = tmp_path_factory.getbasetemp() / "property.csv"
    path.write_bytes(text.getvalue().encode())
    assert rows(path) == [{"prompt": a, "b": b} for a, b in cells]


def test_parquet_keeps_types_and_order_over_batches(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"prompt": [f"p{i}" for i in range(150)], "answer": list(range(150))})
    parquet.write_table(table, tmp_path / "x.parquet")
    read = list(read_files(tmp_path / "x.parquet"))
    expected = [{"prompt": f"p{i}", "answer": i} for i in range(150)]
    assert [row.columns for row in read] == expected
    assert read[149].place.endswith("x.parquet, row 150")


def test_a_line_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    reader = read_files(write(tmp_path / "x.jsonl", b'{"prompt": "a"}\n{broken\n'))
    assert next(reader).columns == {"prompt": "a"}
    with pytest.raises(UserError, match="line 2: malformed JSON"):
        next(reader)


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("x.jsonl", b'{"prompt": 1}\n{"prompt" 2}\n', r"line 2: malformed JSON: .*column 11"),
        ("x.jsonl", b'"a"\n[1]\n', "line 2: expected an object or a string, found list"),
        ("x.jsonl", b"[" * 100_000, "line 1: JSON that cannot be read"),
        ("x.jsonl", b'"a"\n"\xff"\n', "line 2: byte 0xff is not UTF-8"),
        ("x.txt", b"a\nb\nc\xe9d\n", "line 3: byte 0xe9 is not UTF-8"),
        ("x.csv", b"prompt\na\n\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
        ("x.json", b'["a",\n"\xe9"]', "line 2: byte 0xe9 is not UTF-8"),
        ("x.json", b'[{"prompt": 1},\n{]', "malformed JSON: .*line 2"),
        ("x.json", b'{"prompt": 1}', "expected a list of rows, found dict"),
        ("x.json", b"[1]", "row 1: expected an object or a string, found int"),
        ("x.csv", b"a,b\n1\n", "line 2: 1 fields where the header has 2"),
        ("x.csv", b"a,a\n", "line 1: the header has the column 'a' twice"),
        ("x.csv", b"a,\n", "line 1: the header has a column without a name"),
        ("x.csv", b'a\n"b\n', "malformed CSV"),
        ("x.parquet", b"no parquet", "not a readable Parquet file"),
        ("x.tsv", b"a", "cannot tell the format .* '.tsv'"),
    ],
)
def test_a_fault_names_the_file_and_the_line(
    tmp_path: Path, name: str, data: bytes, fault: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=fault) as caught:
        rows(path)
    assert str(path) in caught.value.cause
    assert caught.value.next_step


def test_format_overrides_the_suffix(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "x.log", b'"a"\n"b, c"'), "jsonl") == TWO


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "b, c"), ("a.jsonl", "a"), (".hidden.jsonl", "no")):
        write(tmp_path / name, json.dumps(text).encode())
    write(tmp_path / "README.md", b"not data")
    assert rows(tmp_path) == TWO
    write(tmp_path / "notes.txt", b"note")
    with pytest.raises(UserError, match="several formats: jsonl, txt"):
        rows(tmp_path)
    assert rows(tmp_path, "jsonl") == TWO
    with pytest.raises(UserError, match="no data files in the directory"):
        rows(tmp_path, "csv")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        rows(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="no data files in the directory"):
        rows(tmp_path)
