"""Requests of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrain.gateway.ask import Ask, RequestRefused, ToolChoice, Wire, text_of
from retrain.gateway.wire.calls import (
    call,
    check_names,
    function_tool,
    named,
    required,
    response_format,
)
from retrain.gateway.wire.chat import is_retry
from retrain.gateway.wire.fields import boolean, integer, listing, mapping, number, text, wrong
from retrain.rendering import ToolSchema

WITH_LOGPROBS = "message.output_text.logprobs"
_ELSEWHERE = {
    "conversation": "send the items, or `previous_response_id`",
    "prompt": "there are no stored prompts here; send `instructions` and `input`",
}
"""Keys that would change the answer, and what to do without them."""
_ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}

Item = Mapping[str, Any]
Find = Callable[[str], Item]
"""An item of an earlier answer by its id; raises RequestRefused."""


@dataclass(frozen=True)
class ResponsesAsk(Ask):
    body: Mapping[str, Any] = field(default_factory=dict)
    """The request: an answer repeats much of it."""
    told: tuple[Wire, ...] = ()
    """The messages that this request adds, without its instructions: those hold for it alone."""
    owner: str = field(default="", repr=False)
    """Who may go on with the answer."""


def read_request(body: Mapping[str, Any], headers: Mapping[str, str], find: Find) -> ResponsesAsk:
    """A request on its own: `messages` has nothing of `previous_response_id`. What says nothing of
    the answer is dropped: include, metadata, truncation, user, what names caches and tiers.

    Raises:
        RequestRefused: see `Dialect.read`.
    """
    for key, instead in _ELSEWHERE.items():
        if body.get(key) is not None:
            raise RequestRefused(f"{key} is not supported: {instead}", param=key)
    if boolean(body, "background"):
        raise RequestRefused("background is not supported: wait for the answer", param="background")
    told = tuple(_input(body, find))
    instructions = body.get("instructions") or ""
    if not isinstance(instructions, str):
        raise wrong("instructions", "a string", instructions)
    tools = _tools(body.get("tools"))
    include = listing(body.get("include") or [], "include")
    return ResponsesAsk(
        messages=(*([{"role": "system", "content": instructions}] if instructions else ()), *told),
        tools=tools,
        tool_choice=_tool_choice(body.get("tool_choice"), tools),
        parallel_tool_calls=boolean(body, "parallel_tool_calls", True),
        max_tokens=integer(body, "max_output_tokens", 1),
        logprobs=WITH_LOGPROBS in include,
        model=text(body.get("model"), "model"),
        stream=boolean(body, "stream"),
        retried=is_retry(headers),
        sampling=_sampling(body),
        body=body,
        told=told,
    )


def check_results(messages: Sequence[Wire]) -> None:
    """
    Raises:
        RequestRefused: a call without its output, or an output without its call.
    """
    waiting: dict[str, None] = {}
    known: set[str] = set()
    for message in messages:
        for each in message.get("tool_calls") or ():
            waiting[each["id"]] = None
            known.add(each["id"])
        if message["role"] == "tool":
            call_id = message["tool_call_id"]
            if call_id not in known:
                raise RequestRefused(
                    f"no function_call before the function_call_output with call_id {call_id!r}",
                    param="input",
                )
            waiting.pop(call_id, None)
    if waiting:
        call_id = next(iter(waiting))
        raise RequestRefused(
            f"no function_call_output for the function_call with call_id {call_id!r}",
            param="input",
        )


def _input(body: Mapping[str, Any], find: Find) -> list[Wire]:
    value = body.get("input")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not value and body.get("previous_response_id"):
        return []
    if value is None:
        raise RequestRefused("input is missing", code="missing_required_parameter", param="input")
    if not listing(value, "input"):
        raise RequestRefused("input is empty", param="input")
    return read_items(value, find)


def read_items(items: Sequence[Any], find: Find) -> list[Wire]:
    """Items as chat messages. Reasoning, a message and calls that stand together are one message of
    the assistant; a second message, or reasoning after a message, begins another. Calls of one
    answer stay together where each is followed by its own output.

    Raises:
        RequestRefused: one of them is malformed, or of a type that is not served.
    """
    messages: list[dict[str, Any]] = []
    origins: list[str | None] = []
    for index, item in enumerate(items):
        place = f"input[{index}]"
        message = _read_item(mapping(item, place), place, find)
        origin = reply_id_of(item.get("id")) if message["role"] == "assistant" else None
        last = _last_of(messages, origins, origin)
        if last is not None and _continues(last, message):
            _join(last, message)
        else:
            messages.append(message)
            origins.append(origin)
    return [m for m in messages if m["content"] is not None or m.get("tool_calls")]


def reply_id_of(item_id: Any) -> str | None:
    """The id of the reply that an item of an answer is of, such as `msg_ID` or `fc_ID_0`."""
    kind, _, rest = item_id.partition("_") if isinstance(item_id, str) else ("", "", "")
    return (rest.rpartition("_")[0] if kind == "fc" else rest) or None


def _last_of(
    messages: list[dict[str, Any]], origins: Sequence[str | None], origin: str | None
) -> dict[str, Any] | None:
    """The message that an item of the reply `origin` may belong to."""
    at = len(messages) - 1
    while origin is not None and at >= 0 and messages[at]["role"] == "tool":
        at -= 1
    if at < 0 or (at < len(messages) - 1 and origins[at] != origin):
        return None
    return messages[at]


def _continues(last: Wire, message: Wire) -> bool:
    if last["role"] != "assistant" or message["role"] != "assistant":
        return False
    if message["content"] is not None:
        return last["content"] is None
    return "tool_calls" in message or last["content"] is None or "tool_calls" in last


def _join(last: dict[str, Any], message: Mapping[str, Any]) -> None:
    if message["content"] is not None:
        last["content"] = message["content"]
    if "tool_calls" in message:
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
    thoughts = [m["reasoning_content"] for m in (last, message) if "reasoning_content" in m]
    if thoughts:
        last["reasoning_content"] = "\n".join(thoughts)


def _read_item(item: Item, place: str, find: Find) -> dict[str, Any]:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "item_reference":
        return _read_item(find(text(item.get("id"), f"{place}.id")), place, find)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise RequestRefused(
            f"{place} has the type {kind!r}; served are {', '.join(_READERS)} and item_reference",
            code="unsupported_value",
            param=f"{place}.type",
        )
    return reader(item, place)


def _message(item: Item, place: str) -> dict[str, Any]:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{place}.role", "one of user, assistant, system, developer", role)
    return {"role": _ROLES[role], "content": _text(item, "content", place)}


def _function_call(item: Item, place: str) -> dict[str, Any]:
    arguments = item.get("arguments")
    if not isinstance(arguments, str):
        raise wrong(f"{place}.arguments", "a string of JSON", arguments)
    call_id = text(item.get("call_id"), f"{place}.call_id")
    name = text(item.get("name"), f"{place}.name")
    return {"role": "assistant", "content": None, "tool_calls": [call(call_id, name, arguments)]}


def _function_call_output(item: Item, place: str) -> dict[str, Any]:
    call_id = text(item.get("call_id"), f"{place}.call_id")
    return {"role": "tool", "tool_call_id": call_id, "content": _text(item, "output", place)}


def _reasoning(item: Item, place: str) -> dict[str, Any]:
    thoughts = text_of(item.get("content"), f"{place}.content")
    thoughts = thoughts or text_of(item.get("summary"), f"{place}.summary")
    message: dict[str, Any] = {"role": "assistant", "content": None}
    return message | ({"reasoning_content": thoughts} if thoughts else {})


_READERS: dict[str, Callable[[Item, str], dict[str, Any]]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
}


def _text(item: Item, key: str, place: str) -> str:
    content = item.get(key)
    if content is None:
        raise wrong(f"{place}.{key}", "text or a list of parts", content)
    return text_of(content, f"{place}.{key}")


def _tools(value: Any) -> tuple[ToolSchema, ...]:
    tools = []
    for index, tool in enumerate(listing(value or [], "tools")):
        place = f"tools[{index}]"
        kind = mapping(tool, place).get("type")
        if kind != "function":
            raise RequestRefused(
                f"{place} has the type {kind!r}: nothing here runs it; only tools of type "
                "'function', which the caller runs, are served",
                code="unsupported_value",
                param=f"{place}.type",
            )
        description, parameters = tool.get("description"), tool.get("parameters")
        made = function_tool(
            tool.get("name"), description, parameters, place=place, schema_key="parameters"
        )
        if boolean(tool, "strict"):
            made = {"type": "function", "function": {**made["function"], "strict": True}}
        tools.append(made)
    check_names(tools)
    return tuple(tools)


def _tool_choice(value: Any, tools: Sequence[ToolSchema]) -> ToolChoice:
    if value is None or value in ("auto", "none"):
        return value or "auto"
    if value == "required":
        return required(tools)
    if not isinstance(value, Mapping) or value.get("type") != "function":
        raise wrong("tool_choice", "auto, none, required, or an object of type function", value)
    return named(value.get("name"), tools)


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    reasoning = mapping(body.get("reasoning") or {}, "reasoning")
    form = mapping(body.get("text") or {}, "text")
    sampling = {
        "temperature": number(body, "temperature", 0.0, 2.0),
        "top_p": number(body, "top_p", 0.0, 1.0),
        "top_logprobs": integer(body, "top_logprobs", 0, 20),
        "reasoning_effort": reasoning.get("effort"),
        "verbosity": form.get("verbosity"),
        "response_format": _format(form.get("format")),
    }
    return {name: value for name, value in sampling.items() if value is not None}


def _format(value: Any) -> Mapping[str, Any] | None:
    if value is None:
        return None
    place = "text.format"
    kind = mapping(value, place).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise wrong(f"{place}.type", "one of text, json_object, json_schema", kind)
    return response_format(
        value.get("name"),
        value.get("schema"),
        place=place,
        strict=value.get("strict"),
        description=value.get("description"),
    )
