"""Requests of Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrain.gateway.ask import Ask, RequestRefused, ToolChoice, Wire
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

UNREADABLE = "__arguments__"
"""A call's `input` is an object. Arguments that are none are the value of this key in it."""

_ELSEWHERE = {
    "mcp_servers": "nothing here runs tools; send them with a name and an input_schema",
    "container": "nothing here runs code",
}
"""Keys that would change the answer, and what to do without them."""
NO_THREADS = "thread_unsupported_request"
"""Anthropic's code; its client then sends whole conversations."""
_SHOWING = ("enabled", "adaptive", "between_tools")


@dataclass(frozen=True)
class AnthropicAsk(Ask):
    thinking: bool = False
    """The answer may have blocks of thinking."""


def read(body: Mapping[str, Any], headers: Mapping[str, str]) -> AnthropicAsk:
    """A request. What says nothing of the answer is dropped: metadata, service_tier,
    cache_control wherever it stands, budgets of thinking, context_management.

    Raises:
        RequestRefused: see `Dialect.read`.
    """
    for key, instead in _ELSEWHERE.items():
        if body.get(key):
            raise RequestRefused(f"{key} is not supported: {instead}", param=key)
    if body.get("thread") is not None:
        raise RequestRefused(
            "thread is not supported: send the whole conversation", code=NO_THREADS, param="thread"
        )
    if body.get("max_tokens") is None:
        raise RequestRefused("max_tokens is missing", param="max_tokens")
    model = text(body.get("model"), "model")
    system = _joined(body.get("system") or "", "system")
    messages = read_messages(body.get("messages"))
    tools = _tools(body.get("tools"))
    choice = mapping(body.get("tool_choice") or {"type": "auto"}, "tool_choice")
    stops = listing(body.get("stop_sequences") or [], "stop_sequences")
    return AnthropicAsk(
        messages=(*([{"role": "system", "content": system}] if system else ()), *messages),
        tools=tools,
        tool_choice=_tool_choice(choice, tools),
        parallel_tool_calls=not boolean(choice, "disable_parallel_tool_use"),
        stop=tuple(text(stop, f"stop_sequences.{index}") for index, stop in enumerate(stops)),
        max_tokens=integer(body, "max_tokens", 1),
        model=model,
        stream=boolean(body, "stream"),
        retried=is_retry(headers),
        sampling=_sampling(body),
        thinking=_shows_thinking(body.get("thinking")),
    )


