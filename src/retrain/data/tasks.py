"""One row to one `Task`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retrain.config.data import template_columns
from retrain.data.files import Row, column
from retrain.data.messages import messages_from_dicts, messages_to_dicts
from retrain.types import Message, MessageType, Task, UserError

_DEFAULT_ANSWER = "answer"


@dataclass(frozen=True)
class Candidate:
    """A task that a row makes, before any is left out."""

    task: Task
    prompt_key: str
    """Hash of the prompt as it reads once rendered: equal for duplicates."""
    source_key: str
    """What a holdout is decided by: the row's own prompt, white space aside."""
    place: str


def fingerprint(messages: Iterable[Message]) -> str:
    """16 hexadecimal digits that depend on what the messages say, the same on every machine."""
    return _digest(json.dumps(messages_to_dicts(messages), sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class TaskBuilder:
    """How columns become a task; the parameters are the keys of `prompt_source`."""

    prompt_column: str = "prompt"
    answer_column: str | None = _DEFAULT_ANSWER
    id_column: str | None = None
    messages_column: str | None = None
    metadata_columns: Sequence[str] | None = None
    system_prompt: str | None = None
    prompt_template: str | None = None
    content_ids: bool = True
    """Ids hash the prompt alone. Off, they hash the place too, so that duplicates differ."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Added to the metadata of each task."""
    id_prefix: str = ""
    _template_columns: tuple[str, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        if self.prompt_template is not None:
            object.__setattr__(self, "_template_columns", template_columns(self.prompt_template))

    def build(self, row: Row | Task, place: str = "") -> Candidate:
        """The task of a row; a `Task` passes through and only gains the system prompt.

        Raises:
            UserError: names the row's place: a column is missing, the prompt is empty or not text.
        """
        if isinstance(row, Task):
            return self._pass_through(row, place)
        if self.messages_column is not None:
            own = self._conversation(row)
            source = fingerprint(own)
        else:
            text, raw = self._text(row)
            own = (Message(text, MessageType.MESSAGE, role="user"),)
            source = " ".join(raw.split())
        prompt = self._with_system(own, row.place)
        key = fingerprint(prompt)
        metadata = self._with_constants(self._metadata(row), row.place)
        task = Task(self.id_prefix + self._id(row, key), prompt, self._answer(row), metadata)
        return Candidate(task, key, source, row.place)

    def _pass_through(self, task: Task, place: str) -> Candidate:
        for name, value in (
            ("prompt_template", self.prompt_template),
            ("messages_column", self.messages_column),
            ("metadata_columns", self.metadata_columns),
            ("id_column", self.id_column),
        ):
            if value is not None:
                raise UserError(
                    f"{place}: is a Task already, so {name} has no effect",
                    f"Remove prompt_source.{name}, or return dicts.",
                )
        if not task.prompt:
            raise UserError(f"{place}: task {task.id!r} has no prompt", "Give it a message.")
        prompt = self._with_system(task.prompt, place)
        metadata = task.metadata
        if self.constants:
            metadata = self._with_constants(metadata, place)
        task = replace(task, id=self.id_prefix + task.id, prompt=prompt, metadata=metadata)
        return Candidate(task, fingerprint(prompt), fingerprint(task.prompt), place)

    def _text(self, row: Row) -> tuple[str, str]:
        """The user's message, and the row's own prompt that a holdout goes by."""
        if self.prompt_template is None:
            raw = text = self._prompt_value(row)
        else:
            values = {
                name: self._prompt_value(row) if name == "prompt" else column(row, name)
                for name in self._template_columns
            }
            try:
                text = self.prompt_template.format(**values)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{row.place}: prompt_template does not fit the row: {error}",
                    "Mind the format after the colon, and columns without a value.",
                ) from error
            raw = values.get("prompt", text)
        _check_text(text, row.place)
        return text, raw

    def _prompt_value(self, row: Row) -> str:
        value = column(row, self.prompt_column)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(
                f"{row.place}: the prompt (column {self.prompt_column!r}) is empty",
                "Fill it in, or remove the row.",
            )
        if not isinstance(value, str):
            hint = "Map a column of text with prompt_column."
            if isinstance(value, list | tuple):
                hint = f"For a list of messages set messages_column: {self.prompt_column}."
            raise UserError(
                f"{row.place}: the prompt (column {self.prompt_column!r}) is "
                f"{type(value).__name__}, not text",
                hint,
            )
        return value

    def _conversation(self, row: Row) -> tuple[Message, ...]:
        assert self.messages_column is not None
        messages = messages_column(row, self.messages_column)
        if not messages or messages[-1].type is MessageType.MODEL:
            fault = "ends with the assistant's message" if messages else "is empty"
            raise UserError(
                f"{row.place}: the prompt (column {self.messages_column!r}) {fault}",
                "A prompt ends with what the model is to answer.",
            )
        for message in messages:
            _check_text(message.content, row.place, empty_ok=message is not messages[-1])
        return messages

    def _with_system(self, messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
        if self.system_prompt is None:
            return messages
        if messages[0].type is MessageType.SYSTEM:
            raise UserError(
                f"{place}: the messages have a system message already",
                "Remove prompt_source.system_prompt, or the message.",
            )
        return (Message(self.system_prompt, MessageType.SYSTEM), *messages)

    def _id(self, row: Row, key: str) -> str:
        if self.id_column is None:
            return key if self.content_ids else _digest(f"{key} {row.place}")
        value = column(row, self.id_column)
        if value is None or not str(value).strip():
            raise UserError(
                f"{row.place}: the id (column {self.id_column!r}) is empty", "Fill it in."
            )
        return str(value)

    def _answer(self, row: Row) -> Any:
        if self.answer_column is None:
            return None
        if self.answer_column == _DEFAULT_ANSWER:
            return row.columns.get(_DEFAULT_ANSWER)
        return column(row, self.answer_column)

    def _metadata(self, row: Row) -> dict[str, Any]:
        if self.metadata_columns is not None:
            return {name: column(row, name) for name in self.metadata_columns}
        own_prompt = self.messages_column or self.prompt_column
        used = {own_prompt, self.answer_column, self.id_column}
        return {name: value for name, value in row.columns.items() if name not in used}

    def _with_constants(self, metadata: dict[str, Any], place: str) -> dict[str, Any]:
        for name in self.constants:
            if name in metadata:
                raise UserError(
                    f"{place}: has the metadata {name!r}, which the source sets for all",
                    "List metadata_columns without it, or rename one of the two.",
                )
        return {**metadata, **self.constants}


def messages_column(row: Row, name: str) -> tuple[Message, ...]:
    """Messages of a column, which holds a list, or such a list as JSON text (in CSV, say)."""
    value = column(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(
                f"{row.place}: column {name!r} is neither messages nor JSON: {error}",
                'Messages look like [{"role": "user", "content": "2 + 3?"}].',
            ) from error
    if not isinstance(value, list | tuple):
        kind = "nothing" if value is None else type(value).__name__
        raise UserError(
            f"{row.place}: column {name!r} holds {kind}, not a list of messages",
            'Messages look like [{"role": "user", "content": "2 + 3?"}].',
        )
    return messages_from_dicts(value, place=row.place)


def _check_text(text: str, place: str, *, empty_ok: bool = False) -> None:
    if not empty_ok and not text.strip():
        raise UserError(f"{place}: the prompt is empty", "Fill it in, or remove the row.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: the prompt has half of a surrogate pair, which is no character",
            "Write the file again as UTF-8.",
        ) from error
