"""What a model was asked and what it replied, in the shapes of several APIs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrain.data.imports.base import CUT, Malformed
from retrain.data.imports.normalise import openai_messages, openai_tools, parsed

_WORDS = ("completion", "generated_text", "text", "response", "output")
_STATED = ("finish_reason", "stop_reason", "finishReason", "done_reason", "status")


@dataclass(frozen=True)
class Request:
    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] = ()
    model: str | None = None


@dataclass(frozen=True)
class Reply:
    """One or, where the log joins a tool loop, several messages."""

    messages: list[dict[str, Any]]
    cut: bool = False
    """A token budget ended it."""


def read_request(value: Any) -> Request:
    """Of the Chat Completions, Responses or Anthropic API; messages or a text alone will do.

    Raises:
        Malformed: it holds no messages.
    """
    value = _unwrapped(value)
    if not isinstance(value, Mapping):
        return Request(openai_messages(value))
    said = next((value[k] for k in ("messages", "input", "prompt") if value.get(k)), None)
    if said is None and ("role" in value or "content" in value):
        said = [value]
    if said is None:
        raise Malformed("the request has no messages")
    messages = openai_messages(parsed(said))
    for key in ("system", "instructions"):
        if value.get(key):
            content = value[key]
            messages = [*openai_messages([{"role": "system", "content": content}]), *messages]
    tools = openai_tools(value.get("tools") or value.get("functions"))
    model = value.get("model")
    return Request(messages, tools, model if isinstance(model, str) else None)


def read_replies(value: Any) -> list[Reply]:
    """The alternatives of a response; most have one.

    Raises:
        Malformed: there is none.
    """
    value = _unwrapped(value)
    if isinstance(value, Mapping) and isinstance(value.get("choices"), list | tuple):
        return [_choice(choice) for choice in value["choices"]]
    return [_reply(value)]


def _choice(choice: Any) -> Reply:
    if not isinstance(choice, Mapping):
        raise Malformed("a choice is not an object")
    message = choice.get("message", choice.get("text"))
    reply = _reply(message)
    return Reply(reply.messages, reply.cut or is_cut(choice))


def _reply(value: Any) -> Reply:
    if isinstance(value, str):
        return Reply([{"role": "assistant", "content": value}])
    if isinstance(value, list | tuple) and value:
        cut = any(isinstance(item, Mapping) and is_cut(item) for item in value)
        blocks = all(isinstance(i, Mapping) and "role" not in i and "type" in i for i in value)
        if blocks and not any(i["type"] in ("message", "function_call") for i in value):
            value = [{"role": "assistant", "content": list(value)}]
        return Reply(_only_replies(openai_messages(value)), cut)
    if not isinstance(value, Mapping):
        raise Malformed("there is no reply", "no_model_message")
    if isinstance(value.get("message"), Mapping):
        inner = _reply(value["message"])
        return Reply(inner.messages, inner.cut or is_cut(value))
    if "content" in value or "tool_calls" in value or "function_call" in value or "parts" in value:
        row = {"role": "assistant", **value}
        return Reply(_only_replies(openai_messages([row])), is_cut(value))
    for key in ("messages", *_WORDS):
        if value.get(key):
            inner = _reply(parsed(value[key]))
            return Reply(inner.messages, inner.cut or is_cut(value))
    raise Malformed("there is no reply", "no_model_message")


def _only_replies(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not any(message["role"] == "assistant" for message in messages):
        raise Malformed("the reply is not the assistant's", "no_model_message")
    return messages


def is_cut(value: Mapping[str, Any]) -> bool:
    """Whether its finish reason says that a token budget ended it."""
    stated = [value.get(key) for key in _STATED]
    return any(isinstance(reason, str) and reason.lower() in CUT for reason in stated)


def _unwrapped(value: Any) -> Any:
    """Without the envelope of a batch or a proxy."""
    value = parsed(value)
    while isinstance(value, Mapping) and value.get("body"):
        value = parsed(value["body"])
    return value
