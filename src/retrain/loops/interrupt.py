"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends the process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run stopped because it was asked to. `checkpoint` is where it can go on from; None where
    nothing was worth saving."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.checkpoint: str | None = None

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signum


class Stop:
    """Listens for signals while it is entered, in the main thread of a process; elsewhere nothing
    ever asks it to stop, unless `request` is called."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        os.write(2, b"stopping; once more to leave at once without saving\n")
        self.request(signum)

    def request(self, signum: int = signal.SIGINT) -> None:
        """Ask the run to save and stop, as the signal would."""
        self.signum = signum
        self._loop.call_soon_threadsafe(self._asked.set)

    def check(self) -> None:
        """
        Raises:
            Interrupted: the run has been asked to stop.
        """
        if self.signum is not None:
            raise Interrupted(self.signum)

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the run is asked to stop.

        Raises:
            Interrupted: it was.
        """
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                assert self.signum is not None
                raise Interrupted(self.signum)
            return task.result()
        finally:
            asked.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
