"""Asynchronous code for callers that are not: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines to their end, also where the caller's thread runs a loop (Jupyter)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="retrain-native", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine's result; an interruption cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop_after(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a last coroutine, then end; does not wait."""

        async def last() -> None:
            try:
                await coroutine
            finally:
                self._loop.stop()

        asyncio.run_coroutine_threadsafe(last(), self._loop)

    def join(self) -> None:
        self._thread.join()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()
