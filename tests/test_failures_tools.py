"""Tools that hang: whose clock runs, and which thread is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import ClassVar

from retrain.tools import ToolRunner
from retrain.types import ToolCall
from test_tools import run, run_one


class Slow:
    """Sleeps."""

    made: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.made.append(threading.get_ident())

    def __call__(self, seconds: float) -> float:
        """Sleep.

        Args:
            seconds: how long
        """
        time.sleep(seconds)
        return seconds


async def test_the_clock_of_a_call_starts_when_its_turn_has_come() -> None:
    calls = [ToolCall("Slow", {"seconds": 0.3})] * 3
    begun = time.perf_counter()
    results = await run([Slow], *calls, timeout_s=0.5)
    assert [(r.status, r.text) for r in results] == [("ok", "0.3")] * 3
    assert time.perf_counter() - begun > 0.9  # one after the other
    assert all(0.3 <= r.wall_s < 0.5 for r in results)
    assert threading.get_ident() not in Slow.made


async def test_a_thread_that_hangs_keeps_its_instance() -> None:
    hung, late = ToolCall("Slow", {"seconds": 0.5}), ToolCall("Slow", {"seconds": 0.0})
    async with ToolRunner([Slow], timeout_s=0.2) as runner:
        assert [r.status for r in await runner.run([hung, late])] == ["timeout", "timeout"]
        await asyncio.sleep(0.3)
        assert [r.status for r in await runner.run([late])] == ["ok"]


async def test_threads_are_used_again_unless_they_hang() -> None:
    async def used(seconds: float) -> tuple[str, str]:
        def where() -> int:
            time.sleep(seconds)
            return threading.get_ident()

        return await run_one(where, {}, timeout_s=0.1)

    status, first = await used(0.0)
    await asyncio.sleep(0.05)
    assert (status, first) == await used(0.0)
    await asyncio.sleep(0.05)
    assert (await used(0.6))[0] == "timeout"
    assert (await used(0.0))[1] != first
