"""Answers of OpenAI's Responses API, in one piece and as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retrain.gateway.ask import Ask, Choice, Reply, TokenLogprob, Wire
from retrain.gateway.wire import sse
from retrain.gateway.wire.calls import calls_of, words
from retrain.gateway.wire.responses_read import ResponsesAsk

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ECHOED: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""What an answer repeats of its request, as it is where the request does not say."""


def response_id(reply: Reply) -> str:
    return f"resp_{reply.id}"


def write(reply: Reply, ask: Ask) -> dict[str, Any]:
    body = ask.body if isinstance(ask, ResponsesAsk) else {}
    choice = reply.choices[0]
    reason = _INCOMPLETE.get(choice.finish_reason)
    echoed = {
        key: default if body.get(key) is None else body[key] for key, default in _ECHOED.items()
    }
    return {
        "id": response_id(reply),
        "object": "response",
        "created_at": reply.created,
        "completed_at": None if reason else reply.created,
        "status": "incomplete" if reason else "completed",
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "model": reply.model,
        "output": output_items(choice, reply.id),
        "usage": _usage(reply),
        **echoed,
    }


def output_items(choice: Choice, reply_id: str) -> list[dict[str, Any]]:
    """The reasoning, the message and the calls; an answer of nothing is an empty message."""
    said = choice.message
    status = "incomplete" if choice.finish_reason in _INCOMPLETE else "completed"
    calls = calls_of(said)
    items: list[dict[str, Any]] = []
    if said.get("reasoning_content"):
        items.append(_reasoning(said, reply_id))
    if words(said) or not calls:
        items.append(
            {
                "id": f"msg_{reply_id}",
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": [_output_text(words(said), choice.logprobs)],
            }
        )
    items.extend(
        {
            "id": f"fc_{reply_id}_{index}",
            "type": "function_call",
            "call_id": call_id,
            "name": name,
            "arguments": arguments,
            "status": "completed",
        }
        for index, (call_id, name, arguments) in enumerate(calls)
    )
    return items


def _reasoning(said: Wire, reply_id: str) -> dict[str, Any]:
    return {
        "id": f"rs_{reply_id}",
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": said["reasoning_content"]}],
        "encrypted_content": None,
        "status": "completed",
    }


def _output_text(text: str, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any]:
    logprobs = _logprobs(tokens or ())
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            "token": token.text,
            "bytes": list(token.bytes),
            "logprob": token.logprob,
            "top_logprobs": [],
        }
        for token in tokens
    ]


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": reply.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


Event = tuple[str, dict[str, Any]]
"""The type, and the fields but for `type` and `sequence_number`."""


def events(reply: Reply, ask: Ask) -> Iterator[bytes]:
    for number, (kind, fields) in enumerate(_sequence(write(reply, ask))):
        yield sse.event(kind, {"type": kind, "sequence_number": number, **fields})


def _sequence(response: Mapping[str, Any]) -> Iterator[Event]:
    begun = {
        **response,
        "status": "in_progress",
        "completed_at": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    for index, item in enumerate(response["output"]):
        at = {"output_index": index}
        yield "response.output_item.added", {**at, "item": _begun(item)}
        yield from _item(item, {**at, "item_id": item["id"]})
        yield "response.output_item.done", {**at, "item": item}
    yield f"response.{response['status']}", {"response": response}


def _begun(item: Mapping[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = (
        {"arguments": ""} if item["type"] == "function_call" else {"content": []}
    )
    return {**item, **empty, "status": "in_progress"}


def _item(item: Mapping[str, Any], at: Mapping[str, Any]) -> Iterator[Event]:
    if item["type"] == "function_call":
        done = "response.function_call_arguments"
        for piece in sse.pieces(item["arguments"]):
            yield f"{done}.delta", {**at, "delta": piece}
        yield f"{done}.done", {**at, "name": item["name"], "arguments": item["arguments"]}
        return
    part = item["content"][0]
    at = {**at, "content_index": 0}
    begun = {**part, "text": ""} | ({"logprobs": []} if "logprobs" in part else {})
    yield "response.content_part.added", {**at, "part": begun}
    yield from _text(part, at)
    yield "response.content_part.done", {**at, "part": part}


def _text(part: Mapping[str, Any], at: Mapping[str, Any]) -> Iterator[Event]:
    """The log-probabilities are shared out over the pieces, in order."""
    name = f"response.{part['type']}"
    pieces = sse.pieces(part["text"])
    logprobs = part.get("logprobs")
    for index, piece in enumerate(pieces):
        delta: dict[str, Any] = {**at, "delta": piece}
        if logprobs is not None:
            start, end = (len(logprobs) * k // len(pieces) for k in (index, index + 1))
            delta["logprobs"] = logprobs[start:end]
        yield f"{name}.delta", delta
    done: dict[str, Any] = {**at, "text": part["text"]}
    yield f"{name}.done", done | ({} if logprobs is None else {"logprobs": logprobs})
