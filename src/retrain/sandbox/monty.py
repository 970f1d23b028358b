"""Monty: an interpreter for a subset of Python, in worker processes, on any machine.

The code reaches no file, no network and no process: Monty has no such functions to call. Each
session holds one worker (about 12 MB), so its variables last over its calls. There are no
third-party packages, no generators and no class inheritance; the error of a snippet that needs
one says so.

https://github.com/pydantic/monty
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import time
from typing import TYPE_CHECKING, Literal

from retrain.sandbox.base import Result, SandboxUnavailable, Status
from retrain.sandbox.output import BoundedText, cut_middle
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
        memory_mb: int = 128,
        max_output_chars: int = 10_000,
        max_concurrency: int = 256,
        seed: int = 0,
    ) -> None:
        """
        Args:
            timeout_s: running time of one call, in seconds.
            memory_mb: heap of one session.
            max_output_chars: most characters kept of what one call prints, half of them from its
                start and half from its end.
            max_concurrency: most sessions open at once. Another one waits up to 10 s for room.
            seed: start of the sandbox's `random` module.
        """
        for name, value in (
            ("timeout_s", timeout_s),
            ("memory_mb", memory_mb),
            ("max_output_chars", max_output_chars),
            ("max_concurrency", max_concurrency),
        ):
            if value <= 0:
                raise UserError(f"sandbox.{name} is {value}", "give a number above zero")
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.max_output_chars = max_output_chars
        self.max_concurrency = max_concurrency
        self.seed = seed
        self._pool: asyncio.Task[AsyncMonty] | None = None

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
                f"all {self.max_concurrency} Monty workers are busy; raise sandbox.max_concurrency"
            ) from error
        except Exception as error:
            raise SandboxUnavailable(f"Monty: {error}") from error
        return MontySession(worker, self.timeout_s, self.max_output_chars)

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await (await pool).__aexit__(None, None, None)

    async def _start(self) -> AsyncMonty:
        """The pool, opened once whoever asks first; a finished task may be read from any loop."""
        if self._pool is None:
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
            max_processes=self.max_concurrency,
            checkout_timeout=10.0,
            request_timeout=self.timeout_s + 5.0,
        )
        try:
            return await pool.__aenter__()
        except Exception as error:
            raise SandboxUnavailable(f"Monty did not start: {error}") from error


class MontySession:
    """A worker with state. It dies of a time-out, of running out of memory and of a crash."""

    def __init__(self, worker: AsyncMontySession, timeout_s: float, max_output_chars: int) -> None:
        self._worker = worker
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars
        self._dead = ""
        """Why the session cannot run code any more; empty while it can."""

    async def run(self, code: str) -> Result:
        """Run code; `stdout` ends with the repr of a final expression, as at the prompt.

        Output beyond the limit is dropped while it is printed: code that prints without end runs
        into the time-out. A worker that dies is the code's doing, so it is a `Result`.
        """
        from pydantic_monty import MontyCrashedError, MontyRuntimeError, MontySyntaxError

        if self._dead:
            return Result("killed", error=f"This session is over: {self._dead}.")
        if len(code) > MAX_CODE_CHARS:
            return Result("error", error=f"SyntaxError: more than {MAX_CODE_CHARS} characters")
        output = BoundedText(self._max_output_chars)

        def on_print(stream: Literal["stdout", "stderr"], text: str) -> None:
            output.write(text)

        status: Status = "ok"
        error = ""
        start = time.perf_counter()
        try:
            feed = return_last_expression(code, self._max_output_chars)
            value = await self._worker.feed_run(feed, print_callback=on_print)
            if value is not None:
                output.write(f"{value}\n")
        except asyncio.CancelledError:
            self._dead = "a call was cancelled"
            raise
        except (MontyRuntimeError, MontySyntaxError) as raised:
            status, error = self._explain(raised, time.perf_counter() - start)
        except MontyCrashedError as crash:
            status = "timeout" if crash.timed_out else "killed"
            error = self._timed_out() if crash.timed_out else "The interpreter crashed."
        except Exception as failure:
            self._dead = "the sandbox failed"
            raise SandboxUnavailable(f"Monty: {failure}") from failure
        if status in ("timeout", "memory", "killed"):
            self._dead = {"timeout": "its time ran out", "memory": "its memory ran out"}.get(
                status, "the interpreter crashed"
            )
        error = cut_middle(error, self._max_output_chars)
        wall_s = time.perf_counter() - start
        return Result(status, output.text(), error, wall_s, output.truncated)

    async def close(self) -> None:
        """Give the worker back; what the session defined is dropped."""
        self._dead = self._dead or "it was closed"
        await self._worker.__aexit__(None, None, None)

    def _timed_out(self) -> str:
        return f"TimeoutError: the code ran longer than {self._timeout_s:g} s"

    def _explain(
        self, raised: MontyRuntimeError | MontySyntaxError, wall_s: float
    ) -> tuple[Status, str]:
        message = str(raised)
        kind = raised.exception()
        if isinstance(kind, TimeoutError) and wall_s >= 0.9 * self._timeout_s:
            return "timeout", self._timed_out()
        if isinstance(kind, MemoryError):
            return "memory", "MemoryError: the code used more memory than it may"
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
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    last = body[-1] if body else None
    if not isinstance(last, ast.Expr) or last.end_lineno is None or last.end_col_offset is None:
        return f"{code}\nNone"
    lines = code.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: last.lineno - 1])) + last.col_offset
    end = sum(map(len, lines[: last.end_lineno - 1])) + last.end_col_offset
    source = b"".join(lines)
    assigned = b"%b_ = (%b)%b" % (source[:start], source[start:end], source[end:])
    shown = f"(print(_r), None)[1] if (_r := f'{{_!r}}')[{max_chars}:] else _r"
    return f"{assigned.decode()}\nNone if _ is None else {shown}"