@dataclass
class _Conversation:
    """Chat messages, as they come to be."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: dict[str, None] = field(default_factory=dict)
    """Calls of the last assistant's message without a result."""

    def assistant(self, blocks: Sequence[Mapping[str, Any]], place: str) -> None:
        """Messages of the assistant that follow each other are one."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.check_waiting(place)
            self.messages.append({"role": "assistant", "content": ""})
        said = self.messages[-1]
        calls, thoughts = [], []
        for index, block in enumerate(blocks):
            where = f"{place}.content.{index}"
            match block.get("type"):
                case "text":
                    said["content"] = (said["content"] or "") + _block_text(block, where)
                case "tool_use":
                    calls.append(_tool_use(block, where))
                case "thinking" | "redacted_thinking" as kind:
                    thoughts.append(str(block.get("thinking") or "") if kind == "thinking" else "")
                case kind:
                    raise _unserved(kind, where, "text, tool_use, thinking and redacted_thinking")
        if any(thoughts):
            said["reasoning_content"] = said.get("reasoning_content", "") + "".join(thoughts)
        if calls:
            said["tool_calls"] = [*said.get("tool_calls", ()), *calls]
            self.waiting |= dict.fromkeys(each["id"] for each in calls)
        if said.get("tool_calls"):
            said["content"] = said["content"] or None

    def user(self, blocks: Sequence[Mapping[str, Any]], place: str) -> None:
        """Results of tools first, each a message; then what else the user says."""
        texts = []
        for index, block in enumerate(blocks):
            where = f"{place}.content.{index}"
            match block.get("type"):
                case "text":
                    texts.append(_block_text(block, where))
                case "tool_result":
                    self.messages.append(self._result(block, where))
                case kind:
                    raise _unserved(kind, where, "text and tool_result")
        if not blocks or (len(texts) == len(blocks) and not any(texts)):
            raise RequestRefused(f"{place}.content must not be empty", param=place)
        if any(texts):
            self.check_waiting(place)
            self.messages.append({"role": "user", "content": _BETWEEN.join(texts)})

    def check_waiting(self, place: str) -> None:
        """
        Raises:
            RequestRefused: a call has no result.
        """
        if self.waiting:
            raise RequestRefused(
                f"{place}: no tool_result for the tool_use {', '.join(self.waiting)}; each needs "
                "one in the very next message",
                param="messages",
            )

    def _result(self, block: Mapping[str, Any], where: str) -> dict[str, Any]:
        call_id = text(block.get("tool_use_id"), f"{where}.tool_use_id")
        if call_id not in self.waiting:
            raise RequestRefused(
                f"{where}: the tool_result is of {call_id!r}, and the message before has no such "
                "tool_use without a result",
                param="messages",
            )
        del self.waiting[call_id]
        result = _joined(block.get("content") or "", f"{where}.content")
        if boolean(block, "is_error") and "error" not in result.lower():
            result = f"Error: {result}"
        return {"role": "tool", "tool_call_id": call_id, "content": result}


def read_messages(value: Any) -> list[Wire]:
    """Messages in chat's shape. Blocks of text that the assistant said are joined as they are,
    others by an empty line. A result with `is_error` whose text has no "error" in it gets
    "Error: " before it.

    Raises:
        RequestRefused: they are malformed or out of order, or the last is the assistant's.
    """
    if value is None:
        raise RequestRefused("messages is missing", param="messages")
    if not listing(value, "messages"):
        raise RequestRefused("messages is empty", param="messages")
    conversation = _Conversation()
    role = None
    for index, message in enumerate(value):
        place = f"messages.{index}"
        role = mapping(message, place).get("role")
        blocks = _blocks(message.get("content"), f"{place}.content")
        if role == "system":
            told = _joined(message["content"], f"{place}.content")
            conversation.messages.append({"role": "system", "content": told})
        elif role == "user":
            conversation.user(blocks, place)
        elif role != "assistant":
            raise wrong(f"{place}.role", "one of user, assistant, system", role)
        elif not any(each["role"] == "user" for each in conversation.messages):
            raise RequestRefused(f"{place}: the first message must be a user's", param="messages")
        else:
            conversation.assistant(blocks, place)
    conversation.check_waiting("messages")
    if role == "assistant":
        raise RequestRefused(
            "the last message is the assistant's: its beginning cannot be given, since only what "
            "the model samples itself can train; end with a user's message",
            param="messages",
        )
    return list(conversation.messages)


_BETWEEN = "\n\n"
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _blocks(content: Any, place: str) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise wrong(place, "a string or a list of blocks", content)
    return [mapping(block, f"{place}.{index}") for index, block in enumerate(content)]


def _joined(content: Any, place: str) -> str:
    texts = []
    for index, block in enumerate(_blocks(content, place)):
        where = f"{place}.{index}"
        if block.get("type") != "text":
            raise _unserved(block.get("type"), where, "text")
        texts.append(_block_text(block, where))
    return _BETWEEN.join(texts)


def _block_text(block: Mapping[str, Any], where: str) -> str:
    value = block.get("text")
    if not isinstance(value, str):
        raise wrong(f"{where}.text", "a string", value)
    return value


def _unserved(kind: Any, where: str, served: str) -> RequestRefused:
    return RequestRefused(
        f"{where} has the type {kind!r}; this model reads {served} here",
        code="unsupported_value",
        param=f"{where}.type",
    )


def _tool_use(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = mapping(block.get("input"), f"{where}.input")
    unreadable = given.get(UNREADABLE) if len(given) == 1 else None
    arguments = unreadable if isinstance(unreadable, str) else _compact(given)
    return call(
        text(block.get("id"), f"{where}.id"), text(block.get("name"), f"{where}.name"), arguments
    )


def _tools(value: Any) -> tuple[ToolSchema, ...]:
    tools = []
    for index, tool in enumerate(listing(value or [], "tools")):
        place = f"tools.{index}"
        kind = mapping(tool, place).get("type")
        if kind not in (None, "custom"):
            raise RequestRefused(
                f"{place} has the type {kind!r}, which is one of Anthropic's own; send a tool with "
                "a name, a description and an input_schema",
                code="unsupported_value",
                param=f"{place}.type",
            )
        schema = mapping(tool.get("input_schema"), f"{place}.input_schema")
        name, description = tool.get("name"), tool.get("description")
        tools.append(
            function_tool(name, description, schema, place=place, schema_key="input_schema")
        )
    check_names(tools)
    return tuple(tools)


def _tool_choice(choice: Mapping[str, Any], tools: Sequence[ToolSchema]) -> ToolChoice:
    match choice.get("type"):
        case "auto" | "none" as kind:
            return str(kind)
        case "any":
            return required(tools)
        case "tool":
            return named(choice.get("name"), tools)
        case kind:
            raise wrong("tool_choice.type", "one of auto, any, tool, none", kind)


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    output = mapping(body.get("output_config") or {}, "output_config")
    place = "output_config.format" if output.get("format") else "output_format"
    form = mapping(output.get("format") or body.get("output_format") or {}, place)
    if form and form.get("type") != "json_schema":
        raise wrong(f"{place}.type", "'json_schema'", form.get("type"))
    sampling = {
        "temperature": number(body, "temperature", 0.0, 1.0),
        "top_p": number(body, "top_p", 0.0, 1.0),
        "top_k": integer(body, "top_k", 0),
        "reasoning_effort": output.get("effort"),
        "response_format": response_format("answer", form.get("schema"), place=place)
        if form
        else None,
    }
    return {name: value for name, value in sampling.items() if value is not None}


def _shows_thinking(value: Any) -> bool:
    thinking = mapping(value or {}, "thinking")
    return thinking.get("type") in _SHOWING and thinking.get("display") != "omitted"
