"""Function tools, calls and their results in chat's shape, for the APIs that have another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.gateway.ask import RequestRefused, ToolChoice, Wire
from retrain.gateway.wire.fields import mapping, text, wrong
from retrain.rendering import ToolSchema

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


def function_tool(
    name: Any, description: Any, parameters: Any, *, place: str, schema_key: str
) -> ToolSchema:
    """
    Args:
        place: of the tool, for errors.
        schema_key: what the API calls its parameters.

    Raises:
        RequestRefused: one of them is malformed.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong(f"{place}.name", "1 to 128 of letters, digits, _ and -", name)
    function: dict[str, Any] = {"name": name}
    if description is not None:
        if not isinstance(description, str):
            raise wrong(f"{place}.description", "a string", description)
        function["description"] = description
    where = f"{place}.{schema_key}"
    schema = {"type": "object", "properties": {}} if parameters is None else parameters
    if mapping(schema, where).get("type", "object") != "object":
        raise wrong(f"{where}.type", "'object'", schema["type"])
    mapping(schema.get("properties") or {}, f"{where}.properties")
    function["parameters"] = schema
    return {"type": "function", "function": function}


def check_names(tools: Sequence[ToolSchema]) -> None:
    """
    Raises:
        RequestRefused: two have one name.
    """
    names: set[str] = set()
    for tool in tools:
        name = tool["function"]["name"]
        if name in names:
            raise RequestRefused(f"tools has the name {name!r} twice", param="tools")
        names.add(name)


def required(tools: Sequence[ToolSchema]) -> ToolChoice:
    """
    Raises:
        RequestRefused: there is nothing to call.
    """
    if not tools:
        raise RequestRefused("tool_choice asks for a call, and tools is empty", param="tool_choice")
    return "required"


def named(name: Any, tools: Sequence[ToolSchema]) -> ToolChoice:
    """
    Raises:
        RequestRefused: there is no such tool.
    """
    wanted = text(name, "tool_choice.name")
    if all(tool["function"]["name"] != wanted for tool in tools):
        raise RequestRefused(
            f"tool_choice asks for {wanted!r}, which is not among tools", param="tool_choice"
        )
    return f"tool:{wanted}"


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """One of an assistant's `tool_calls`; the arguments are JSON text."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def words(message: Wire) -> str:
    """What an assistant's message says, a refusal included."""
    return message.get("content") or message.get("refusal") or ""


def calls_of(message: Wire) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each."""
    return [
        (each["id"], each["function"]["name"], each["function"]["arguments"])
        for each in message.get("tool_calls") or ()
    ]


def response_format(
    name: Any, schema: Any, *, place: str, strict: Any = None, description: Any = None
) -> Mapping[str, Any]:
    """Chat's `response_format` for a JSON schema.

    Raises:
        RequestRefused: the name or the schema is malformed.
    """
    form = {"name": text(name, f"{place}.name"), "schema": mapping(schema, f"{place}.schema")}
    more = {"strict": strict, "description": description}
    form |= {key: value for key, value in more.items() if value is not None}
    return {"type": "json_schema", "json_schema": form}
