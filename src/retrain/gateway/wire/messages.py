"""The messages of a chat request, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrain.gateway.ask import RequestRefused, Wire, text_of
from retrain.gateway.wire.fields import listing, mapping, text, wrong

_ROLES = {"system": "system", "developer": "system", "user": "user"}


def read_messages(value: Any) -> tuple[Wire, ...]:
    """The conversation as `Ask.messages` has it.

    Raises:
        RequestRefused: a message that is malformed, or in a place where its role cannot be: results
            of tools follow the message that called them, and every call has one.
    """
    if not listing(value, "messages"):
        raise RequestRefused("messages must not be empty", param="messages")
    read = []
    open_calls: dict[str, bool] = {}
    """Of the last message with calls, by id: whether the result is still to come."""
    for index, message in enumerate(value):
        place = f"messages[{index}]"
        role = mapping(message, place).get("role")
        if role == "tool":
            read.append(_tool(message, place, open_calls))
            continue
        _all_answered(open_calls, place)
        if role == "assistant":
            read.append(_assistant(message, place))
            calls = read[-1].get("tool_calls", ())
            open_calls = {call["id"]: True for call in calls}
        elif role in _ROLES:
            content = _content(message, place)
            read.append(_named(message, {"role": _ROLES[role], "content": content}, place))
            open_calls = {}
        else:
            raise _no_role(role, place)
    _all_answered(open_calls, "the end of messages")
    return tuple(read)


def _no_role(role: Any, place: str) -> RequestRefused:
    if role == "function":
        return RequestRefused(
            f"{place} has the role 'function', which is obsolete; send role 'tool' with a "
            "tool_call_id",
            param=f"{place}.role",
        )
    return wrong(f"{place}.role", "one of system, developer, user, assistant, tool", role)


def _content(message: Wire, place: str) -> str:
    if message.get("content") is None:
        raise RequestRefused(f"{place} has no content", param=f"{place}.content")
    return text_of(message["content"], f"{place}.content")


def _named(message: Wire, read: dict[str, Any], place: str) -> dict[str, Any]:
    if message.get("name") is not None:
        read["name"] = text(message["name"], f"{place}.name")
    return read


def _tool(message: Wire, place: str, open_calls: dict[str, bool]) -> dict[str, Any]:
    call_id = text(message.get("tool_call_id"), f"{place}.tool_call_id")
    if call_id not in open_calls:
        raise RequestRefused(
            f"{place} is the result of a tool call {call_id!r}, and the message before it has no "
            "such call" + (f": {', '.join(open_calls)}" if open_calls else ""),
            param=f"{place}.tool_call_id",
        )
    open_calls[call_id] = False
    read = {"role": "tool", "tool_call_id": call_id, "content": _content(message, place)}
    return _named(message, read, place)


def _all_answered(open_calls: Mapping[str, bool], place: str) -> None:
    missing = [call_id for call_id, is_open in open_calls.items() if is_open]
    if missing:
        raise RequestRefused(
            f"before {place}, results of tool calls are missing: {', '.join(missing)}",
            param="messages",
        )


def _assistant(message: Wire, place: str) -> dict[str, Any]:
    for obsolete in ("function_call", "audio"):
        if message.get(obsolete) is not None:
            raise RequestRefused(
                f"{place}.{obsolete} is not understood; calls are read from tool_calls",
                param=f"{place}.{obsolete}",
            )
    content: str | None = text_of(_without_refusals(message.get("content")), f"{place}.content")
    calls = [
        _call(call, f"{place}.tool_calls[{index}]")
        for index, call in enumerate(
            listing(message.get("tool_calls") or [], f"{place}.tool_calls")
        )
    ]
    if calls and message.get("content") is None:
        content = None
    read: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        read["tool_calls"] = calls
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str):
        read["reasoning_content"] = reasoning
    if message.get("refusal") is not None:
        read["refusal"] = text(message["refusal"], f"{place}.refusal")
    return _named(message, read, place)


def _without_refusals(content: Any) -> Any:
    """Parts with a refusal as parts of text, which is what the model said in any case."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("refusal")}
        if isinstance(part, Mapping) and part.get("type") == "refusal"
        else part
        for part in content
    ]


def _call(value: Any, place: str) -> dict[str, Any]:
    call = mapping(value, place)
    if call.get("type", "function") != "function":
        raise wrong(f"{place}.type", "'function'", call["type"])
    function = mapping(call.get("function"), f"{place}.function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise wrong(f"{place}.function.arguments", "JSON as a string", arguments)
    name = text(function.get("name"), f"{place}.function.name")
    return {
        "id": text(call.get("id"), f"{place}.id"),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
