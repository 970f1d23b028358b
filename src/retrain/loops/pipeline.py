"""Groups of rollouts: started in the order of their tasks, handed out in that order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from retrain.config.root import TrainingConfig
from retrain.data import TaskCursor
from retrain.types import Rollout, Task, UserError


@dataclass(frozen=True)
class SampledGroup:
    """A task's rollouts, scored, and when they were under way (`time.perf_counter`)."""

    rollouts: list[Rollout]
    began: float
    ended: float


@dataclass(frozen=True)
class _Started:
    key: tuple[int, str]
    mark: Any
    """Of the data, before its task was drawn."""
    work: asyncio.Task[SampledGroup]


class Pipeline:
    """What is sampled for the steps of a stage, this one's and those to come.

    A group starts when `take` makes room for it, and at no other time: whoever calls `take` once
    the weights of a step are with the engine decides which weights a group begins under. What is
    handed out depends on the tasks' order alone, however long each of them took.

    The first group that fails is heard of wherever the pipeline is waited for, with its own
    exception.

    Args:
        tasks: drawn from when their groups start, never ahead of that.
        sample: makes the scored group of an (epoch, task).
    """

    def __init__(
        self, tasks: TaskCursor, sample: Callable[[int, Task], Awaitable[list[Rollout]]]
    ) -> None:
        self._tasks = tasks
        self._sample = sample
        self._queue: deque[_Started] = deque()
        self._seen: set[tuple[int, str]] = set()
        self._failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """Holds what the first group that failed has raised."""

    @property
    def under_way(self) -> int:
        """Groups that were started and not handed out."""
        return len(self._queue)

    def position(self) -> dict[str, Any]:
        """From which the tasks come again whose groups were not handed out."""
        if not self._queue:
            return self._tasks.position()
        return self._tasks.rewound(self._queue[0].mark)

    def begin_step(self) -> None:
        """What is taken from now on is another step's."""
        self._seen = {started.key for started in self._queue}

    async def take(self, count: int, *, ahead: int = 0) -> list[SampledGroup]:
        """The next `count` groups; up to `ahead` more are under way from now on.

        Raises:
            UserError: two tasks of a step, or of those under way, have one id; or whatever a group
                or the source of tasks raised.
        """
        self._start(count + ahead - len(self._queue))
        taken = []
        for _ in range(count):
            await self._until_done(self._queue[0])
            taken.append(self._queue.popleft().work.result())
        return taken

    async def settle(self) -> None:
        """Wait until nothing is under way; what was sampled stays, to be handed out."""
        for started in self._queue:
            await self._until_done(started)

    async def close(self) -> None:
        """Give up what is under way."""
        works = [started.work for started in self._queue]
        self._queue.clear()
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)

    def _start(self, count: int) -> None:
        """All of them are drawn before the first starts: the engine then hears of them together."""
        drawn = []
        for _ in range(count):
            mark = self._tasks.mark()
            drawn += [(mark, *found) for found in take_distinct(self._tasks, 1, self._seen)]
        for mark, epoch, task in drawn:
            work = asyncio.create_task(self._group(epoch, task))
            self._queue.append(_Started((epoch, task.id), mark, work))

    async def _group(self, epoch: int, task: Task) -> SampledGroup:
        began = time.perf_counter()
        try:
            rollouts = await self._sample(epoch, task)
        except Exception as error:
            if not self._failed.done():
                self._failed.set_result(error)
            raise
        return SampledGroup(rollouts, began, time.perf_counter())

    async def _until_done(self, started: _Started) -> None:
        """
        Raises:
            Exception: what this group, or another one that is under way, raised first.
        """
        either: set[asyncio.Future[Any]] = {started.work, self._failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            raise self._failed.result()


def take_distinct(
    tasks: Iterator[tuple[int, Task]], count: int, seen: set[tuple[int, str]]
) -> list[tuple[int, Task]]:
    """The next tasks; `seen` are those that they must differ from, and these are added to them.

    Raises:
        UserError: two of them have one id, which would mix their groups up.
    """
    batch = [next(tasks) for _ in range(count)]
    for epoch, task in batch:
        if (epoch, task.id) in seen:
            raise UserError(
                f"prompt_source: two tasks have the id {task.id!r}",
                "Give each its own, or leave out prompt_source.id_column.",
            )
        seen.add((epoch, task.id))
    return batch


def seconds_under_way(groups: Sequence[SampledGroup]) -> float:
    """Time in which at least one of the groups was."""
    total, until = 0.0, float("-inf")
    for group in sorted(groups, key=lambda group: group.began):
        total += max(0.0, group.ended - max(group.began, until))
        until = max(until, group.ended)
    return total


def overlapping(config: TrainingConfig) -> dict[str, int]:
    """`max_staleness` of the stages that learn from rollouts while they sample, by what names
    them."""
    usual = config.algorithm.hyperparameters.max_staleness
    section = config.distillation
    found = {"rl": usual} if section is None or section.type == "on_policy" else {}
    if config.stages is not None:
        found = {}
        for number, stage in enumerate(config.stages):
            type_ = stage.distillation.get("type", section.type if section else None)
            if stage.kind == "rl" or (stage.kind == "distill" and type_ == "on_policy"):
                given = stage.algorithm.get("hyperparameters") or {}
                found[stage.name or f"stages.{number}"] = int(given.get("max_staleness", usual))
    return {name: steps for name, steps in found.items() if steps > 0}
