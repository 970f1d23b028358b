"""Messages and tool schemas of several APIs to the OpenAI chat format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from retrain.data.imports.base import Malformed

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool-response": "tool",
}
_TEXT = ("text", "input_text", "output_text", "refusal")
_REASONING = ("thinking", "reasoning", "redacted_thinking", "summary_text", "reasoning_text")
_CALLS = ("tool_use", "tool_call", "function_call")
_RESULTS = ("tool_result", "tool_call_response", "function_call_output")


def parsed(value: Any) -> Any:
    """The object or list that a text is the JSON of; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def openai_messages(value: Any) -> list[dict[str, Any]]:
    """Messages in the OpenAI chat format, from those of the Chat Completions, Responses and
    Anthropic APIs, of OpenTelemetry (`parts`) and of ShareGPT (`from`, `value`). A text is the
    user's message.

    Raises:
        Malformed: it is none of them, or holds what is not text.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = value.get("messages", [value])
    if not isinstance(value, list | tuple):
        raise Malformed(f"expected messages, found {type(value).__name__}")
    rows: list[dict[str, Any]] = []
    for item in value:
        for row in _spread(item):
            if row.pop("joins", False) and rows and rows[-1]["role"] == "assistant":
                _join(rows[-1], row)
            else:
                rows.append(row)
    return rows


def _join(row: dict[str, Any], more: dict[str, Any]) -> None:
    """Add an item of one reply to those before it: the Responses API lists them one by one."""
    for key in ("content", "reasoning_content"):
        if more.get(key):
            row[key] = (row.get(key) or "") + more[key]
    if more.get("tool_calls"):
        row["tool_calls"] = [*row.get("tool_calls", ()), *more["tool_calls"]]


@dataclass
class _Parts:
    """The content of one message, sorted."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def _spread(item: Any) -> Iterator[dict[str, Any]]:
    """The messages of one item: results of tools stand alone."""
    if not isinstance(item, Mapping):
        raise Malformed(f"a message is {type(item).__name__}, not an object")
    kind = item.get("type")
    if kind in (*_CALLS, *_RESULTS, "reasoning") and "role" not in item:
        parts = _sorted([item])
        if parts.results:
            yield from parts.results
        else:
            yield {**_assistant(parts), "joins": True}
        return
    role = item.get("role") or item.get("from") or kind
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise Malformed(f"unknown role {role!r}")
    role = _ROLES[role.lower()]
    parts = _sorted(_content(item))
    if role == "assistant":
        yield _with_own(item, parts)
        return
    yield from parts.results
    if parts.text or not parts.results:
        row = {"role": role, "content": "".join(parts.text)}
        keys = ("name", "tool_call_id") if role == "tool" else ("name",)
        yield row | {key: item[key] for key in keys if isinstance(item.get(key), str)}


def _with_own(item: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    """An assistant's message with the keys that stand beside its content."""
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(item.get(key), str):
            parts.reasoning.append(item[key])
            break
    if not parts.text and isinstance(item.get("refusal"), str):
        parts.text.append(item["refusal"])
    calls = item.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise Malformed("tool_calls is not a list")
    parts.calls += [_call(call) for call in calls]
    if item.get("function_call"):
        parts.calls.append(_call(item["function_call"]))
    row = _assistant(parts)
    if item.get("id") is not None and item.get("type") == "message":
        row["joins"] = True
    if item.get("weight") in (0, 1) and item["weight"] is not None:
        row["weight"] = int(item["weight"])
    return row


def _assistant(parts: _Parts) -> dict[str, Any]:
    row: dict[str, Any] = {"role": "assistant", "content": "".join(parts.text)}
    if parts.reasoning:
        row["reasoning_content"] = "".join(parts.reasoning)
    if parts.calls:
        row["tool_calls"] = parts.calls
    return row


def _content(item: Mapping[str, Any]) -> Iterable[Any]:
    for key in ("parts", "content", "value", "contents"):
        if item.get(key) is not None:
            found = item[key]
            return found if isinstance(found, list | tuple) else [found]
    return ()


def _sorted(items: Iterable[Any]) -> _Parts:
    parts = _Parts()
    for part in items:
        if isinstance(part, str):
            parts.text.append(part)
            continue
        if not isinstance(part, Mapping):
            raise Malformed(f"content is {type(part).__name__}, not text")
        kind = part.get("type") or ("text" if "text" in part else None)
        if kind in _TEXT:
            parts.text.append(_text_of(part))
        elif kind in _REASONING:
            parts.reasoning.append(_text_of(part))
        elif kind in _CALLS:
            parts.calls.append(_call(part))
        elif kind in _RESULTS:
            parts.results.append(_result(part))
        else:
            raise Malformed(f"content of type {kind!r}, which is not text")
    return parts


def _text_of(part: Mapping[str, Any]) -> str:
    for key in ("text", "content", "thinking", "refusal", "summary", "data"):
        found = part.get(key)
        if isinstance(found, str):
            return "" if key == "data" else found
        if isinstance(found, list | tuple) and found:
            return "".join(_text_of(inner) for inner in found if isinstance(inner, Mapping))
    return ""


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise Malformed(f"a tool call is {type(call).__name__}, not an object")
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Malformed("a tool call without a name", "broken_call")
    arguments = next(
        (function[key] for key in ("arguments", "input", "args") if function.get(key) is not None),
        None,
    )
    identity = call.get("call_id") or call.get("id") or ""
    if isinstance(arguments, Mapping):
        arguments = dict(arguments)
    elif arguments is not None and arguments != "":
        arguments = _checked(name, arguments)
    return {"id": str(identity), "function": {"name": name, "arguments": arguments}}


def _checked(name: str, arguments: Any) -> str:
    """The text of a JSON object, as it stands."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise Malformed(
            f"the arguments of {name} are not JSON: {str(arguments)[:80]!r}", "broken_call"
        ) from error
    if not isinstance(found, dict):
        raise Malformed(f"the arguments of {name} are no JSON object", "broken_call")
    return str(arguments)


def _result(part: Mapping[str, Any]) -> dict[str, Any]:
    found = next(
        (part[key] for key in ("content", "output", "response", "result") if key in part), ""
    )
    row: dict[str, Any] = {"role": "tool", "content": as_text(found)}
    identity = part.get("tool_use_id") or part.get("call_id") or part.get("id")
    if isinstance(identity, str):
        row["tool_call_id"] = identity
    if isinstance(part.get("name"), str):
        row["name"] = part["name"]
    return row


def as_text(value: Any) -> str:
    """What a tool returned, as text: parts joined, other values as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list | tuple) and value and all(map(_is_text, value)):
        return "".join(map(_text_of, value))
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _TEXT


def openai_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Schemas in the OpenAI chat format, from those of the APIs that `openai_messages` knows.

    Raises:
        Malformed: one has no name.
    """
    value = parsed(value)
    if not isinstance(value, list | tuple):
        return ()
    return tuple(_schema(parsed(item)) for item in value)


def _schema(item: Any) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Malformed("a tool's schema has no name")
    if function is not item:
        return dict(item)
    parameters = next(
        (
            found
            for key in ("parameters", "input_schema", "inputSchema", "parameters_json_schema")
            if isinstance(found := parsed(function.get(key)), Mapping)
        ),
        {"type": "object", "properties": {}},
    )
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": dict(parameters),
        },
    }
