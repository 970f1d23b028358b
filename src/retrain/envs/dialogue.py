"""Dialogue with a simulated user: scripted, or played by a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from retrain.envs.base import Environment, Step
from retrain.types import Message, MessageType, Rollout, Task, UserError


class SimulatedUser(Protocol):
    async def reply(self, task: Task, rollout: Rollout) -> str | None:
        """The user's next words; None when the user has no more to say."""
        ...

    async def finish(self, rollout: Rollout) -> None:
        """Release what this rollout's user holds."""
        ...

    async def close(self) -> None: ...


class ScriptedUser:
    """Says the lines of a script, one a turn: the same for all, or each task's own.

    Args:
        replies: the script for every task.
        column: the metadata column that holds a task's own list instead.
    """

    def __init__(self, replies: Sequence[str] = (), column: str | None = None) -> None:
        self._replies = tuple(replies)
        self._column = column

    async def reply(self, task: Task, rollout: Rollout) -> str | None:
        said = len(rollout.model_messages) - 1
        script = self.script(task)
        return script[said] if said < len(script) else None

    def script(self, task: Task) -> Sequence[str]:
        """What this user will say.

        Raises:
            UserError: the task's column does not hold a list of strings.
        """
        if self._column is None:
            return self._replies
        script = task.metadata.get(self._column)
        if not isinstance(script, list) or not all(isinstance(line, str) for line in script):
            raise UserError(
                f"task {task.id}: column {self._column!r} must hold a list of replies, "
                f"got {script!r}",
                f"Columns of this task: {', '.join(sorted(task.metadata)) or 'none'}.",
            )
        return script

    async def finish(self, rollout: Rollout) -> None:
        return None

    async def close(self) -> None:
        return None


class DialogueEnvironment(Environment):
    """Turns between the policy and a simulated user.

    It stops when the user has no more to say, when a reply contains `stop_phrase` (that reply is
    kept), or after `max_turns` MODEL turns.
    """

    def __init__(
        self, user: SimulatedUser, *, max_turns: int = 10, stop_phrase: str | None = None
    ) -> None:
        self.user = user
        self.max_steps = max_turns
        self.stop_phrase = stop_phrase
        self._task: Task | None = None

    def opening(self, task: Task) -> Sequence[Message]:
        if isinstance(self.user, ScriptedUser):
            self.user.script(task)
        return task.prompt

    async def reset(self, task: Task) -> Sequence[Message]:
        self._task = task
        return self.opening(task)

    async def step(self, rollout: Rollout, message: Message) -> Step:
        assert self._task is not None
        if len(rollout.model_messages) >= self.max_steps:
            return Step(stop="max_steps")
        reply = await self.user.reply(self._task, rollout)
        if reply is None:
            return Step(stop="user_done")
        said = self.stop_phrase is not None and self.stop_phrase in reply
        return Step([Message(reply, MessageType.MESSAGE)], stop="user_done" if said else None)

    async def finish(self, rollout: Rollout) -> None:
        await self.user.finish(rollout)

    async def close(self) -> None:
        await self.user.close()
