"""One thread with an event loop, for connections that outlive the loops of those who use them."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

R = TypeVar("R")

EXIT_S = 8.0
"""How long the interpreter's exit waits for what is still open; ending a server takes up to 6."""


class Background:
    """The loop runs in a daemon thread from the first use to the end of the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._at_exit: set[Callable[[], Awaitable[None]]] = set()
        threading.Thread(target=self._loop.run_forever, name="retrain-mcp", daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        """Start it there; to cancel the future is to cancel the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Wait for it, from a thread that may or may not have a running event loop."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    async def wait(self, work: Coroutine[Any, Any, R]) -> R:
        """Wait for it, from any event loop; a caller that is cancelled cancels the work."""
        return await asyncio.wrap_future(self.submit(work))

    async def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for it, from any event loop; it goes on when the caller is cancelled."""
        await asyncio.shield(asyncio.wrap_future(self.submit(work)))

    def spawn(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """A task of its own, from within the background loop; its failure is not reported."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def before_exit(self, close: Callable[[], Awaitable[None]]) -> None:
        """Have the interpreter's exit call it, unless `no_longer` comes first."""
        self._at_exit.add(close)

    def no_longer(self, close: Callable[[], Awaitable[None]]) -> None:
        self._at_exit.discard(close)

    def end(self) -> None:
        """Close what is open, all at once."""

        async def close_all() -> None:
            closing = [close() for close in self._at_exit]
            await asyncio.gather(*closing, return_exceptions=True)

        if self._at_exit:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                self.submit(close_all()).result(EXIT_S)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()


_made: list[Background] = []
"""Empty, or the one."""
_making = threading.RLock()
"""Re-entrant: the garbage collector may come for a server while it is held."""


def background() -> Background:
    """The process's only one."""
    with _making:
        if not _made:
            _made.append(Background())
        return _made[0]


def _end() -> None:
    if _made:
        _made[0].end()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_made.clear)  # threads do not survive a fork
