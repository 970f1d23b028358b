"""Anthropic's Messages API, in the part that agents use.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from retrain.gateway.ask import Ask, Choice, Reply, RequestRefused
from retrain.gateway.wire import sse
from retrain.gateway.wire.anthropic_read import NO_THREADS, UNREADABLE, AnthropicAsk, read
from retrain.gateway.wire.calls import calls_of, words

__all__ = ["events", "read", "refusal", "refusal_event", "write"]

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def write(reply: Reply, ask: Ask) -> dict[str, Any]:
    """Reasoning is left out of the answer to a request that has not turned thinking on: its caller
    expects none."""
    choice = reply.choices[0]
    stop_reason = _stop_reason(choice)
    return {
        "id": f"msg_{reply.id}",
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": _content(choice, isinstance(ask, AnthropicAsk) and ask.thinking),
        "stop_reason": stop_reason,
        "stop_sequence": choice.stopped_by if stop_reason == "stop_sequence" else None,
        "usage": _usage(reply),
    }


def _stop_reason(choice: Choice) -> str:
    if choice.finish_reason == "stop" and choice.stopped_by is not None:
        return "stop_sequence"
    return _STOP_REASONS[choice.finish_reason]


def _content(choice: Choice, thinking: bool) -> list[dict[str, Any]]:
    said = choice.message
    blocks: list[dict[str, Any]] = []
    if thinking and said.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": said["reasoning_content"], "signature": ""})
    if words(said):
        blocks.append({"type": "text", "text": words(said)})
    for call_id, name, arguments in calls_of(said):
        given = _input(arguments)
        blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": given})
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """The object that the arguments stand for; where they are none, or what JSON or UTF-8 does not
    have (NaN, half of a surrogate pair), one that has their text."""
    try:
        value = json.loads(arguments) if arguments.strip() else {}
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {UNREADABLE: arguments}


def _usage(reply: Reply) -> dict[str, Any]:
    """`input_tokens` are those that were not read from the cache."""
    return {
        "input_tokens": reply.prompt_tokens - reply.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reply.cached_tokens,
        "output_tokens": reply.completion_tokens,
        "service_tier": "standard",
    }


def events(reply: Reply, ask: Ask) -> Iterator[bytes]:
    """From `message_start` to `message_stop`, each block in pieces."""
    message = write(reply, ask)
    usage = message["usage"]
    begun = {
        **message,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage, "output_tokens": 0},
    }
    yield _event("message_start", message=begun)
    yield _event("ping")
    for index, block in enumerate(message["content"]):
        yield from _block_events(index, block)
    stop = {key: message[key] for key in ("stop_reason", "stop_sequence")}
    counts = {key: value for key, value in usage.items() if key != "service_tier"}
    yield _event("message_delta", delta=stop, usage=counts)
    yield _event("message_stop")


def _block_events(index: int, block: Mapping[str, Any]) -> Iterator[bytes]:
    deltas: list[dict[str, Any]]
    match block["type"]:
        case "tool_use":
            empty: dict[str, Any] = {"input": {}}
            whole = json.dumps(block["input"], separators=(",", ":"))
            deltas = [
                {"type": "input_json_delta", "partial_json": p} for p in ["", *sse.pieces(whole)]
            ]
        case "thinking":
            empty = {"thinking": ""}
            said = sse.pieces(block["thinking"])
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in said]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        case _:
            empty = {"text": ""}
            deltas = [{"type": "text_delta", "text": piece} for piece in sse.pieces(block["text"])]
    yield _event("content_block_start", index=index, content_block={**block, **empty})
    for delta in deltas:
        yield _event("content_block_delta", index=index, delta=delta)
    yield _event("content_block_stop", index=index)


def _event(kind: str, **fields: Any) -> bytes:
    return sse.event(kind, {"type": kind, **fields})


def refusal(error: RequestRefused) -> dict[str, Any]:
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    body: dict[str, Any] = {"type": _ERRORS.get(error.status, default), "message": error.message}
    if error.code == NO_THREADS:
        body["details"] = {"error_code": error.code, "unsupported": []}
    return {"type": "error", "error": body, "request_id": None}


def refusal_event(error: RequestRefused) -> bytes:
    return sse.event("error", refusal(error))
