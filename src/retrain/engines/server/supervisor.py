"""Watches servers, and brings those back that fail or hang."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from retrain.engines.server.dialect import Malformed, healthy
from retrain.engines.server.http import Refused, Unreachable
from retrain.engines.server.replica import NotStarted, Replica
from retrain.engines.server.router import Router
from retrain.types import InfrastructureError, UserError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
MISSES = 3
"""Signs of life that a server misses in a row before it counts as hanging."""

LATE_S = 1.0
"""An answer that is later than its time limit by more than this was not read in time."""

BACKOFF_S = 1.0
LONGEST_WAIT_S = 30.0


class Supervisor:
    """
    Args:
        bring_up: makes a replica usable again, and ready in the router. It raises what servers
            raise, or NotStarted, if it cannot this time; what else it raises stops everything.
        health_timeout_s: of one sign of life.
        max_restarts: of one replica, with no request answered in between.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        router: Router,
        bring_up: Callable[[int], Awaitable[None]],
        health_timeout_s: float,
        max_restarts: int,
    ) -> None:
        self._replicas = replicas
        self._router = router
        self._bring_up = bring_up
        self._health_timeout_s = health_timeout_s
        self._max_restarts = max_restarts
        self._tasks: list[asyncio.Task[None]] = []
        self._lost: dict[int, Exception] = {}
        self.restarts = 0
        """Of all replicas."""

    def watch(self) -> None:
        """Begin to watch, if that has not begun."""
        if not self._tasks:
            numbers = range(len(self._replicas))
            self._tasks = [asyncio.ensure_future(self._watch(n)) for n in numbers]

    def check(self) -> None:
        """
        Raises:
            UserError: no server is left, or one serves what it should not.
        """
        for error in self._lost.values():
            if not isinstance(error, InfrastructureError):
                raise error
        if len(self._lost) == len(self._replicas):
            cause = next(iter(self._lost.values()))
            raise UserError(
                f"no server is left: {cause}",
                "Repair what failed (each server's log is in the run directory, under engine/), "
                "then continue with --resume.",
            ) from cause

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _watch(self, number: int) -> None:
        try:
            await self._look_after(number)
        except Exception as error:
            await self._give_up(number, error)

    async def _look_after(self, number: int) -> None:
        replica = self._replicas[number]
        misses = 0
        while number not in self._lost:
            await replica.trouble(min(LOOK_EVERY_S, self._health_timeout_s))
            suspected = replica.suspected.is_set()
            replica.suspected.clear()
            if replica.loading and not replica.gone:
                continue
            if not replica.gone and replica.started:
                asked = time.monotonic()
                well = await healthy(replica.server, self._health_timeout_s)
                if not well and time.monotonic() - asked > self._health_timeout_s + LATE_S:
                    continue  # this process was busy: that says nothing of the server
                if well:
                    misses = 0
                    if suspected or replica.version is None:
                        await self._restore(number)
                    continue
                misses += 1
                if misses < MISSES and not replica.gone:
                    replica.suspected.set()
                    await asyncio.sleep(min(BACKOFF_S, self._health_timeout_s))
                    continue
            misses = 0
            if replica.started:
                await self._down(number)
            if replica.launcher is not None:
                await self._restore(number)

    async def _down(self, number: int) -> None:
        """Nobody is sent there; what is under way there is asked of others."""
        replica = self._replicas[number]
        self._router.set_ready(number, False)
        replica.problem = "it ended" if replica.gone else "it gives no sign of life"
        logger.warning("%s: %s", replica.name, replica.problem)
        if replica.launcher is not None:
            await replica.stop()
        else:
            replica.version = None
            await replica.cut_off()

    async def _restore(self, number: int) -> None:
        """Bring a replica up, or count that it could not be."""
        replica = self._replicas[number]
        self._router.set_ready(number, False)
        came_back = replica.version is None
        if came_back:  # a request that failed at a server that is well counts against the request
            replica.failures += 1
        if replica.failures > self._max_restarts:
            times = "once" if replica.failures == 1 else f"{replica.failures} times in a row"
            cause = InfrastructureError(
                f"{replica.name} failed {times} (engine.max_restarts {self._max_restarts}), "
                f"last: {replica.problem or 'it gave no sign of life'}"
            )
            await self._give_up(number, cause)
            return
        await asyncio.sleep(
            min(BACKOFF_S * 2 ** max(replica.failures - 1, 0) - BACKOFF_S, LONGEST_WAIT_S)
        )
        replica.suspected.clear()  # of what is looked into now
        try:
            await self._bring_up(number)
        except (Unreachable, Refused, Malformed, NotStarted, OSError) as error:
            logger.warning("%s cannot be used yet: %s", replica.name, error)
            replica.problem = str(error)
            replica.doubt()
        else:
            if came_back:
                self.restarts += 1
                logger.warning("%s is back", replica.name)

    async def _give_up(self, number: int, error: Exception) -> None:
        """Nobody is sent there any more. What is not the fault of the infrastructure stops
        everything."""
        self._lost[number] = error
        self._router.set_ready(number, False)
        logger.warning("%s is given up: %s", self._replicas[number].name, error)
        if not isinstance(error, InfrastructureError) or len(self._lost) == len(self._replicas):
            self._router.fail(error)
        await self._replicas[number].stop()
