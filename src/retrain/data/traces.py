"""Conversations to imitate: the data of supervised fine-tuning."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from retrain.data.files import SUFFIXES, Row, read_files, row_of
from retrain.data.functions import call_for_rows
from retrain.data.hub import is_saved_dataset, read_dataset
from retrain.data.tasks import fingerprint, messages_column
from retrain.types import Message, MessageType, UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IMPORT_PATH = re.compile(r"[^:]+:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Trace:
    """One conversation; its MODEL messages are the targets."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that the model had, in the OpenAI format."""
    place: str = ""


@dataclass(frozen=True)
class TraceSource:
    """Traces, as often as wanted: epoch n is the same sequence whenever it is asked for."""

    traces: Sequence[Trace]
    shuffle: bool
    """A new order in every epoch, from `seed`."""
    seed: int

    def epoch(self, n: int) -> Iterator[Trace]:
        order = list(range(len(self.traces)))
        if self.shuffle:
            random.Random(f"{self.seed}:sft:{n}").shuffle(order)
        return (self.traces[i] for i in order)

    def __len__(self) -> int:
        return len(self.traces)


def load_traces(
    path: str | Path,
    *,
    format: str = "auto",
    name: str | None = None,
    split: str = "train",
    messages: str = "messages",
    prompt: str = "prompt",
    completion: str = "completion",
    system_prompt: str | None = None,
    limit: int | None = None,
    params: Mapping[str, Any] | None = None,
) -> list[Trace]:
    """Traces of a file, a directory, a dataset (what `save_to_disk` wrote, or a hub id), or of a
    function `pkg.module:name` that returns rows when it is called with `params`.

    A row has the column `messages` (OpenAI format), or the columns `prompt` and `completion`,
    each of them text or messages; a column `tools` is optional. `system_prompt` is put before
    conversations that have no system message. `name` and `split` choose within a dataset, and
    `format` says what a file is when its suffix does not.

    Raises:
        UserError: names the file and line: malformed data, an unknown role, nothing to train on.
    """
    rows = (
        _rows_of_function(str(path), params or {})
        if _IMPORT_PATH.fullmatch(str(path))
        else _rows(path, format, name, split)
    )
    traces = [
        _trace(row, messages, prompt, completion, system_prompt) for row in islice(rows, limit)
    ]
    if not traces:
        raise UserError(f"{path} holds no trace", 'A line looks like {"messages": [...]}.')
    return traces


def _rows_of_function(path: str, params: Mapping[str, Any]) -> Iterator[Row]:
    for number, value in enumerate(call_for_rows(path, params, "trace function")):
        yield row_of(value, f"{path}[{number}]")


def _rows(path: str | Path, format: str, name: str | None, split: str) -> Iterator[Row]:
    local = Path(path).expanduser()
    hub = not local.exists() and _HUB_ID.fullmatch(str(path)) and local.suffix not in SUFFIXES
    if is_saved_dataset(local) or hub:
        return read_dataset(str(path), name=name, split=split, streaming=bool(hub))
    return read_files(path, format)


def _trace(
    row: Row, messages: str, prompt: str, completion: str, system_prompt: str | None
) -> Trace:
    if row.columns.get(messages) is not None:
        said = messages_column(row, messages)
    elif row.columns.get(prompt) is not None and row.columns.get(completion) is not None:
        said = _side(row, prompt, MessageType.MESSAGE) + _side(row, completion, MessageType.MODEL)
    else:
        names = ", ".join(map(str, row.columns)) or "none"
        raise UserError(
            f"{row.place}: a trace needs the column {messages!r}, or {prompt!r} and "
            f"{completion!r}; there is: {names}",
            "Rename the columns, or name them in the call.",
        )
    if not any(message.type is MessageType.MODEL for message in said):
        raise UserError(
            f"{row.place}: no assistant message, so nothing to train on", "Remove the row."
        )
    _check_targets(said, row.place)
    if system_prompt is not None and said[0].type is not MessageType.SYSTEM:
        said = (Message(system_prompt, MessageType.SYSTEM), *said)
    return Trace(fingerprint(said), said, _tools(row), row.place)


def _side(row: Row, name: str, kind: MessageType) -> tuple[Message, ...]:
    value = row.columns[name]
    if not isinstance(value, str):
        return messages_column(row, name)
    if not value.strip():
        raise UserError(f"{row.place}: the column {name!r} is empty", "Remove the row.")
    return (Message(value, kind, role="user" if kind is MessageType.MESSAGE else None),)


def _check_targets(messages: tuple[Message, ...], place: str) -> None:
    for number, message in enumerate(messages, 1):
        if message.type is not MessageType.MODEL:
            continue
        if not (message.content.strip() or message.tool_calls or message.reasoning):
            raise UserError(
                f"{place}, message {number}: the assistant says nothing", "Remove the message."
            )


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    tools = row.columns.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise UserError(
                f"{row.place}: the column 'tools' is not JSON: {error}",
                "It is a list of schemas in the OpenAI format.",
            ) from error
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise UserError(
            f"{row.place}: the column 'tools' is not a list of objects",
            "It is a list of schemas in the OpenAI format.",
        )
    return tuple(tools)
