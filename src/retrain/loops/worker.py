"""A thread for the learner, so that sampling goes on while it works."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Worker:
    """One thread, whose torch operations take as many CPU threads as those of the thread that made
    it: the number is each thread's own, and a new one would take what any other has set last."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(
            1,
            thread_name_prefix="learner",
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, or what it raises, as it is; the event loop goes on meanwhile.

        `work` is always waited for, since what it changes would be half changed. A cancellation is
        put off: it comes at the caller's next `await` that has to wait.
        """
        copied = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, lambda: copied.run(work))
        cancelled = 0
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                cancelled += 1
        task = asyncio.current_task()
        if cancelled and task is not None and future.exception() is None:
            task.uncancel()
            task.cancel()
        return future.result()

    def close(self) -> None:
        self._executor.shutdown()
