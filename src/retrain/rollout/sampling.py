"""One rollout, a group, a step's worth of groups."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from retrain.engines.base import Engine, SamplingParams
from retrain.envs import Environment
from retrain.rendering import Renderer
from retrain.rollout.agent import EngineAgent
from retrain.types import InfrastructureError, Rollout, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Sampler:
    """Everything that sampling a rollout takes, besides the task.

    Args:
        retries: how often a rollout whose infrastructure failed is started again before it is
            masked.
    """

    environment: Environment
    engine: Engine
    renderer: Renderer
    params: SamplingParams
    run_seed: int = 0
    retries: int = 1

    async def rollout(
        self, task: Task, *, epoch: int = 0, sample: int = 0, group_id: str | None = None
    ) -> Rollout:
        """One attempt. Failed infrastructure masks it: `error` is set, nothing is scored."""
        rollout_id = f"{epoch}/{task.id}/{sample}"
        agent = EngineAgent(
            engine=self.engine,
            renderer=self.renderer,
            params=self.params,
            run_seed=self.run_seed,
            epoch=epoch,
            sample=sample,
            rollout_id=rollout_id,
            group_id=group_id,
        )
        failure = ""
        for _ in range(self.retries + 1):
            try:
                return await self.environment.spawn().run(task, agent)
            except InfrastructureError as error:
                failure = f"{type(error).__name__}: {error}"
            finally:
                await self._forget(rollout_id)
        masked = agent.start(task)
        masked.stop_reason = "error"
        masked.error = failure
        return masked

    async def _forget(self, rollout_id: str) -> None:
        """End the engine's session; an engine that has failed holds none."""
        with suppress(InfrastructureError):
            await self.engine.end_session(rollout_id)

    async def group(self, task: Task, size: int, *, epoch: int = 0) -> list[Rollout]:
        """`size` attempts at one task, at the same time."""
        group_id = f"{epoch}/{task.id}"
        attempts = (
            self.rollout(task, epoch=epoch, sample=i, group_id=group_id) for i in range(size)
        )
        return await gather_or_cancel(attempts)

    async def groups(
        self,
        tasks: Iterable[tuple[int, Task]],
        size: int,
        score: Callable[[list[Rollout]], Awaitable[None]],
    ) -> list[list[Rollout]]:
        """A group for each (epoch, task), all at the same time; each is scored when it is done."""

        async def scored(epoch: int, task: Task) -> list[Rollout]:
            group = await self.group(task, size, epoch=epoch)
            await score(group)
            return group

        return await gather_or_cancel(scored(epoch, task) for epoch, task in tasks)


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
