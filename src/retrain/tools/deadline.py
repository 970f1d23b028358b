"""Waiting for code that may hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Late(Exception):
    """What was waited for did not end in time."""


class CancelledItself(Exception):
    """What was waited for raised CancelledError, and nobody had cancelled it."""


async def within(work: Awaitable[T], timeout_s: float | None, *, grace_s: float = 0.0) -> T:
    """The result of `work`, which runs in a task of its own.

    After `timeout_s`, and when the caller is cancelled, `work` is cancelled and has `grace_s` to
    clean up. What does not heed its cancellation is left behind; where its time had run out, the
    end of the event loop does not wait for it either.

    Raises:
        Late: after `timeout_s`.
        CancelledItself: nobody had.
    """
    loop = asyncio.get_running_loop()
    task, over = asyncio.ensure_future(work), loop.create_future()

    def release(_: object = None) -> None:
        if not over.done():
            over.set_result(None)

    task.add_done_callback(release)
    timer = None if timeout_s is None else loop.call_later(timeout_s, release)
    late = False
    try:
        await over  # what asyncio.wait does, a quarter cheaper
        late = not task.done()
        if late:
            raise Late
        if task.cancelled():
            raise CancelledItself
        return task.result()
    finally:
        if timer is not None:
            timer.cancel()
        if task.done():
            _forget(task)
        else:
            task.cancel()
            task.add_done_callback(_forget)
            if grace_s > 0:
                await asyncio.wait({task}, timeout=grace_s)
            if late and isinstance(task, asyncio.Task):
                asyncio._unregister_task(task)


def _forget(task: asyncio.Future[T]) -> None:
    """Take the outcome of a task that nobody waits for, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()
