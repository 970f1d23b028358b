"""Rows of data files, one at a time, each with the place that an error should name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain.types import UserError

SUFFIXES = {
    ".txt": "txt",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 64


@dataclass(frozen=True)
class Row:
    columns: Mapping[str, Any]
    place: str
    """For error messages: "data.jsonl, line 3"."""


def row_of(value: Any, place: str) -> Row:
    """A row from an object, or from a bare string, which is the column `prompt`.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, str):
        return Row({"prompt": value}, place)
    if isinstance(value, Mapping):
        return Row(value, place)
    raise UserError(
        f"{place}: expected an object or a string, found {type(value).__name__}",
        'A row looks like {"prompt": "2 + 3?", "answer": 5}.',
    )


_COLUMN_HINT = "Map the columns with prompt_column, answer_column, ... to names that exist."


def column(row: Row, name: str, *, hint: str = _COLUMN_HINT) -> Any:
    """A column's value; where no column has the name, `a.b` is key or index b of a.

    Raises:
        UserError: the row has no such column; names what there is, and `hint` as the next step.
    """
    if name in row.columns:
        return row.columns[name]
    found: Any = row.columns
    inside = ""
    for part in name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list | tuple) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            names = ", ".join(map(str, found)) if isinstance(found, Mapping) else ""
            where = f"in {inside} there is" if inside else "there is"
            raise UserError(f"{row.place}: no column {name!r}; {where}: {names or 'none'}", hint)
        inside = f"{inside}.{part}".removeprefix(".")
    return found


def data_files(path: str | Path, format: str = "auto") -> list[tuple[Path, str]]:
    """The data files that a path means, with their formats; a directory's in order of name.

    Raises:
        UserError: nothing there, no data there, a suffix that is not known, or formats mixed.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"no such file: {path}", f"Looked for {root.absolute()}.")
    if not root.is_dir():
        return [(root, _format_of(root, format))]
    found = [
        (file, SUFFIXES[file.suffix.lower()])
        for file in sorted(root.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.suffix.lower() in SUFFIXES
    ]
    chosen = [pair for pair in found if format in ("auto", pair[1])]
    if not chosen:
        wanted = ", ".join(SUFFIXES) if format == "auto" else f"format {format}"
        raise UserError(f"no data files in the directory {path}", f"Looked for: {wanted}.")
    kinds = sorted({kind for _, kind in chosen})
    if len(kinds) > 1:
        raise UserError(
            f"the directory {path} holds data of several formats: {', '.join(kinds)}",
            "Set format to one of them, or path to one file.",
        )
    return chosen


def _format_of(file: Path, format: str) -> str:
    if format != "auto":
        return format
    kind = SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise UserError(
            f"cannot tell the format of {file} from its suffix {file.suffix!r}",
            f"Set format to one of: {', '.join(dict.fromkeys(SUFFIXES.values()))}.",
        )
    return kind


def refuse_json(path: str | Path, format: str = "auto") -> None:
    """
    Raises:
        UserError: what is to be streamed is JSON.
    """
    if any(kind == "json" for _, kind in data_files(path, format)):
        raise UserError(
            f"{path} is JSON, which can only be read as a whole",
            "Set streaming: false, or convert the file to JSONL.",
        )


def read_files(path: str | Path, format: str = "auto") -> Iterator[Row]:
    """Rows of a file, or of a directory's files. Only JSON is held in memory as a whole."""
    for file, kind in data_files(path, format):
        yield from _READERS[kind](file)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, line ends kept, byte order mark dropped."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield number, raw.removeprefix(_BOM if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, number, error) from error


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(
        f"{file}, line {line}: byte 0x{byte:02x} is not UTF-8", "Save the file as UTF-8."
    )


def _read_txt(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if text := line.strip():
            yield Row({"prompt": text}, f"{file}, line {number}")


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if line.strip():
            place = f"{file}, line {number}"
            yield row_of(_parse_json(line, place), place)


def _read_json(file: Path) -> Iterator[Row]:
    raw = file.read_bytes().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, raw.count(b"\n", 0, error.start) + 1, error) from error
    rows = _parse_json(text, str(file)) if text.strip() else []
    if not isinstance(rows, list):
        raise UserError(
            f"{file}: expected a list of rows, found {type(rows).__name__}",
            "If there is one object per line, set format to jsonl.",
        )
    for number, value in enumerate(rows, 1):
        yield row_of(value, f"{file}, row {number}")


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise UserError(
            f"{place}: malformed JSON: {error.msg} ({where})", "Repair or remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: JSON that cannot be read: {error}", "Remove it.") from error


def _read_csv(file: Path) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            place = f"{file}, line {reader.line_num}"
            if not cells:
                continue
            if header is None:
                header = _csv_header(cells, place)
            elif len(cells) != len(header):
                raise UserError(
                    f"{place}: {len(cells)} fields where the header has {len(header)}",
                    'Put quotes around a field that contains a comma: "a, b".',
                )
            else:
                yield Row(dict(zip(header, cells, strict=True)), place)
    except csv.Error as error:
        raise UserError(
            f"{file}, line {reader.line_num}: malformed CSV: {error}", "Repair the file's quotes."
        ) from error


def _csv_header(cells: list[str], place: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for name in header:
        if not name or header.count(name) > 1:
            fault = f"the column {name!r} twice" if name else "a column without a name"
            raise UserError(f"{place}: the header has {fault}", "Name each column once.")
    return header


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{file}: Parquet needs pyarrow", "Run: pip install 'retrain[data]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(columns, f"{file}, row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{file}: not a readable Parquet file: {error}", "Write it again."
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "txt": _read_txt,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
