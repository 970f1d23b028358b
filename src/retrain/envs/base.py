"""What an environment is: `run(task, agent)` makes a rollout.

Subclass `Environment` and override `reset` and `step` for a world of your own. Each rollout gets
its own shallow copy, so `self` may hold that rollout's state from `reset` on.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from retrain.rendering import ToolSchema
from retrain.rewards.failures import describe_exception, describe_rollout
from retrain.tools.deadline import Late, within
from retrain.types import InfrastructureError, Message, Rollout, StopReason, Task, UserError

FINISH_S = 10.0
"""How long `finish` may take."""

logger = logging.getLogger(__name__)


class Agent(Protocol):
    """The policy as an environment sees it."""

    def start(self, task: Task) -> Rollout:
        """An empty rollout of this agent for a task."""
        ...

    async def act(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> Message:
        """Sample the next MODEL message and append it to the rollout.

        Raises:
            InfrastructureError: the engine failed.
        """
        ...


@dataclass(frozen=True)
class Step:
    """What a MODEL message led to: messages to append, an intrinsic reward, and whether to stop."""

    messages: Sequence[Message] = ()
    reward: float = 0.0
    stop: StopReason | None = None


class Environment:
    """A loop of `act` and `step` until one of them stops it."""

    max_steps: int = 10
    """Most MODEL turns of a rollout."""
    most_agents: int = 1
    """Most agents that take part in one attempt at a task: the engine keeps room for so many."""

    def spawn(self) -> Self:
        """The copy that serves one rollout."""
        return copy.copy(self)

    def tools_for(self, task: Task) -> Sequence[ToolSchema]:
        """What the policy may call in a task; written into the prompt where the format does so."""
        return ()

    def opening(self, task: Task) -> Sequence[Message]:
        """The messages that a rollout starts with, as far as the task alone tells them.

        Their length is checked against the context limit before the run begins.
        """
        return task.prompt

    async def reset(self, task: Task) -> Sequence[Message]:
        """The messages that a rollout starts with; override it to set up the rollout's state."""
        return self.opening(task)

    async def step(self, rollout: Rollout, message: Message) -> Step:
        """Answer the policy's message, which is the last of the rollout. By default: stop."""
        return Step(stop="answered")

    async def finish(self, rollout: Rollout) -> None:
        """Release what `reset` and `step` opened; called once, also after a failure.

        After FINISH_S it is left behind; that, and infrastructure that fails here, is logged and
        does not harm the rollout.
        """

    async def close(self) -> None:
        """Release what the environment as a whole holds; called once, at the end of the run."""

    def starts(self, task: Task) -> Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]:
        """What each agent that the task alone sets going begins with, and may call."""
        return [(self.opening(task), self.tools_for(task))]

    def cast(self, agent: Agent) -> Sequence[Agent]:
        """Who takes part, as far as that is known beforehand; by default the policy alone."""
        return [agent]

    async def run(self, task: Task, agent: Agent) -> Rollout | list[Rollout]:
        """One rollout, from reset to stop; or, where several agents act, one of each.

        Raises:
            UserError: `reset` or `step` raised; the rollout so far is shown.
            InfrastructureError: as they raised it.
        """
        rollout = agent.start(task)

        def so_far() -> str:
            return describe_rollout(rollout)

        try:
            with self._blamed("reset", so_far):
                opening = await self.reset(task)
            rollout.add_messages(*opening)
            tools = self.tools_for(task)
            while rollout.stop_reason is None:
                message = await agent.act(rollout, tools)
                rollout.stop_reason = cut_short(message)
                if rollout.stop_reason is not None:
                    rollout.env_rewards.append(0.0)
                    break
                with self._blamed("step", so_far):
                    step = await self.step(rollout, message)
                rollout.add_messages(*step.messages)
                rollout.env_rewards.append(step.reward)
                rollout.stop_reason = step.stop
                if step.stop is None and len(rollout.env_rewards) >= self.max_steps:
                    rollout.stop_reason = "max_steps"
        finally:
            with self._blamed("finish", so_far):
                await self._bounded(self.finish(rollout), rollout)
        return rollout

    async def _bounded(self, cleaning: Awaitable[None], rollout: Rollout) -> None:
        failed = ""
        try:
            await within(cleaning, FINISH_S)
        except Late:
            failed = f"is not done after {FINISH_S:g} s, and is left behind"
        except InfrastructureError as error:
            failed = f"failed: {type(error).__name__}: {error}"
        if failed:
            logger.warning("%s.finish of rollout %s %s", type(self).__name__, rollout.id, failed)

    @contextmanager
    def _blamed(self, method: str, so_far: Callable[[], str]) -> Iterator[None]:
        """Say which environment failed, and on what."""
        try:
            yield
        except InfrastructureError as error:
            error.kind = error.kind or "environment"
            raise
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{type(self).__name__}.{method} failed: {describe_exception(error)}",
                f"The rollout was:\n{so_far()}",
            ) from error


def cut_short(message: Message) -> StopReason | None:
    """Why a turn ended that did not end by itself."""
    reason = message.turn.finish_reason if message.turn else None
    if reason == "length":
        return "length"
    return "context" if reason == "context" else None
