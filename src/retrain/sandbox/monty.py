"""Monty: an interpreter for a subset of Python, in worker processes, on any machine.

The code reaches no file, no network and no process: Monty has no such functions to call. Each
session holds one worker (about 12 MB), so its variables last over its calls. There are no
third-party packages, no generators and no class inheritance; the error of a snippet that needs
one says so.

https://github.com/pydantic/monty
"""

from __future__ import annotations

import asyncio
import atexit
import time
from typing import TYPE_CHECKING, Literal

from retrain.sandbox.base import (
    ALIVE,
    OUT_OF_MEMORY,
    OVER_AFTER,
    Capabilities,
    Result,
    SandboxUnavailable,
    Status,
    check_limits,
    out_of_time,
    over,
    turn,
)
from retrain.sandbox.last_expression import assign_last_expression
from retrain.sandbox.output import BoundedText, cut_middle
from retrain.sandbox.per_loop import PerLoop
from retrain.types import UserError

if TYPE_CHECKING:
    from pydantic_monty import AsyncMonty, AsyncMontySession, MontyRuntimeError, MontySyntaxError

MODULES = (
    "asyncio, base64, binascii, bisect, collections, copy, csv, dataclasses, datetime, decimal, "
    "functools, hashlib, itertools, json, math, os, pathlib, random, re, sys, time, tomllib, "
    "typing, unicodedata"
)
"""What code in the sandbox can import."""

MAX_CODE_CHARS = 100_000
MAX_SESSIONS = 256
"""Open at once: each holds a worker. Another one waits up to 10 s for one to end."""

_EXIT_GRACE_S = 0.05
"""Monty's threads may still be letting go of a dead worker when the interpreter ends, which then
aborts (1.4.0; about half of the runs that end right after one). This lets them finish."""

_UNSUPPORTED = "The monty syntax parser does not yet support "


class MontySandbox:
    """Workers for sessions, started as sessions need them and reused after a reset.

    `time.sleep` returns at once, and the `random` module is seeded with `seed` in every session,
    so that the result of a session depends on its code alone (clocks excepted).
    """

    def __init__(
        self,
        *,
        timeout_s: float = 5.0,
        memory_mb: int = 256,
        max_output_chars: int = 4000,
        stateful: bool = True,
        max_concurrency: int = 64,
        seed: int = 0,
    ) -> None:
        """
        Args:
            timeout_s: running time of one call, in seconds.
            memory_mb: heap of one session.
            max_output_chars: most characters kept of what one call prints, half of them from its
                start and half from its end.
            stateful: keep a session over a rollout's calls.
            max_concurrency: most calls that run at once; further ones wait their turn.
            seed: start of the sandbox's `random` module.
        """
        check_limits(
            timeout_s=timeout_s,
            memory_mb=memory_mb,
            max_output_chars=max_output_chars,
            max_concurrency=max_concurrency,
        )
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.max_output_chars = max_output_chars
        self.stateful = stateful
        self.max_concurrency = max_concurrency
        self.seed = seed
        self._gates = PerLoop(lambda: asyncio.Semaphore(max_concurrency))
        self._pool: asyncio.Task[AsyncMonty] | None = None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            stateful=True,
            full_python=False,
            packages=(),
            files=False,
            writable=False,
            isolation="an interpreter that has no function to reach a file, network or process",
        )

    async def start(self) -> None:
        """Open the pool and run `6 * 7` in it."""
        session = await self.session()
        result = await session.run("6 * 7")
        await session.close()
        if result.stdout != "42\n":
            raise SandboxUnavailable(f"Monty: 6 * 7 gave {result.stdout or result.error}")

    async def session(self) -> MontySession:
        """A fresh session.

        Raises:
            UserError: pydantic-monty is not installed.
            SandboxUnavailable: no worker could be started, or none became free in 10 s.
        """
        pool = await self._start()
        worker = pool.checkout(
            limits={
                "max_feed_duration_secs": self.timeout_s,
                "max_memory": self.memory_mb * 2**20,
            },
            os_policy={"sleep": "zero", "random_start": {"seed": self.seed}},
        )
        try:
            await worker.__aenter__()
        except TimeoutError as error:
            raise SandboxUnavailable(
                f"{MAX_SESSIONS} sessions are open, which is as many as Monty may have"
            ) from error
        except Exception as error:
            raise SandboxUnavailable(f"Monty: {error}") from error
        return MontySession(worker, self._gates.get(), self.timeout_s, self.max_output_chars)

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await (await pool).__aexit__(None, None, None)

    async def _start(self) -> AsyncMonty:
        """The pool, opened once whoever asks first; a finished task may be read from any loop."""
        if self._pool is None or self._pool.cancelled():
            self._pool = asyncio.create_task(self._open())
        try:
            return await asyncio.shield(self._pool)
        except (UserError, SandboxUnavailable):
            self._pool = None
            raise

    async def _open(self) -> AsyncMonty:
        try:
            from pydantic_monty import AsyncMonty
        except ImportError as error:
            raise UserError(
                f"sandbox type 'monty' cannot be imported: {error}",
                "pip install pydantic-monty==1.4.0",
            ) from error
        atexit.register(time.sleep, _EXIT_GRACE_S)
        pool = AsyncMonty(
            max_processes=MAX_SESSIONS,
            checkout_timeout=10.0,
            request_timeout=self.timeout_s + 5.0,
        )
        try:
            return await pool.__aenter__()
        except Exception as error:
            raise SandboxUnavailable(f"Monty did not start: {error}") from error


