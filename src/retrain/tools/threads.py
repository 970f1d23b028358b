"""Threads for code that may hang."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")

IDLE_S = 10.0
"""How long a thread waits for another call before it ends."""


def in_daemon_thread(function: Callable[[], R]) -> asyncio.Future[R]:
    """Run `function` in a thread that does nothing else meanwhile; a future for its result.

    A thread cannot be killed. If the caller stops waiting, the thread runs on by itself; there are
    as many as are needed, so it takes nobody's place, and as a daemon it does not delay the
    interpreter's exit. A thread that is done takes further calls: to start one costs three times
    as much, and holds up the event loop.
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

    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    worker.inbox.put(work)
    return future


class _Worker:
    """A daemon thread that runs one function after another."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="retrain-tool", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                work = self.inbox.get(timeout=IDLE_S)
            except queue.Empty:
                try:
                    _idle.remove(self)
                    return
                except ValueError:  # it was just taken, and its work is on the way
                    work = self.inbox.get()
            work()
            del work
            _idle.append(self)


_idle: list[_Worker] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork
