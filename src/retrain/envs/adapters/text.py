"""What a model says as an action, and an observation as what a model reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from retrain.types import Message, MessageType, Rollout, Task, UserError


class InvalidAction(Exception):
    """The model's words are no action; the message is shown to it."""


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """
    Raises:
        UserError: it is not a regular expression, or has no group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"environment.action_pattern {pattern!r} is not a regular expression: {error}",
            "Correct it.",
        ) from error
    if compiled.groups < 1:
        raise UserError(
            f"environment.action_pattern {pattern!r} has no group",
            "Put the action in parentheses, as in <action>(.*?)</action>.",
        )
    return compiled


def action_text(said: str, pattern: re.Pattern[str] | None) -> str:
    """The first group of the pattern's last match; without a pattern, the last line that is not
    empty. White space around it is left out.

    Raises:
        InvalidAction: there is none.
    """
    if pattern is None:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        if not lines:
            raise InvalidAction("the answer is empty")
        return lines[-1]
    found = [match.group(1) for match in pattern.finditer(said)]
    if not found or found[-1] is None:
        raise InvalidAction(f"the answer has nothing that matches {pattern.pattern}")
    return found[-1].strip()


def refused(rollout: Rollout, error: InvalidAction) -> Message:
    """What the model reads after an invalid action; the rollout's metrics count it."""
    rollout.metrics["invalid_actions"] = rollout.metrics.get("invalid_actions", 0.0) + 1.0
    return Message(f"Invalid action: {error}.", MessageType.MESSAGE)


def observation_text(observation: Any, field: str | None) -> str:
    """A text as it is; of a mapping or record, one field, by default `text` where there is one;
    anything else as JSON.

    Raises:
        UserError: there is no such field.
    """
    value = fields_of(observation)
    if isinstance(value, Mapping):
        if field is not None and field not in value:
            raise UserError(
                f"environment.observation_field: the observation has no {field!r}",
                f"Fields: {', '.join(map(str, value)) or 'none'}.",
            )
        value = value[field] if field is not None else value.get("text", value)
    return value if isinstance(value, str) else json.dumps(value, default=_plain)


def fields_of(value: Any) -> Any:
    """A record (a dataclass, a pydantic model) as a mapping; anything else as it is."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _plain(value: Any) -> Any:
    """NumPy's arrays and scalars, and records, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    shown = fields_of(value)
    return str(value) if shown is value else shown


def opened(prompt: Sequence[Message], observation: str) -> list[Message]:
    """A prompt with the first observation: after the user's words, since many chat templates
    refuse two user messages in a row."""
    if not observation:
        return list(prompt)
    last = prompt[-1] if prompt else None
    if last is not None and last.type is MessageType.MESSAGE and last.role in (None, "user"):
        return [*prompt[:-1], replace(last, content=f"{last.content}\n\n{observation}")]
    return [*prompt, Message(observation, MessageType.MESSAGE)]


def answered(observation: str) -> list[Message]:
    return [Message(observation, MessageType.MESSAGE)] if observation else []


def seed_of(task: Task) -> int:
    """The task's column `seed`, else 31 bits of its id: the members of a group begin alike.

    Raises:
        UserError: the column does not hold a whole number from 0.
    """
    seed = task.metadata.get("seed")
    if seed is None:
        digest = hashlib.blake2b(task.id.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") >> 1
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(
            f"task {task.id}: column 'seed' is {seed!r}, not a whole number from 0",
            "Correct it, or leave it out: the seed then follows from the task's id.",
        )
    return seed


def options_of(task: Task) -> dict[str, Any]:
    """The task's column `options`, for the environment's reset.

    Raises:
        UserError: it is not a mapping.
    """
    options = task.metadata.get("options")
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise UserError(
            f"task {task.id}: column 'options' is {options!r}, not a mapping",
            "Correct it, or leave it out.",
        )
    return dict(options)
