"""What a reader of logs takes and gives."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from retrain.data.traces import Trace
from retrain.types import Message, MessageType

FaultKind = Literal["malformed", "broken_call", "no_model_message"]

CUT = ("length", "max_tokens", "max_output_tokens", "incomplete", "context")
"""Finish reasons of a reply that its token budget cut, in the words of several APIs."""


class Malformed(Exception):
    """A record that cannot be used; the message says why."""

    def __init__(self, detail: str, kind: FaultKind = "malformed") -> None:
        super().__init__(detail)
        self.kind: FaultKind = kind


@dataclass(frozen=True)
class Fault:
    """A record that was left out, and why."""

    kind: FaultKind
    place: str
    detail: str


@dataclass
class Entry:
    """One call of a model, or a whole conversation, as a log holds it.

    `messages` are in the OpenAI format (`normalise.openai_messages`), replies included.
    """

    group: str
    """Only entries of one group may be the same conversation."""
    place: str
    messages: list[dict[str, Any]]
    made: frozenset[int] | None = None
    """Which of the messages the log's model is known to have said; None: every assistant's."""
    cut: frozenset[int] = frozenset()
    """Those of them that a token budget cut."""
    tools: tuple[Mapping[str, Any], ...] = ()
    reward: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Logged:
    """One conversation of a log, its calls put together."""

    trace: Trace
    """MODEL messages are what the log's model said; other assistants' are MESSAGEs."""
    keys: tuple[str, ...]
    """Of each message, a hash of the conversation up to and with it."""
    group: str
    """The session or trace that it is part of."""
    truncated: bool
    """A token budget cut one of the MODEL messages."""
    calls: int
    """How many recorded calls it was put together from; of forks, those of no other before it."""
    reward: float | None = None
    """As the log itself gives it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """Takes the records of one format, then gives their conversations."""

    def feed(self, value: Any, place: str) -> None:
        """Take one record: a line, a row, or a whole document.

        Raises:
            Malformed: it cannot be used.
        """
        ...

    def entries(self) -> Iterator[Entry | Fault]:
        """What the records come to, in their order; called once, after all were taken."""
        ...


def chain(messages: tuple[Message, ...]) -> tuple[str, ...]:
    """Of each message, a hash of the conversation up to and with it.

    White space, reasoning, the ids of calls and whether a message trains make no difference.
    """
    keys: list[str] = []
    before = ""
    for message in messages:
        assistant = message.type is MessageType.MODEL or message.role == "assistant"
        said = (
            "assistant" if assistant else message.type.value,
            " ".join(message.content.split()),
            [(call.name, dict(call.arguments)) for call in message.tool_calls],
        )
        text = before + json.dumps(said, sort_keys=True, default=str)
        before = hashlib.blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()
        keys.append(before)
    return tuple(keys)


def number(value: Any) -> float | None:
    """A finite number (a truth value is 0 or 1), or None."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
