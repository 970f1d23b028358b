"""OpenAI's chat completions.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from retrain.gateway.ask import (
    Ask,
    Choice,
    Reply,
    RequestRefused,
    TokenLogprob,
    ToolChoice,
)
from retrain.gateway.wire import sse
from retrain.gateway.wire.errors import openai_body
from retrain.gateway.wire.fields import boolean, integer, listing, mapping, number, text, wrong
from retrain.gateway.wire.messages import read_messages
from retrain.rendering import ToolSchema

MOST_STOPS = 4
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ELSEWHERE = {
    "functions": "send `tools`",
    "function_call": "send `tool_choice`",
    "audio": "this model writes text only",
    "web_search_options": "this model has the tools of the request only",
}
"""Keys that would change the answer, and what to do without them."""
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_READ = frozenset(
    "model messages tools tool_choice parallel_tool_calls n stop max_tokens max_completion_tokens "
    "logprobs stream modalities".split()
) | frozenset((*_ELSEWHERE, *_RANGES, "seed", "top_logprobs", "response_format"))
_DROPPED = frozenset(
    "metadata store user service_tier stream_options prompt_cache_key prompt_cache_retention "
    "safety_identifier".split()
)
"""Keys for the server alone."""
_OTHER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_OTHERS = 32
"""Keys that are none of these."""


@dataclass(frozen=True)
class ChatAsk(Ask):
    include_usage: bool = False
    """A stream ends with the counts of tokens."""


def read(body: Mapping[str, Any], headers: Mapping[str, str]) -> ChatAsk:
    """A request. Keys that say nothing of the answer are dropped: metadata, store, user. Those that
    are not known here go to `sampling` as they are; servers of open models have many.

    Raises:
        RequestRefused: see `Dialect.read`.
    """
    for key, instead in _ELSEWHERE.items():
        if body.get(key) is not None:
            raise RequestRefused(f"{key} is not supported: {instead}", param=key)
    model = text(body.get("model"), "model")
    if "messages" not in body:
        raise RequestRefused("messages is missing", param="messages")
    messages = read_messages(body["messages"])
    tools = read_tools(body.get("tools"))
    limit = integer(body, "max_tokens", 1)
    newer_limit = integer(body, "max_completion_tokens", 1)
    options = mapping(body.get("stream_options") or {}, "stream_options")
    return ChatAsk(
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(body.get("tool_choice"), tools),
        parallel_tool_calls=boolean(body, "parallel_tool_calls", True),
        n=integer(body, "n", 1, 128) or 1,
        stop=_stop(body.get("stop")),
        max_tokens=newer_limit if newer_limit is not None else limit,
        logprobs=boolean(body, "logprobs"),
        model=model,
        stream=boolean(body, "stream"),
        retried=is_retry(headers),
        sampling=_sampling(body),
        include_usage=boolean(options, "include_usage"),
    )


def is_retry(headers: Mapping[str, str]) -> bool:
    """OpenAI's and Anthropic's clients count their attempts, from 0."""
    return headers.get("x-stainless-retry-count", "0").strip() not in ("", "0")


def read_tools(value: Any) -> tuple[ToolSchema, ...]:
    """`{"type": "function", "function": {"name", "description", "parameters", ...}}` of each.

    Raises:
        RequestRefused: one that is no function or is malformed, or a name that comes twice.
    """
    tools: list[ToolSchema] = []
    names: set[str] = set()
    for index, tool in enumerate(listing(value or [], "tools")):
        place = f"tools[{index}]"
        kind = mapping(tool, place).get("type")
        if kind != "function":
            raise wrong(f"{place}.type", "'function'", kind)
        function = mapping(tool.get("function"), f"{place}.function")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            expected = "1 to 64 of letters, digits, _ and -"
            raise wrong(f"{place}.function.name", expected, name)
        if name in names:
            raise RequestRefused(f"{place} has the name {name!r} of another", param=place)
        names.add(name)
        _check_parameters(function.get("parameters"), f"{place}.function.parameters")
        tools.append({"type": "function", "function": dict(function)})
    return tuple(tools)


def _check_parameters(value: Any, place: str) -> None:
    if value is None:
        return
    schema = mapping(value, place)
    if schema.get("type", "object") != "object":
        raise wrong(f"{place}.type", "'object'", schema["type"])
    mapping(schema.get("properties") or {}, f"{place}.properties")


def _tool_choice(value: Any, tools: Sequence[ToolSchema]) -> ToolChoice:
    if value is None or value in ("auto", "none"):
        return value or "auto"
    if value == "required":
        if not tools:
            raise RequestRefused("tool_choice asks for a call, and tools is empty", param="tools")
        return "required"
    if not isinstance(value, Mapping) or value.get("type") != "function":
        expected = "auto, none, required, or an object of type function"
        raise wrong("tool_choice", expected, value)
    function = mapping(value.get("function"), "tool_choice.function")
    name = text(function.get("name"), "tool_choice.function.name")
    if name not in (tool["function"]["name"] for tool in tools):
        raise RequestRefused(
            f"tool_choice asks for {name!r}, which is not among tools",
            param="tool_choice.function.name",
        )
    return f"tool:{name}"


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else listing(value, "stop")
    if len(stops) > MOST_STOPS:
        raise wrong("stop", f"at most {MOST_STOPS} strings", value)
    return tuple(text(stop, f"stop[{index}]") for index, stop in enumerate(stops))


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    for name, (low, high) in _RANGES.items():
        sampling[name] = number(body, name, low, high)
    sampling["seed"] = integer(body, "seed", -(2**63), 2**63 - 1)
    sampling["top_logprobs"] = integer(body, "top_logprobs", 0, 20)
    if sampling["top_logprobs"] is not None and not boolean(body, "logprobs"):
        raise RequestRefused("top_logprobs needs logprobs: true", param="top_logprobs")
    sampling["response_format"] = _response_format(body.get("response_format"))
    others = [name for name in body if name not in _READ and name not in _DROPPED]
    if len(others) > MOST_OTHERS:
        raise RequestRefused(f"more than {MOST_OTHERS} keys are unknown", param=others[0][:64])
    for name in others:
        if not _OTHER.fullmatch(name):
            raise RequestRefused(f"the key {name[:64]!r} is unknown", param=name[:64])
        sampling[name] = body[name]
    modalities = listing(body.get("modalities") or ["text"], "modalities")
    if modalities != ["text"]:
        raise RequestRefused("this model writes text only", param="modalities")
    return {name: value for name, value in sampling.items() if value is not None}


def _response_format(value: Any) -> Mapping[str, Any] | None:
    if value is None:
        return None
    place = "response_format"
    kind = mapping(value, place).get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong(f"{place}.type", "one of text, json_object, json_schema", kind)
    if kind == "json_schema":
        schema = mapping(value.get("json_schema"), f"{place}.json_schema")
        text(schema.get("name"), f"{place}.json_schema.name")
        mapping(schema.get("schema") or {}, f"{place}.json_schema.schema")
    return dict(value)


def write(reply: Reply, ask: Ask) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [_choice(i, choice, ask.logprobs) for i, choice in enumerate(reply.choices)],
        "usage": usage(reply),
        "system_fingerprint": None,
    }


def _choice(index: int, choice: Choice, logprobs: bool) -> dict[str, Any]:
    said = choice.message
    message = {"role": "assistant", "content": said.get("content"), "refusal": said.get("refusal")}
    message |= {key: said[key] for key in ("reasoning_content", "tool_calls") if said.get(key)}
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs if logprobs else None),
        "finish_reason": choice.finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    content = [
        {
            "token": token.text,
            "bytes": list(token.bytes),
            "logprob": token.logprob,
            "top_logprobs": [],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def usage(reply: Reply) -> dict[str, Any]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"audio_tokens": 0},
    }


def events(reply: Reply, ask: Ask) -> Iterator[bytes]:
    """Chunks of all choices in turn: the role, reasoning, content and calls in pieces, the end."""
    counted = isinstance(ask, ChatAsk) and ask.include_usage
    head = {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion.chunk",
        "created": reply.created,
        "model": reply.model,
        "system_fingerprint": None,
    } | ({"usage": None} if counted else {})
    streams = [_chunks(i, choice, ask.logprobs) for i, choice in enumerate(reply.choices)]
    for chunks in zip_longest(*streams):
        for chunk in chunks:
            if chunk is not None:
                yield sse.data({**head, "choices": [chunk]})
    if counted:
        yield sse.data({**head, "choices": [], "usage": usage(reply)})
    yield b"data: [DONE]\n\n"


def _chunks(index: int, choice: Choice, logprobs: bool) -> Iterator[dict[str, Any]]:
    """The log-probabilities are shared out over the chunks with content, in order; where there is
    no content, the last chunk has them."""
    deltas = list(_deltas(choice.message))
    speaking = sum(1 for delta in deltas if delta.get("content"))
    tokens = choice.logprobs if logprobs else None
    sent = 0
    for delta in deltas:
        share = None
        if tokens is not None and delta.get("content"):
            start, end = (len(tokens) * k // speaking for k in (sent, sent + 1))
            share, sent = tokens[start:end], sent + 1
        yield _chunk(index, delta, share)
    yield _chunk(index, {}, None if speaking else tokens, choice.finish_reason)


def _chunk(
    index: int,
    delta: Mapping[str, Any],
    tokens: Sequence[TokenLogprob] | None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": _logprobs(tokens),
        "finish_reason": finish_reason,
    }


def _deltas(said: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    calls = said.get("tool_calls") or ()
    content = said.get("content")
    yield {"role": "assistant", "content": None if content is None else "", "refusal": None}
    for key in ("reasoning_content", "content", "refusal"):
        for piece in sse.pieces(said.get(key) or ""):
            yield {key: piece}
    for index, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        start = {"id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        yield {"tool_calls": [{"index": index, **start}]}
        for piece in sse.pieces(arguments):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def refusal(error: RequestRefused) -> dict[str, Any]:
    return openai_body(error)


def refusal_event(error: RequestRefused) -> bytes:
    return sse.data(openai_body(error)) + b"data: [DONE]\n\n"
