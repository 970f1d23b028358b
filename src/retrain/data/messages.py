"""OpenAI-style message dicts to `Message`s, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from retrain.types import Message, MessageType, ToolCall, UserError

_TYPES = {
    "system": MessageType.SYSTEM,
    "developer": MessageType.SYSTEM,
    "user": MessageType.MESSAGE,
    "assistant": MessageType.MODEL,
    "tool": MessageType.TOOL,
}
_ROLES = {
    MessageType.SYSTEM: "system",
    MessageType.MESSAGE: "user",
    MessageType.MODEL: "assistant",
    MessageType.TOOL: "tool",
}


def messages_from_dicts(
    rows: Iterable[Mapping[str, Any]], *, place: str = "messages"
) -> tuple[Message, ...]:
    """Messages of a conversation in the OpenAI chat format.

    A key whose value is None counts as absent, since Arrow fills missing keys that way; for the
    same reason a None inside tool arguments that are an object (not a JSON string) is dropped.
    An assistant message with `weight: 0` is not to be trained, so it becomes a MESSAGE of role
    "assistant".

    Raises:
        UserError: names `place` and the message's number, counted from 1.
    """
    if isinstance(rows, str | bytes | Mapping):
        raise UserError(f"{place}: expected a list of messages, found {_kind(rows)}", _SHAPE)
    return tuple(
        _message_from_dict(row, f"{place}, message {number}") for number, row in enumerate(rows, 1)
    )


def messages_to_dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The OpenAI chat format of messages; `messages_from_dicts` is its inverse.

    A MESSAGE of a role that the format lacks is written as the user's, with its role as the name.
    `turn` is not written.
    """
    return [_message_to_dict(message) for message in messages]


_SHAPE = 'A message looks like {"role": "user", "content": "2 + 3?"}.'


def _message_from_dict(row: Mapping[str, Any], place: str) -> Message:
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: expected an object, found {_kind(row)}", _SHAPE)
    role = row.get("role")
    if not isinstance(role, str) or role not in _TYPES:
        known = ", ".join(_TYPES)
        raise UserError(f"{place}: unknown role {role!r}", f"Known roles: {known}.")
    if row.get("function_call") is not None:
        raise UserError(f"{place}: function_call is not read", "Write it as tool_calls.")
    kind = _TYPES[role]
    calls = row.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise UserError(f"{place}: tool_calls is {_kind(calls)}", "It must be a list of calls.")
    tool_calls = tuple(
        _call_from_dict(c, f"{place}, tool call {i}") for i, c in enumerate(calls or (), 1)
    )
    if tool_calls and role != "assistant":
        raise UserError(f"{place}: a {role} message has tool_calls", "Only the assistant calls.")
    reasoning = _text(row, "reasoning_content", place)
    if reasoning is None:
        reasoning = _text(row, "reasoning", place)
    keeps_role = role in ("user", "developer")
    if row.get("weight") is not None:
        if role != "assistant" or row["weight"] not in (0, 1):
            raise UserError(
                f"{place}: weight {row['weight']!r} on a message of role {role!r}",
                "weight is 0 or 1, and for assistant messages only.",
            )
        if row["weight"] == 0:
            kind, keeps_role = MessageType.MESSAGE, True
    return Message(
        content=_content(row, place, optional=bool(tool_calls) or reasoning is not None),
        type=kind,
        role=role if keeps_role else None,
        name=_text(row, "name", place),
        reasoning=reasoning,
        tool_calls=tool_calls,
        tool_call_id=_text(row, "tool_call_id", place),
    )


def _content(row: Mapping[str, Any], place: str, *, optional: bool) -> str:
    content = row.get("content")
    if content is None:
        if optional:
            return ""
        raise UserError(f"{place}: content is missing", _SHAPE)
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(f"{place}: content is {_kind(content)}", "It must be text.")
    texts: list[str] = []
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(f"{place}: content has a part that is not text", "Keep the text parts.")
        texts.append(part["text"])
    return "".join(texts)


def _text(row: Mapping[str, Any], key: str, place: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: {key} is {_kind(value)}", "It must be text.")
    return value


def _call_from_dict(call: Any, place: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if function is None:
        function = call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{place}: no function name",
            'A call looks like {"id": "1", "type": "function", "function": '
            '{"name": "python", "arguments": "{\\"code\\": \\"1\\"}"}}.',
        )
    return ToolCall(
        name=function["name"],
        arguments=_arguments(function.get("arguments"), place),
        id=_text(call, "id", place) or "",
        error=_text(call, "error", place),
    )


def _arguments(value: Any, place: str) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if not isinstance(value, str):
        raise UserError(f"{place}: arguments are {_kind(value)}", "They must be a JSON object.")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: arguments are not JSON ({error}): {value[:80]!r}",
            "Repair the trace, or leave it out.",
        ) from error
    if not isinstance(parsed, dict):
        raise UserError(f"{place}: arguments are {_kind(parsed)}", "They must be a JSON object.")
    return parsed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _message_to_dict(message: Message) -> dict[str, Any]:
    role, name = _ROLES[message.type], message.name
    row: dict[str, Any] = {}
    if message.type is MessageType.MESSAGE and message.role == "assistant":
        role, row["weight"] = "assistant", 0
    elif message.type is MessageType.SYSTEM and message.role == "developer":
        role = "developer"
    elif message.type is MessageType.MESSAGE and message.role not in (None, "user"):
        name = name or message.role
    row = {"role": role, "content": message.content, **row}
    if message.reasoning is not None:
        row["reasoning_content"] = message.reasoning
    if name is not None:
        row["name"] = name
    if message.tool_calls:
        row["tool_calls"] = [_call_to_dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    return row


def _call_to_dict(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    row: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
    if call.error is not None:
        row["error"] = call.error
    return row


def _kind(value: Any) -> str:
    """A value's type, in a reader's words."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{type(value).__name__} {value!r}"
