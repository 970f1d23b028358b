"""What asking over HTTP takes besides a request: patience, and a client for each event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from retrain.types import InfrastructureError

T = TypeVar("T")

LONGEST_WAIT_S = 60.0
"""Between two attempts, whatever the server asks for."""

CONNECT_S = 10.0

PASSING = (408, 409, 425, 429)
"""The 4xx codes that speak of the moment, not of the request."""


class Later(Exception):
    """No answer this time."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s
        """What the server asks to be waited."""


async def until_answered(
    attempt: Callable[[], Awaitable[T]], *, retries: int, backoff_s: float, named: str
) -> tuple[T, int]:
    """What `attempt` gives, and how many attempts that took; further ones follow on `Later`.

    Args:
        named: what was asked, for the error.

    Raises:
        InfrastructureError: the last one came to nothing either.
    """
    number = 1
    while True:
        try:
            return await attempt(), number
        except Later as later:
            if number > retries:
                tried = f" ({number} attempts)" if number > 1 else ""
                raise InfrastructureError(f"{named}: {later}{tried}") from later
            await asyncio.sleep(wait_s(number, backoff_s, later.after_s))
            number += 1


def wait_s(attempt: int, backoff_s: float, after_s: float | None) -> float:
    """Seconds from an attempt, the first being 1, to the next.

    `backoff_s` doubles with each attempt; a random part of it, up to half, is taken off. What the
    server asks for takes its place.
    """
    if after_s is not None:
        return min(after_s, LONGEST_WAIT_S)
    whole = min(backoff_s * 2.0 ** min(attempt - 1, 16), LONGEST_WAIT_S)
    return whole * random.uniform(0.5, 1.0)


def retry_after_s(header: str | None) -> float | None:
    """Of a `Retry-After` in seconds; a date counts as none."""
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None


class PerLoop(Generic[T]):
    """One object for each event loop, made when it is first asked for there."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[asyncio.AbstractEventLoop, T] = {}

    def here(self) -> T:
        for loop in [loop for loop in self._made if loop.is_closed()]:
            del self._made[loop]
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            self._made[loop] = self._make()
        return self._made[loop]

    def take(self) -> T | None:
        """That of this loop, which then has none."""
        return self._made.pop(asyncio.get_running_loop(), None)
