"""Things that belong to one event loop, for objects that outlive loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Makes one `T` for each event loop that asks; those of closed loops are forgotten."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """The running loop's."""
        for loop in [loop for loop in self._made if loop.is_closed()]:
            self._made.pop(loop, None)
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            self._made[loop] = self._make()
        return self._made[loop]

    def pop(self) -> T | None:
        """Take the running loop's out, if it has one."""
        return self._made.pop(asyncio.get_running_loop(), None)