class MontySession:
    """A worker with state. It dies of a time-out, of running out of memory and of a crash."""

    def __init__(
        self,
        worker: AsyncMontySession,
        gate: asyncio.Semaphore,
        timeout_s: float,
        max_output_chars: int,
    ) -> None:
        self._worker = worker
        self._gate = gate
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars
        self._dead = ""
        """Why the session cannot run code any more; empty while it can."""

    async def run(self, code: str) -> Result:
        """Run code; `stdout` ends with the repr of a final expression, as at the prompt.

        Output beyond the limit is dropped while it is printed: code that prints without end runs
        into the time-out. A worker that dies is the code's doing, so it is a `Result`.
        """
        if self._dead:
            return over(self._dead)
        if len(code) > MAX_CODE_CHARS:
            return Result("error", error=f"SyntaxError: more than {MAX_CODE_CHARS} characters")
        output = BoundedText(self._max_output_chars)
        try:
            async with turn(self._gate):
                if self._dead:
                    return over(self._dead)
                start = time.perf_counter()
                status, error = await self._feed(code, output)
                wall_s = time.perf_counter() - start
        except asyncio.CancelledError:
            self._dead = "a call was cancelled"
            raise
        if status not in ALIVE:
            self._dead = OVER_AFTER[status]
        error = cut_middle(error, self._max_output_chars)
        return Result(status, output.text(), error, wall_s, output.truncated)

    async def _feed(self, code: str, output: BoundedText) -> tuple[Status, str]:
        from pydantic_monty import MontyCrashedError, MontyRuntimeError, MontySyntaxError

        def on_print(stream: Literal["stdout", "stderr"], text: str) -> None:
            output.write(text)

        start = time.perf_counter()
        try:
            feed = return_last_expression(code, self._max_output_chars)
            value = await self._worker.feed_run(feed, print_callback=on_print)
        except (MontyRuntimeError, MontySyntaxError) as raised:
            return self._explain(raised, time.perf_counter() - start)
        except MontyCrashedError as crash:
            if crash.timed_out:
                return "timeout", out_of_time(self._timeout_s)
            return "killed", "The interpreter crashed."
        except Exception as failure:
            self._dead = "the sandbox failed"
            raise SandboxUnavailable(f"Monty: {failure}") from failure
        if value is not None:
            output.write(f"{value}\n")
        return "ok", ""

    async def close(self) -> None:
        """Give the worker back; what the session defined is dropped."""
        self._dead = self._dead or "it was closed"
        await self._worker.__aexit__(None, None, None)

    def _explain(
        self, raised: MontyRuntimeError | MontySyntaxError, wall_s: float
    ) -> tuple[Status, str]:
        message = str(raised)
        kind = raised.exception()
        if isinstance(kind, TimeoutError) and wall_s >= 0.9 * self._timeout_s:
            return "timeout", out_of_time(self._timeout_s)
        if isinstance(kind, MemoryError):
            return "memory", OUT_OF_MEMORY
        if isinstance(kind, SystemExit):
            return "exit", message
        text = raised.display("traceback")
        if isinstance(kind, ModuleNotFoundError):
            text += f" (this Python has only: {MODULES})"
        if _UNSUPPORTED in text:
            text = text.replace(_UNSUPPORTED, "this Python does not support ")
        return "error", text


def return_last_expression(code: str, max_chars: int) -> str:
    """The code, changed so that the feed returns the repr of a final bare expression.

    What a feed returns is converted on the host, without limits of time or memory: it must be
    None or a short string, whatever the code does. So the value is formatted inside the sandbox
    (`f"{_!r}"`: code may redefine `repr`), and a repr of more than `max_chars` characters is
    printed instead, since prints are bounded. As at the prompt, `_` is the value. Lines keep
    their numbers. Code that this Python cannot parse is left for the sandbox to report.
    """
    assigned = assign_last_expression(code)
    if assigned is None:
        return f"{code}\nNone"
    shown = f"(print(_r), None)[1] if (_r := f'{{_!r}}')[{max_chars}:] else _r"
    return f"{assigned}\nNone if _ is None else {shown}"
