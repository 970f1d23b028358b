"""Rows of messages, and rows that pair a request with its response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from retrain.data.imports.base import Entry, Fault, Malformed, number
from retrain.data.imports.exchange import Reply, Request, is_cut, read_replies, read_request
from retrain.data.imports.normalise import openai_messages, openai_tools, parsed

_REPLIES = ("response", "completion", "choices", "reply", "output")
_SESSIONS = ("session", "session_id", "conversation_id", "trace_id", "thread_id")
_REWARDS = ("reward", "score")
_OWN = ("messages", "conversations", "prompt", "request", "tools", "functions", *_REPLIES)


def looks_like_messages(value: Mapping[str, Any]) -> bool:
    if "messages" in value or "conversations" in value or "request" in value:
        return True
    return "prompt" in value and any(key in value for key in _REPLIES)


class MessagesReader:
    """`{"messages": [...]}` is a conversation that trains as a whole.

    `{"messages" or "prompt": ..., "response" | "completion" | "choices" | "reply" | "output": ...}`
    and `{"request": {...}, "response": {...}}` are calls: the reply trains, the request's own
    assistants where another call of the session, or without one of the file, returned them.
    Other columns are metadata; `reward` or `score` is the log's own reward.
    """

    def __init__(self) -> None:
        self._entries: list[Entry | Fault] = []

    def feed(self, value: Any, place: str) -> None:
        if isinstance(value, list):
            value = {"messages": value}
        if not isinstance(value, Mapping) or not looks_like_messages(value):
            raise Malformed("no messages and no request with its response")
        reply = next((value[key] for key in _REPLIES if value.get(key) is not None), None)
        if reply is None and value.get("request") is None:
            said = value.get("messages") or value.get("conversations")
            messages = openai_messages(parsed(said))
            cut = frozenset([len(messages) - 1] if is_cut(value) else [])
            tools = openai_tools(_tools(value))
            entry = Entry(place, place, messages, cut=cut, tools=tools)
            self._entries.append(_with_columns(entry, value))
            return
        request = _request(value)
        if isinstance(value.get("choices"), list | tuple):
            reply = {"choices": value["choices"]}
        session = next((value[key] for key in _SESSIONS if value.get(key)), None)
        file = place.rpartition(":")[0] or place.partition(",")[0]
        group = f"session {session}" if session is not None else f"file {file}"
        for answer in read_replies(reply):
            cut_here = answer.cut or is_cut(value)
            self._entries.append(
                call_entry(value, place, group, request, Reply(answer.messages, cut_here))
            )

    def entries(self) -> Iterator[Entry | Fault]:
        yield from self._entries


def call_entry(
    columns: Mapping[str, Any], place: str, group: str, request: Request, reply: Reply
) -> Entry:
    """A call; what `columns` holds beside it is metadata."""
    start = len(request.messages)
    messages = [*request.messages, *reply.messages]
    made = frozenset(i for i in range(start, len(messages)) if messages[i]["role"] == "assistant")
    messages = messages[: max(made) + 1]
    cut = frozenset([max(made)]) if reply.cut else frozenset()
    entry = Entry(group, place, messages, made, cut, request.tools)
    _with_columns(entry, columns)
    if request.model is not None:
        entry.metadata.setdefault("model", request.model)
    return entry


def _with_columns(entry: Entry, columns: Mapping[str, Any]) -> Entry:
    scores = [number(columns.get(key)) for key in _REWARDS]
    entry.reward = next((score for score in scores if score is not None), None)
    entry.metadata = {k: v for k, v in columns.items() if k not in _OWN and v is not None}
    return entry


def _request(value: Mapping[str, Any]) -> Request:
    if value.get("request") is not None:
        return read_request(value["request"])
    said = parsed(value.get("messages") or value.get("conversations") or value.get("prompt"))
    own = {key: value[key] for key in ("model", "system", "instructions") if value.get(key)}
    return read_request({"messages": said, "tools": _tools(value), **own})


def _tools(value: Mapping[str, Any]) -> Any:
    return value.get("tools") or value.get("functions")
