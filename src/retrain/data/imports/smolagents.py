"""What smolagents keeps of an agent's run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retrain.data.imports.base import Entry, Fault, Malformed, number
from retrain.data.imports.normalise import as_text, openai_messages

TASK_PREFIX = "New task:\n"
"""What smolagents puts before the task."""

_STEP_KEYS = ("system_prompt", "task", "step_number", "plan", "final_answer", "output")


def looks_like_smolagents(value: Any) -> bool:
    """Steps of a memory, or an object that holds them."""
    steps = _steps_of(value)
    return steps is not None and any("step_number" in step or "plan" in step for step in steps)


def _steps_of(value: Any) -> Sequence[Mapping[str, Any]] | None:
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("steps", "memory", "full_steps") if k in value), None)
        if isinstance(value, Mapping):
            value = value.get("steps")
    if not isinstance(value, list) or not value:
        return None
    steps = all(isinstance(s, Mapping) and any(k in s for k in _STEP_KEYS) for s in value)
    return value if steps else None


class SmolagentsReader:
    """`agent.memory.get_full_steps()` or `get_succinct_steps()`, or an object that holds one of
    them as `steps` or `memory`, whose other keys are metadata.

    A ToolCallingAgent's calls are tool calls; a CodeAgent's code stays in its text. An observation
    is a tool's message. The system prompt is in the full steps only.
    """

    def __init__(self) -> None:
        self._entries: list[Entry | Fault] = []

    def feed(self, value: Any, place: str) -> None:
        steps = _steps_of(value)
        if steps is None:
            raise Malformed("no steps of a smolagents memory")
        about = value if isinstance(value, Mapping) else {}
        metadata = {
            k: v for k, v in about.items() if k not in ("steps", "memory", "full_steps", "output")
        }
        self._entries.append(
            Entry(
                group=place,
                place=place,
                messages=_messages(steps),
                reward=number(about.get("reward", about.get("score"))),
                metadata=metadata,
            )
        )

    def entries(self) -> Iterator[Entry | Fault]:
        yield from self._entries


def _messages(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = _system(steps)
    for step in steps:
        if "task" in step:
            rows.append({"role": "user", "content": TASK_PREFIX + str(step["task"])})
        elif "plan" in step:  # asked for with a prompt of its own
            rows.append({"role": "assistant", "content": str(step["plan"]), "weight": 0})
            rows.append({"role": "user", "content": "Now proceed and carry out this plan."})
        elif "step_number" in step:
            rows += _action(step)
    return rows


def _system(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    for step in steps:
        if isinstance(step.get("system_prompt"), str):
            return [{"role": "system", "content": step["system_prompt"]}]
        asked = step.get("model_input_messages")
        if asked and isinstance(asked[0], Mapping) and asked[0].get("role") == "system":
            return openai_messages([asked[0]])
    return []


def _action(step: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the model said, and what it read for it."""
    reply = _reply(step)
    if reply is not None:
        yield reply
    if step.get("error") or not step.get("is_final_answer"):
        yield from _observed(step, (reply or {}).get("tool_calls") or [])


def _reply(step: Mapping[str, Any]) -> dict[str, Any] | None:
    """None where the model was not heard: its call failed."""
    said = step.get("model_output_message")
    calls = [] if step.get("code_action") is not None else list(step.get("tool_calls") or ())
    if not isinstance(said, Mapping):
        if not (step.get("model_output") or calls):
            return None
        said = {"content": as_text(step.get("model_output"))}
    given = {**said, "role": "assistant"}
    if calls and not given.get("tool_calls"):
        given["tool_calls"] = calls
    [reply] = openai_messages([given])
    if reply.get("tool_calls"):
        reply["content"] = _without_call(reply["content"], reply["tool_calls"][0])
    return reply


def _without_call(text: str, call: Mapping[str, Any]) -> str:
    """A model without tool calls of its own writes `Action:` and JSON, which smolagents parses."""
    before, brace, rest = text.partition("{")
    if brace and json.dumps(call["function"]["name"]) in rest:
        return before.rstrip().removesuffix("Action:").rstrip()
    return text


def _observed(
    step: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    texts: list[str] = []
    if step.get("observations"):
        whole = str(step["observations"])
        lines = whole.split("\n")
        texts = lines if len(lines) == len(calls) else [whole]
    error = step.get("error")
    if error:
        texts.append(f"Error:\n{error.get('message') if isinstance(error, Mapping) else error}")
    for index, text in enumerate(texts):
        row = {"role": "tool", "content": text}
        if index < len(calls):
            row["tool_call_id"] = calls[index]["id"]
            row["name"] = calls[index]["function"]["name"]
        yield row
