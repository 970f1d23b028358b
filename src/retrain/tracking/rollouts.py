"""Rollouts as JSON lines, tokens included: an exact round trip that stays cheap.

Long columns are base64 of little-endian arrays (token_ids and versions int32, source uint8,
logprobs float32). Fields that hold None or nothing are left out. Numbers that JSON cannot hold
are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import math
import sys
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.types import (
    Failure,
    Message,
    MessageType,
    RewardPart,
    Rollout,
    Segment,
    Span,
    Task,
    ToolCall,
    UserError,
)

_LONGEST_INT_BITS = 4096


def encode_rollout(rollout: Rollout, advantage: float | None = None) -> str:
    """One line of a rollout file, newline included.

    Values of the user's that JSON has no form for (in `answer`, `metadata` and tool arguments)
    are written as text.
    """
    record = rollout_to_dict(rollout)
    if advantage is not None:
        record["advantage"] = _number(advantage)
    try:
        text = json.dumps(record, allow_nan=False, default=str)
    except (TypeError, ValueError):
        text = json.dumps(_plain(record), allow_nan=False)
    return text + "\n"


def rollout_to_dict(rollout: Rollout) -> dict[str, Any]:
    """Everything that a rollout holds except `Message.turn`, which the segments hold."""
    episode = {} if rollout.episode is None else {"episode": rollout.episode}
    return {
        "id": rollout.id,
        "group_id": rollout.group_id,
        "agent": rollout.agent,
        "trainable": rollout.trainable,
        **episode,
        "task": None if rollout.task is None else _task_to_dict(rollout.task),
        "messages": [_message_to_dict(message) for message in rollout.messages],
        "segments": [_segment_to_dict(segment) for segment in rollout.segments],
        "env_rewards": _numbers(rollout.env_rewards),
        "step_rewards": _numbers(rollout.step_rewards),
        "reward": _number(rollout.reward),
        "reward_parts": [_part_to_dict(part) for part in rollout.reward_parts],
        "stop_reason": rollout.stop_reason,
        "error": rollout.error,
        "metrics": {name: _number(value) for name, value in rollout.metrics.items()},
        "failures": [(f.kind, f.attempt, f.cause) for f in rollout.failures],
    }


def rollout_from_dict(record: Mapping[str, Any]) -> Rollout:
    """The inverse of `rollout_to_dict`.

    Raises:
        KeyError, TypeError, ValueError: the record is not one that `rollout_to_dict` made.
    """
    task = record["task"]
    return Rollout(
        id=record["id"],
        group_id=record["group_id"],
        agent=record["agent"],
        trainable=record["trainable"],
        episode=record.get("episode"),
        task=None if task is None else _task_from_dict(task),
        messages=[_message_from_dict(message) for message in record["messages"]],
        segments=[_segment_from_dict(segment) for segment in record["segments"]],
        env_rewards=[float(value) for value in record["env_rewards"]],
        step_rewards=[float(value) for value in record["step_rewards"]],
        reward=float(record["reward"]),
        reward_parts=[_part_from_dict(part) for part in record["reward_parts"]],
        stop_reason=record["stop_reason"],
        error=record["error"],
        metrics={name: float(value) for name, value in record["metrics"].items()},
        failures=[Failure(*failure) for failure in record.get("failures", ())],
    )


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a rollout file as dictionaries, `advantage` included.

    Raises:
        UserError: the file cannot be read, or is not one.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            for line in lines:
                yield json.loads(line)
                number += 1
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from error


def read_rollouts(path: str | Path) -> Iterator[Rollout]:
    """The rollouts of a file that `RunDirectory.write_rollouts` wrote.

    Raises:
        UserError: the file cannot be read, or is not one.
    """
    for number, record in enumerate(read_records(path), start=1):
        try:
            rollout = rollout_from_dict(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}:{number} is not a rollout: {error!r}") from error
        yield rollout


def _message_to_dict(message: Message) -> dict[str, Any]:
    record: dict[str, Any] = {"type": message.type.value, "content": message.content}
    for key in ("role", "name", "reasoning", "tool_call_id"):
        value = getattr(message, key)
        if value is not None:
            record[key] = value
    if message.tool_calls:
        record["tool_calls"] = [_call_to_dict(call) for call in message.tool_calls]
    return record


def _message_from_dict(record: Mapping[str, Any]) -> Message:
    return Message(
        content=record["content"],
        type=MessageType(record["type"]),
        role=record.get("role"),
        name=record.get("name"),
        reasoning=record.get("reasoning"),
        tool_calls=tuple(_call_from_dict(call) for call in record.get("tool_calls", ())),
        tool_call_id=record.get("tool_call_id"),
    )


def _call_to_dict(call: ToolCall) -> dict[str, Any]:
    record: dict[str, Any] = {"name": call.name, "arguments": dict(call.arguments)}
    if call.id:
        record["id"] = call.id
    if call.error is not None:
        record["error"] = call.error
    return record


def _call_from_dict(record: Mapping[str, Any]) -> ToolCall:
    return ToolCall(record["name"], record["arguments"], record.get("id", ""), record.get("error"))


def _segment_to_dict(segment: Segment) -> dict[str, Any]:
    return {
        "parent": segment.parent,
        "prefix_len": segment.prefix_len,
        "token_ids": _pack(segment.token_ids),
        "source": _pack(segment.source),
        "logprobs": _pack(segment.logprobs),
        "versions": _pack(segment.versions),
        "turns": [(t.message, t.start, t.end, t.finish_reason) for t in segment.turns],
    }


def _segment_from_dict(record: Mapping[str, Any]) -> Segment:
    return Segment(
        parent=record["parent"],
        prefix_len=record["prefix_len"],
        token_ids=_unpack(array("i"), record["token_ids"]),
        source=_unpack(array("B"), record["source"]),
        logprobs=_unpack(array("f"), record["logprobs"]),
        versions=_unpack(array("i"), record["versions"]),
        turns=[Span(*turn) for turn in record["turns"]],
    )


def _part_to_dict(part: RewardPart) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": part.name,
        "kind": part.kind,
        "turn": part.turn,
        "raw": _number(part.raw),
        "weight": _number(part.weight),
        "value": _number(part.value),
    }
    if part.verifier is not None:
        record["verifier"] = part.verifier
    if part.error is not None:
        record["error"] = part.error
    return record


def _part_from_dict(record: Mapping[str, Any]) -> RewardPart:
    return RewardPart(
        name=record["name"],
        kind=record["kind"],
        turn=record["turn"],
        raw=float(record["raw"]),
        weight=float(record["weight"]),
        value=float(record["value"]),
        verifier=record.get("verifier"),
        error=record.get("error"),
    )


def _task_to_dict(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "prompt": [_message_to_dict(message) for message in task.prompt],
        "answer": task.answer,
        "metadata": task.metadata,
    }


def _task_from_dict(record: Mapping[str, Any]) -> Task:
    return Task(
        id=record["id"],
        prompt=tuple(_message_from_dict(message) for message in record["prompt"]),
        answer=record["answer"],
        metadata=record["metadata"],
    )


def _pack(column: array[Any]) -> str:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return binascii.b2a_base64(column, newline=False).decode("ascii")


def _unpack(column: array[Any], text: str) -> array[Any]:
    column.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        column.byteswap()
    return column


def _number(value: float) -> float | str:
    """A float as JSON can hold it; `float` reads both forms."""
    return float(value) if math.isfinite(value) else str(float(value))


def _numbers(values: Sequence[float]) -> list[float | str]:
    return [_number(value) for value in values]


def _plain(value: Any) -> Any:
    """A value with everything that JSON has no form for turned into text."""
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _LONGEST_INT_BITS else hex(value)
    if isinstance(value, float):
        return _number(value)
    return str(value)
