"""Which replica a request goes to, and when."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TypeVar

SLACK = 8
"""How many more requests than the least busy replica the one that knows a group's prompt may have
before the group moves."""

GROUPS_REMEMBERED = 8192

K = TypeVar("K")


class Router:
    """Admits requests to the least busy of the replicas that are ready, at most `most_each` to one;
    those of one group go where its prompt is cached. Waiting requests are admitted in order.

    Replicas are known by number.
    """

    def __init__(self, count: int, most_each: int) -> None:
        self._ready = [False] * count
        self._load = [0] * count
        self._most_each = most_each
        self._waiting: deque[tuple[asyncio.Future[int], str | None]] = deque()
        self._groups: OrderedDict[str, int] = OrderedDict()
        self._open = False
        self._failure: Exception | None = None

    @property
    def in_flight(self) -> Sequence[int]:
        """Requests at each replica."""
        return self._load

    async def admit(self, group: str | None) -> int:
        """Wait for a place; the replica's number. `release` gives it back.

        Raises:
            Exception: what `fail` was given.
        """
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, group))
        self._dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())
            raise

    def release(self, replica: int) -> None:
        self._load[replica] -= 1
        self._dispatch()

    def open(self) -> None:
        self._open = True
        self._dispatch()

    def close(self) -> None:
        """Admit nobody until `open`."""
        self._open = False

    def set_ready(self, replica: int, ready: bool) -> None:
        self._ready[replica] = ready
        self._dispatch()

    def fail(self, error: Exception) -> None:
        """Give up on everybody who waits, and who will."""
        self._failure = error
        while self._waiting:
            future, _ = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def _dispatch(self) -> None:
        while self._open and self._waiting:
            future, group = self._waiting[0]
            if future.done():
                self._waiting.popleft()
                continue
            replica = self._choose(group)
            if replica is None:
                return
            self._waiting.popleft()
            self._load[replica] += 1
            future.set_result(replica)

    def _choose(self, group: str | None) -> int | None:
        free = [
            number
            for number, ready in enumerate(self._ready)
            if ready and self._load[number] < self._most_each
        ]
        if not free:
            return None
        best = min(free, key=lambda number: self._load[number])
        if group is None:
            return best
        known = self._groups.get(group)
        if known in free and self._load[known] <= self._load[best] + SLACK:
            best = known
        self._groups[group] = best
        self._groups.move_to_end(group)
        if len(self._groups) > GROUPS_REMEMBERED:
            self._groups.popitem(last=False)
        return best
