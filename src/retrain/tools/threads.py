"""Threads for code that may hang."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


async def run_in_daemon_thread(function: Callable[[], R]) -> R:
    """Run `function` in a daemon thread of its own and wait for its result.

    A thread cannot be killed. If the caller stops waiting, the thread runs on by itself; being
    its own and a daemon, it neither takes a place in a pool nor delays the interpreter's exit.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[R] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(result: R | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result: R | None = None
        error: BaseException | None = None
        try:
            result = context.run(function)
        except StopIteration as stop:
            error = RuntimeError(f"StopIteration: {stop}")  # a future cannot hold StopIteration
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=work, name="retrain-tool", daemon=True).start()
    return await future
