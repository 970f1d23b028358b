"""What a tracker is, and what it is told."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from retrain.types import MessageType, Rollout

Status = Literal["completed", "interrupted", "failed"]
"""How a run ended, as run.json has it; a run whose process died was interrupted."""


@dataclass(frozen=True)
class RunInfo:
    """The run that a tracker is started for."""

    name: str
    """Of the run directory."""
    directory: Path
    """The run directory."""
    config: dict[str, Any]
    """Of the whole run, as JSON has it."""
    rewound_to: int | None = None
    """Of a resumed run: the global step that it goes on after. What was logged of later ones is
    logged again. -1: it begins again from the start, step 0 included."""


@dataclass(frozen=True)
class RolloutRow:
    """A rollout as a row of a table, or as a trace."""

    id: str
    group: str | None
    task: str | None
    prompt: str
    """What was said before the model's first message."""
    completion: str
    """All that was said from then on; what the model did not say is marked with who did."""
    messages: tuple[dict[str, str], ...]
    """`role` and `content` of each, as chat APIs have them."""
    reward: float | None
    """None where infrastructure failed: the rollout was not scored."""
    advantage: float | None
    """None where it did not train."""
    reward_parts: dict[str, float]
    """What each entry of the reward added, by name."""
    stop_reason: str | None

    @classmethod
    def of(cls, rollout: Rollout, advantage: float | None = None) -> RolloutRow:
        first = next(iter(rollout.model_messages), len(rollout.messages))
        parts: dict[str, float] = {}
        for part in rollout.reward_parts:
            parts[part.name] = parts.get(part.name, 0.0) + part.value
        return cls(
            id=rollout.id,
            group=rollout.group_id,
            task=None if rollout.task is None else rollout.task.id,
            prompt="\n".join(m.content for m in rollout.messages[:first]),
            completion="\n".join(
                m.content if m.type is MessageType.MODEL else f"[{m.type.value}] {m.content}"
                for m in rollout.messages[first:]
            ),
            messages=tuple(
                {"role": _CHAT_ROLES[m.type], "content": m.content} for m in rollout.messages
            ),
            reward=None if rollout.error is not None else rollout.reward,
            advantage=advantage,
            reward_parts=parts,
            stop_reason=rollout.stop_reason,
        )

    def cells(self) -> list[str | float | None]:
        """In the order of COLUMNS; the parts of the reward as JSON."""
        return [
            self.id,
            self.group,
            self.task,
            self.prompt,
            self.completion,
            self.reward,
            self.advantage,
            json.dumps(self.reward_parts),
            self.stop_reason,
        ]


COLUMNS = (
    "id",
    "group",
    "task",
    "prompt",
    "completion",
    "reward",
    "advantage",
    "reward_parts",
    "stop_reason",
)

_CHAT_ROLES = {
    MessageType.SYSTEM: "system",
    MessageType.MESSAGE: "user",
    MessageType.MODEL: "assistant",
    MessageType.TOOL: "tool",
}


class Tracker(Protocol):
    """A place that a run's numbers are sent to.

    It is made and called in a process of its own, one call at a time. Whatever it raises is
    counted and reported there, and never reaches the run. Its constructor takes plain values;
    nothing is to be opened before `start`.
    """

    def start(self, run: RunInfo) -> str:
        """Begin, or go on with, the run; returns where a user can look at it."""
        ...

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics, all finite, at a global step: training steps of the whole run, which never goes
        back but when a run is resumed. A step may come more than once, with other metrics."""
        ...

    def log_rollouts(self, name: str, step: int, rows: Sequence[RolloutRow]) -> None:
        """Rollouts of a stage, or of a mode of an evaluation, which `name` names."""
        ...

    def log_artifact(self, name: str, path: Path) -> None:
        """A file, or a directory with all that is in it."""
        ...

    def finish(self, status: Status) -> None:
        """Send what is left, and close."""
        ...


GRACE_S = 5.0
"""For `finish`, once a tracker has had its time and the call that it was in was broken off."""

METHODS = ("start", "log_metrics", "log_rollouts", "log_artifact", "finish")


@dataclass(frozen=True)
class Spec:
    """The first that the process of a tracker is told: which tracker, for which run."""

    path: str
    """`pkg.module:Class`."""
    params: dict[str, Any]
    run: RunInfo
    run_pid: int
    """Of the run's process."""
    finish_timeout_s: float


@dataclass(frozen=True)
class Call:
    """Of a method of the tracker."""

    method: str
    arguments: tuple[Any, ...]


class Kept:
    """What a tracker has to know of the run again when it is resumed: a small JSON file of the run
    directory, trackers/<name>.json."""

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / "trackers" / f"{name}.json"

    def read(self) -> dict[str, Any]:
        """What was written last; nothing where that cannot be read."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def write(self, **facts: Any) -> None:
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        os.replace(partial, self._path)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as JSON) of every leaf of a config."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
