"""One rollout, a group, a step's worth of groups."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from retrain.engines.base import Engine, SamplingParams
from retrain.envs import Environment
from retrain.envs.base import FINISH_S
from retrain.rendering import Renderer
from retrain.rollout.agent import EngineAgent, request_seed
from retrain.tools.deadline import CancelledItself, Late, within
from retrain.types import Failure, FailureKind, InfrastructureError, Rollout, Task

T = TypeVar("T")


FORGET_S = 5.0
"""How long an engine may take to end a session; a request to do so is not lost with the wait."""

GRACE_S = FINISH_S + 2.0
"""How long a rollout that is given up may take to clean up."""

LONGEST_WAIT_S = 60.0
"""Before a retry."""


class OutOfTime(InfrastructureError):
    """The whole rollout took too long; not retried."""

    kind: FailureKind | None = "deadline"


@dataclass(frozen=True)
class Sampler:
    """Everything that sampling a rollout takes, besides the task.

    Args:
        turn_timeout_s: of sampling one MODEL turn; None waits for ever.
        timeout_s: of a rollout, all its attempts together, and of scoring a group; None likewise.
        retries: how often a rollout whose infrastructure failed is started again before it is
            masked.
        backoff_s: wait before the first retry; it doubles with each, up to a minute.
        max_concurrency: most rollouts that are under way at the same time; `groups` keeps to it.
    """

    environment: Environment
    engine: Engine
    renderer: Renderer
    params: SamplingParams
    run_seed: int = 0
    turn_timeout_s: float | None = None
    timeout_s: float | None = None
    retries: int = 2
    backoff_s: float = 1.0
    max_concurrency: int = 1024

    async def episode(
        self, task: Task, *, epoch: int = 0, sample: int = 0, group_id: str | None = None
    ) -> list[Rollout]:
        """One attempt at a task, by as many tries as it takes; each draws the same numbers. It is
        one rollout, or one of each agent that took part.

        Failed infrastructure masks all of them: `error` is set, nothing is scored. `failures` has
        the causes, those of tries that were repeated too.
        """
        clock = asyncio.get_running_loop().time
        end = math.inf if self.timeout_s is None else clock() + self.timeout_s
        failures: list[Failure] = []
        while True:
            agent = self._agent(task, epoch, sample, group_id)
            try:
                made = await self._attempt(task, agent, end - clock())
                break
            except InfrastructureError as error:
                kind = error.kind or "environment"
                cause = f"{type(error).__name__}: {error}"
                failures.append(Failure(kind, len(failures) + 1, cause))
            wait = self._wait(agent.rollout_id, len(failures))
            if kind == "deadline" or len(failures) > self.retries or clock() + wait >= end:
                return self._lost(task, agent, cause, failures)
            await asyncio.sleep(wait)
        for rollout in made:
            rollout.failures = list(failures)
            if rollout.error is not None:
                rollout.mask("environment", rollout.error)
        return made

    def _lost(
        self, task: Task, agent: EngineAgent, cause: str, failures: Sequence[Failure]
    ) -> list[Rollout]:
        """What stands for an attempt that infrastructure ended."""
        if len(failures) > 1:
            cause += f" ({len(failures)} attempts)"
        lost = [member.start(task) for member in self.environment.cast(agent)]
        for rollout in lost:
            rollout.stop_reason = "error"
            rollout.error = cause
            rollout.failures = list(failures)
        return lost

    def _agent(self, task: Task, epoch: int, sample: int, group_id: str | None) -> EngineAgent:
        return EngineAgent(
            engine=self.engine,
            renderer=self.renderer,
            params=self.params,
            run_seed=self.run_seed,
            epoch=epoch,
            sample=sample,
            rollout_id=f"{epoch}/{task.id}/{sample}",
            group_id=group_id,
            turn_timeout_s=self.turn_timeout_s,
        )

    async def _attempt(self, task: Task, agent: EngineAgent, left_s: float) -> list[Rollout]:
        work = self.environment.spawn().run(task, agent)
        try:
            made = await within(work, None if left_s == math.inf else left_s, grace_s=GRACE_S)
            return made if isinstance(made, list) else [made]
        except Late:
            everyone = [agent, *agent.siblings]
            asked, answered = sum(a.asked for a in everyone), sum(a.answered for a in everyone)
            where = (
                f"the engine was sampling turn {asked}"
                if asked > answered
                else f"it was in the environment after turn {answered}"
            )
            raise OutOfTime(
                f"the rollout did not end within {self.timeout_s:g} s (rollout.timeout_s); {where}"
            ) from None
        except CancelledItself:
            raise InfrastructureError("something in the rollout cancelled itself") from None
        finally:
            await agent.end(self._forget)

    def _wait(self, rollout_id: str, failed: int) -> float:
        """Seconds before the next attempt; the seed takes up to half of them off."""
        whole = min(self.backoff_s * 2.0 ** min(failed - 1, 16), LONGEST_WAIT_S)
        share = request_seed(self.run_seed, 0, rollout_id, failed, 0) / 2**63
        return whole * (1 - share / 2)

    async def _forget(self, agent: EngineAgent) -> None:
        """End the engine's session; an engine that has failed holds none."""
        with suppress(InfrastructureError, TimeoutError):
            async with asyncio.timeout(FORGET_S):
                await agent.engine.end_session(agent.rollout_id)

    async def group(
        self, task: Task, size: int, *, epoch: int = 0, gate: asyncio.Semaphore | None = None
    ) -> list[Rollout]:
        """`size` attempts at one task, at the same time; each waits at the gate if there is one."""
        group_id = f"{epoch}/{task.id}"

        async def admitted(sample: int) -> list[Rollout]:
            async with gate or nullcontext():
                return await self.episode(task, epoch=epoch, sample=sample, group_id=group_id)

        episodes = await gather_or_cancel(map(admitted, range(size)))
        return [rollout for episode in episodes for rollout in episode]

    async def scored_group(
        self,
        task: Task,
        size: int,
        score: Callable[[list[Rollout]], Awaitable[None]],
        *,
        epoch: int = 0,
        gate: asyncio.Semaphore | None = None,
    ) -> list[Rollout]:
        """A group, scored when all of it is done. Scoring that hangs masks it."""
        group = await self.group(task, size, epoch=epoch, gate=gate)
        try:
            await within(score(group), self.timeout_s)
        except Late:
            for rollout in group:
                if rollout.error is None:
                    rollout.mask(
                        "reward",
                        f"the group was not scored within {self.timeout_s:g} s (rollout.timeout_s)",
                    )
        return group

    async def groups(
        self,
        tasks: Iterable[tuple[int, Task]],
        size: int,
        score: Callable[[list[Rollout]], Awaitable[None]],
    ) -> list[list[Rollout]]:
        """A scored group for each (epoch, task), all at the same time."""
        gate = asyncio.Semaphore(self.max_concurrency)
        return await gather_or_cancel(
            self.scored_group(task, size, score, epoch=epoch, gate=gate) for epoch, task in tasks
        )


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like `asyncio.gather`, but the first failure cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
