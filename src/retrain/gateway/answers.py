"""A sampled message as an answer in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from retrain.gateway.ask import Ask, Choice, Finish, Reply, TokenLogprob
from retrain.rendering import Renderer
from retrain.types import Message, ToolCall, Turn

_THINK, _THOUGHT = "<think>", "</think>"


def usable_calls(message: Message, ask: Ask) -> tuple[ToolCall, ...]:
    """The calls that the caller is told of: none where it wants none, one where it wants no
    parallel ones. A call whose text names no tool stays text."""
    if ask.tool_choice == "none" or not ask.tools or not all(c.name for c in message.tool_calls):
        return ()
    return message.tool_calls if ask.parallel_tool_calls else message.tool_calls[:1]


def reply_of(
    message: Message, calls: Mapping[str, ToolCall], ask: Ask, renderer: Renderer
) -> Reply:
    """The answer that a turn is.

    A call that cannot be read has what is wrong with it in the place of its arguments: whoever
    parses them says so. Reasoning stands apart, before `</think>`; a stop string of the request is
    cut off, with what follows it.

    Args:
        calls: by the ids that the caller is told.
    """
    turn = message.turn
    assert turn is not None
    text, stopped_by = _cut(message.content, ask.stop if turn.finish_reason != "length" else ())
    reasoning, closed, words = text.partition(_THOUGHT)
    said = words.lstrip() if closed else text
    form = renderer.tool_format
    if calls and form is not None:
        said = said.partition(form.opening)[0].rstrip() if form.opening else ""
    wire: dict[str, Any] = {"role": "assistant", "content": said}
    if closed:
        wire["reasoning_content"] = reasoning.strip().removeprefix(_THINK).strip()
    if calls:
        wire["content"] = said or None
        wire["tool_calls"] = [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for call_id, call in calls.items()
        ]
    finish: Finish = "tool_calls" if calls else "stop"
    if turn.finish_reason in ("length", "context"):
        finish = "length"
    logprobs = _logprobs(turn, renderer, len(text)) if ask.logprobs else None
    return Reply(
        (Choice(wire, finish, stopped_by, logprobs),),
        model=ask.model or "policy",
        prompt_tokens=turn.prompt.prefix_len + len(turn.prompt.token_ids),
        completion_tokens=len(turn.token_ids),
    )


def not_followed(ask: Ask, called: bool, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings of the request that the policy did not follow."""
    other = [
        name
        for name, value in ask.sampling.items()
        if value is not None and name != "response_format" and settings.get(name) != value
    ]
    if not called and ask.tool_choice not in ("auto", "none"):
        other.append("tool_choice")
    return tuple(other)


def _arguments(call: ToolCall) -> str:
    if call.error is not None:
        return call.error
    text = json.dumps(dict(call.arguments), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
        return json.dumps(dict(call.arguments))
    return text


def _cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    at, stop = min(found)
    return text[:at], stop


def _logprobs(turn: Turn, renderer: Renderer, length: int) -> tuple[TokenLogprob, ...]:
    """Of the tokens that make the first `length` characters."""
    codec = renderer.codec
    own = turn.token_ids
    if own and own[-1] in codec.stop_token_ids:
        own = own[:-1]
    found, written = [], 0
    for token, logprob in zip(own, turn.logprobs, strict=False):
        if written >= length:
            break
        text = codec.decode([token])
        written += len(text)
        found.append(TokenLogprob(text, tuple(text.encode()), logprob))
    return tuple(found)
