"""Conversations to imitate: the data of supervised fine-tuning."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Protocol

from retrain.data.buffer import shuffled
from retrain.data.files import SUFFIXES, Row, read_files, refuse_json, row_of
from retrain.data.functions import call_for_rows
from retrain.data.hub import is_saved_dataset, read_dataset
from retrain.data.tasks import fingerprint, messages_column
from retrain.types import Message, MessageType, UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IMPORT_PATH = re.compile(r"[^:]+:[A-Za-z_][\w.]*")
_PREVIEWED = 16


@dataclass(frozen=True)
class Trace:
    """One conversation; its MODEL messages are the targets."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that the model had, in the OpenAI format."""
    place: str = ""


class Traces(Protocol):
    """Traces, as often as wanted: epoch n is the same sequence whenever it is asked for, so that a
    run resumes by passing over the traces it has done."""

    def epoch(self, n: int) -> Iterator[Trace]: ...

    def __len__(self) -> int:
        """Traces in an epoch.

        Raises:
            TypeError: the source is a stream; it is not known before its end.
        """
        ...

    def preview(self) -> Sequence[Trace]:
        """What can be looked at before training: all of them, or of a stream the first few."""
        ...


@dataclass(frozen=True)
class TraceSource:
    """Traces in memory."""

    traces: Sequence[Trace]
    shuffle: bool
    """A new order in every epoch, from `seed`."""
    seed: int

    def epoch(self, n: int) -> Iterator[Trace]:
        order = list(range(len(self.traces)))
        if self.shuffle:
            _generator(self.seed, n).shuffle(order)
        return (self.traces[i] for i in order)

    def __len__(self) -> int:
        return len(self.traces)

    def preview(self) -> Sequence[Trace]:
        return self.traces


@dataclass(frozen=True)
class TraceStream:
    """Traces read anew in every epoch, in memory of one size."""

    reader: TraceReader
    shuffle_buffer: int | None
    """Traces among which each epoch is shuffled, from `seed`; None keeps their order."""
    seed: int

    def epoch(self, n: int) -> Iterator[Trace]:
        traces = self.reader.read()
        if self.shuffle_buffer is None:
            return traces
        return shuffled(traces, self.shuffle_buffer, _generator(self.seed, n))

    def __len__(self) -> int:
        raise TypeError("a stream of traces has no length")

    def preview(self) -> Sequence[Trace]:
        return list(islice(self.reader.read(), _PREVIEWED))


def _generator(seed: int, epoch: int) -> random.Random:
    return random.Random(f"{seed}:sft:{epoch}")


def prompt_key(trace: Trace) -> str:
    """Of what is said before the model's first word, the same on every machine."""
    said = takewhile(lambda message: message.type is not MessageType.MODEL, trace.messages)
    return fingerprint(said)


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
    reader = TraceReader(
        path,
        format=format,
        name=name,
        split=split,
        messages=messages,
        prompt=prompt,
        completion=completion,
        system_prompt=system_prompt,
        params=params or {},
    )
    return list(islice(reader.read(), limit))


@dataclass(frozen=True)
class TraceReader:
    """Reads traces one by one, as often as wanted; the parameters are those of `load_traces`."""

    path: str | Path
    format: str = "auto"
    name: str | None = None
    split: str = "train"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    system_prompt: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def read(self) -> Iterator[Trace]:
        """
        Raises:
            UserError: as `load_traces`, at the row in question; at the end if there was none.
        """
        empty = True
        for row in self._rows():
            empty = False
            yield _trace(row, self.messages, self.prompt, self.completion, self.system_prompt)
        if empty:
            raise UserError(f"{self.path} holds no trace", 'A line looks like {"messages": [...]}.')

    def check_streams(self) -> None:
        """
        Raises:
            UserError: the data can only be read as a whole.
        """
        if not self._calls and not self._is_dataset:
            refuse_json(self.path, self.format)

    @property
    def _calls(self) -> bool:
        return _IMPORT_PATH.fullmatch(str(self.path)) is not None

    @property
    def _is_dataset(self) -> bool:
        return is_saved_dataset(Path(self.path).expanduser()) or self._on_hub

    @property
    def _on_hub(self) -> bool:
        local = Path(self.path).expanduser()
        named = _HUB_ID.fullmatch(str(self.path)) is not None
        return named and not local.exists() and local.suffix not in SUFFIXES

    def _rows(self) -> Iterator[Row]:
        path = str(self.path)
        if self._calls:
            return _rows_of_function(path, self.params)
        if self._is_dataset:
            return read_dataset(path, name=self.name, split=self.split, streaming=self._on_hub)
        return read_files(self.path, self.format)


def _rows_of_function(path: str, params: Mapping[str, Any]) -> Iterator[Row]:
    for number, value in enumerate(call_for_rows(path, params, "trace function")):
        yield row_of(value, f"{path}[{number}]")


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
            "Name the columns: messages_column, prompt_column, completion_column.",
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
