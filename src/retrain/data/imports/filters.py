"""Which conversations of a log are kept, and how they read to the student."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from retrain.data.imports.base import Fault, Logged, chain
from retrain.data.imports.normalise import as_text
from retrain.data.imports.report import Report
from retrain.data.imports.smolagents import TASK_PREFIX
from retrain.data.tasks import fingerprint
from retrain.types import Message, MessageType

FINAL_TOOL = "final_answer"
"""How a smolagents agent answers."""


def opening(logged: Logged) -> tuple[Message, ...]:
    """What stands before the first message that trains."""
    messages = logged.trace.messages
    first = next(i for i, m in enumerate(messages) if m.type is MessageType.MODEL)
    return messages[:first]


def prompt_of(logged: Logged) -> str:
    """Equal where the model was asked the same, whatever its system message."""
    keys = chain(tuple(m for m in opening(logged) if m.type is not MessageType.SYSTEM))
    return keys[-1] if keys else ""


def questions(logged: Logged) -> tuple[str, ...]:
    """What it may have been asked, stripped: the first user message, or, where examples stand
    before it, the last one that the model had not answered."""
    asked = [
        message.content.strip().removeprefix(TASK_PREFIX).strip()
        for message in opening(logged)
        if message.type is MessageType.MESSAGE and message.role != "assistant"
    ]
    return tuple(dict.fromkeys([*asked[:1], *asked[-1:]]))


def sound(
    found: Iterable[Logged | Fault],
    report: Report,
    *,
    tools: frozenset[str] | None,
    system_prompt: str | None = None,
    min_reward: float | None = None,
) -> list[Logged]:
    """Those that can be read, end by themselves, call only tools that there are, and have the
    reward wanted; each once.

    Args:
        tools: names of the student's; None: not known.
        system_prompt: stands in place of every system message; "" leaves them out.
    """
    kept: list[Logged] = []
    seen: set[str] = set()
    for item in found:
        report.read += 1
        if isinstance(item, Fault):
            report.drop(item.kind, item.place, item.detail)
            continue
        report.calls += item.calls
        place = item.trace.place
        logged = _answered(item) if tools is not None and FINAL_TOOL not in tools else item
        if system_prompt is not None:
            logged = _with_system(logged, system_prompt)
        if logged.truncated:
            report.drop("truncated", place)
        elif tools and (unknown := _calls(logged) - tools):
            report.drop("unknown_tool", place, ", ".join(sorted(unknown)))
        elif min_reward is not None and (logged.reward is None or logged.reward < min_reward):
            given = "no reward" if logged.reward is None else f"reward {logged.reward:g}"
            report.drop("min_reward", place, given)
        elif (key := _identity(logged)) in seen:
            report.drop("duplicate", place)
        else:
            seen.add(key)
            kept.append(logged)
    return kept


def best_of_each(kept: Sequence[Logged], report: Report, *, per_prompt: int) -> list[Logged]:
    """At most so many of each prompt: the highest rewards, then the first. The order stays."""
    prompts = [prompt_of(logged) for logged in kept]
    order = sorted(range(len(kept)), key=lambda i: -_reward(kept[i]))
    taken: Counter[str] = Counter()
    chosen: set[int] = set()
    for index in order:
        if taken[prompts[index]] < per_prompt:
            taken[prompts[index]] += 1
            chosen.add(index)
    for index, logged in enumerate(kept):
        if index not in chosen:
            report.drop("per_prompt", logged.trace.place)
    return [logged for index, logged in enumerate(kept) if index in chosen]


def each_turn_once(kept: Sequence[Logged]) -> list[Logged]:
    """Conversations that forked share their first turns, which train in the first of them only."""
    trained: set[tuple[str, str]] = set()
    result = []
    for logged in kept:
        messages = list(logged.trace.messages)
        for index, message in enumerate(messages):
            key = logged.group, logged.keys[index]
            if message.type is not MessageType.MODEL:
                continue
            if key in trained:
                messages[index] = replace(message, type=MessageType.MESSAGE, role="assistant")
            trained.add(key)
        result.append(_edited(logged, messages, logged.keys))
    return result


def _reward(logged: Logged) -> float:
    return float("-inf") if logged.reward is None else logged.reward


def _calls(logged: Logged) -> set[str]:
    """Names of the tools that messages to train call."""
    own = (m for m in logged.trace.messages if m.type is MessageType.MODEL)
    return {call.name for message in own for call in message.tool_calls}


def _identity(logged: Logged) -> str:
    tools = json.dumps([dict(tool) for tool in logged.trace.tools], sort_keys=True, default=str)
    reasoning = [m.reasoning for m in logged.trace.messages if m.type is MessageType.MODEL]
    return f"{chain(logged.trace.messages)[-1]} {reasoning} {tools}"


def _edited(logged: Logged, messages: Sequence[Message], keys: tuple[str, ...]) -> Logged:
    if tuple(messages) == logged.trace.messages:
        return logged
    said = tuple(messages)
    trace = replace(logged.trace, id=fingerprint(said), messages=said)
    return replace(logged, trace=trace, keys=keys)


def _answered(logged: Logged) -> Logged:
    """The last message's call of `final_answer` as the answer that it gives."""
    messages = list(logged.trace.messages)
    while messages and messages[-1].type is MessageType.TOOL and len(messages) > 1:
        messages.pop()  # what the call of it returned
    last = messages[-1]
    if [call.name for call in last.tool_calls] != [FINAL_TOOL]:
        return logged
    [call] = last.tool_calls
    answer = as_text(call.arguments.get("answer", dict(call.arguments)))
    messages[-1] = replace(last, content=answer, tool_calls=())
    return _edited(logged, messages, logged.keys[: len(messages)])


def _with_system(logged: Logged, system_prompt: str) -> Logged:
    pairs = zip(logged.trace.messages, logged.keys, strict=True)
    rest = [(m, key) for m, key in pairs if m.type is not MessageType.SYSTEM]
    if system_prompt:
        rest.insert(0, (Message(system_prompt, MessageType.SYSTEM), "system"))
    return _edited(logged, [m for m, _ in rest], tuple(key for _, key in rest))
