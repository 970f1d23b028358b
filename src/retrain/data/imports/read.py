"""Logs of any known format, from files, directories, datasets and functions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.data.files import read_files
from retrain.data.functions import call_for_rows
from retrain.data.hub import is_saved_dataset, read_dataset
from retrain.data.imports.base import Fault, Logged, Malformed, Reader
from retrain.data.imports.fold import fold
from retrain.data.imports.gateway import GatewayReader
from retrain.data.imports.langfuse import LangfuseReader, looks_like_langfuse
from retrain.data.imports.messages import MessagesReader, looks_like_messages
from retrain.data.imports.otel import OtelReader
from retrain.data.imports.smolagents import SmolagentsReader, looks_like_smolagents
from retrain.data.imports.spans import looks_like_spans
from retrain.types import UserError

FORMATS: dict[str, type[Reader]] = {
    "messages": MessagesReader,
    "gateway": GatewayReader,
    "langfuse": LangfuseReader,
    "otel": OtelReader,
    "smolagents": SmolagentsReader,
}
RECORDS_FILE = "records.jsonl"
"""What the gateway writes in its directory."""

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IMPORT_PATH = re.compile(r"[^:]+:[A-Za-z_][\w.]*")


def read_logs(sources: Sequence[str], *, format: str = "auto") -> list[Logged | Fault]:
    """Conversations of logs, in their order; faults stand among them.

    A source is a file (JSON, JSONL, Parquet), a directory of such files, one that `save_to_disk`
    wrote, a hub id, or a function `pkg.module:name` that returns rows. Of a directory with the
    gateway's `records.jsonl` only that is read. `format` is a name of FORMATS, or `auto`, which
    tells by each record.

    Raises:
        UserError: there is no such source, or nothing in it that could be read.
    """
    readers: dict[str, Reader] = {}
    faults: list[Fault] = []
    for source in sources:
        for value, place in _documents(source, faults):
            name = format if format != "auto" else detect(value)
            if name is None:
                faults.append(Fault("malformed", place, f"no known format: {_outline(value)}"))
                continue
            reader = readers.setdefault(name, FORMATS[name]())
            try:
                reader.feed(value, place)
            except Malformed as error:
                faults.append(Fault(error.kind, place, str(error)))
    found = [item for reader in readers.values() for item in fold(reader.entries())]
    return [*faults, *found]


def detect(value: Any) -> str | None:
    """The format of a record; None for none that is known."""
    if looks_like_smolagents(value):
        return "smolagents"
    if isinstance(value, list):
        roles = all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
        return "messages" if value and roles else None
    if not isinstance(value, Mapping):
        return None
    if value.get("type") in ("exchange", "session") and "session" in value:
        return "gateway"
    if looks_like_spans(value):
        return "otel"
    if looks_like_langfuse(value):
        return "langfuse"
    return "messages" if looks_like_messages(value) else None


def _outline(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, list(value)[:6])) or 'no keys'}"
    return type(value).__name__


def _documents(source: str, faults: list[Fault]) -> Iterator[tuple[Any, str]]:
    """Records with their places; lines that are not JSON become faults."""
    path = Path(source).expanduser()
    if not path.exists() and _IMPORT_PATH.fullmatch(source):
        rows = call_for_rows(source, {}, "trace function")
        yield from ((row, f"{source}[{number}]") for number, row in enumerate(rows))
        return
    hub = not path.exists() and _HUB_ID.fullmatch(source) and path.suffix not in _SUFFIXES
    if hub or is_saved_dataset(path):
        for row in read_dataset(source, streaming=bool(hub)):
            yield _present(row.columns), row.place
        return
    for file in _files(source, path):
        if file.suffix.lower() == ".parquet":
            yield from ((_present(row.columns), row.place) for row in read_files(file, "parquet"))
        elif file.suffix.lower() == ".json":
            yield from _json(file, faults)
        else:
            yield from _lines(file, faults)


def _files(source: str, path: Path) -> Iterable[Path]:
    """
    Raises:
        UserError: there is nothing to read.
    """
    if not path.exists():
        raise UserError(f"no such log: {source}", f"Looked for {path.absolute()}.")
    if path.is_file():
        return [path]
    if (path / RECORDS_FILE).is_file():
        return [path / RECORDS_FILE]
    files = [f for f in sorted(path.iterdir()) if f.is_file() and f.suffix.lower() in _SUFFIXES]
    if not files:
        raise UserError(
            f"no logs in the directory {source}", f"Looked for files {', '.join(_SUFFIXES)}."
        )
    return files


def _lines(file: Path, faults: list[Fault]) -> Iterator[tuple[Any, str]]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            place = f"{file}:{number}"
            try:
                yield json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")), place
            except (ValueError, RecursionError) as error:
                torn = not raw.endswith(b"\n")
                why = "the last line is torn" if torn else f"not JSON: {error}"
                faults.append(Fault("malformed", place, why))


def _json(file: Path, faults: list[Fault]) -> Iterator[tuple[Any, str]]:
    """A document, or the items of a list of them."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        faults.append(Fault("malformed", str(file), f"not JSON: {error}"))
        return
    if not isinstance(whole, list) or detect(whole) is not None:
        yield whole, str(file)
        return
    yield from ((value, f"{file}, row {number}") for number, value in enumerate(whole, 1))


def _present(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns with a value: Arrow fills in those that are missing."""
    return {name: value for name, value in columns.items() if value is not None}
