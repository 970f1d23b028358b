"""The host's end of a session: send code, watch the clock, read what comes back with distrust."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import signal
import socket
import time

from retrain.sandbox.base import (
    ALIVE,
    OVER_AFTER,
    Result,
    SandboxUnavailable,
    Status,
    out_of_time,
    over,
    turn,
)
from retrain.sandbox.jail.inside.wire import (
    MAX_ERROR_BYTES,
    READY,
    REQUEST,
    RESPONSE,
    STATUSES,
)
from retrain.sandbox.jail.process import ZygoteProcess
from retrain.sandbox.output import cut_middle

MAX_CODE_BYTES = 400_000

_END_S = 5.0
"""How long to wait for word of how a process ended."""


_CLOSED = socket.socket()
_CLOSED.close()


class JailSession:
    """A process of its own, stopped between calls, gone after `close` or a call that ends it."""

    def __init__(
        self,
        process: ZygoteProcess,
        *,
        timeout_s: float,
        max_output_chars: int,
        output_bytes: int,
    ) -> None:
        """
        Args:
            output_bytes: most that a call may print before it counts as too much.
        """
        self._process = process
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars
        self._output_bytes = output_bytes
        self._over = ""
        """Why it cannot run code any more; empty while it can."""
        self._lost = ""
        """Why the sandbox failed under it; empty while it has not."""
        self._unsent = b""
        self._received = bytearray()
        self._news = asyncio.Event()
        """Set when something arrived, the process ended or the time ran out."""
        self._busy = False
        self._timed_out = False
        self._hung_up = False
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._one_at_a_time = asyncio.Lock()
        self._pidfd = self._output = -1
        self._channel = _CLOSED

    async def open(self) -> None:
        """Have the process forked and locked in.

        Raises:
            SandboxUnavailable: that failed.
        """
        try:
            self._output = os.memfd_create("output")
            fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)
            self._channel, theirs = socket.socketpair()
            self._channel.setblocking(False)
            with theirs:
                self._pidfd = await self._process.spawn(theirs, self._output, self)
            asyncio.get_running_loop().add_reader(self._channel.fileno(), self._on_readable)
            async with asyncio.timeout(_END_S):
                while not self._received and not self._hung_up:
                    await self._next_news()
            if self._received != READY:
                reason = self._received[1:].decode("utf-8", "replace") or "it ended"
                raise SandboxUnavailable(f"jail: a session could not lock itself in: {reason}")
            self._received.clear()
        except TimeoutError:
            self._end("it did not start")
            raise SandboxUnavailable(f"jail: a session was not ready after {_END_S:g} s") from None
        except OSError as error:
            self._end("it did not start")
            raise SandboxUnavailable(f"jail: no new session: {error}") from error
        except BaseException:
            self._end("it did not start")
            raise

    async def run(self, code: str) -> Result:
        try:
            source = code.encode()
        except UnicodeEncodeError as half:
            return Result("error", error=f"SyntaxError: {half}")
        if len(source) > MAX_CODE_BYTES:
            return Result("error", error=f"SyntaxError: more than {MAX_CODE_BYTES} bytes of code")
        try:
            async with self._one_at_a_time, turn(self._process.gate):
                return await self._timed(source)
        except asyncio.CancelledError:
            self._end("a call was cancelled")
            raise
        except SandboxUnavailable:
            self._end("the sandbox failed")
            raise

    async def close(self) -> None:
        self._end("it was closed")

    def on_end(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)
        self._news.set()

    def on_loss(self, reason: str) -> None:
        self._lost = reason
        self._hung_up = True
        self._news.set()
        if not self._busy:
            self._end("the sandbox failed")

    async def _timed(self, source: bytes) -> Result:
        if self._lost:
            raise SandboxUnavailable(f"jail: {self._lost}")
        if self._over:
            return over(self._over)
        start = time.perf_counter()
        self._busy = True
        try:
            status, error = await self._call(source)
        finally:
            self._busy = False
        return self._result(status, error, time.perf_counter() - start)

    async def _call(self, source: bytes) -> tuple[Status, str]:
        """What came of it.

        Raises:
            SandboxUnavailable: the zygote is gone.
        """
        if self._received:
            return "killed", "The process spoke before it was asked."
        nonce = secrets.token_bytes(16)
        self._timed_out = False
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout_s, self._on_time_out)
        try:
            self._signal(signal.SIGCONT)
            self._unsent = REQUEST.pack(nonce, len(source)) + source
            self._send()
            while (answer := self._answer(nonce)) is None and not self._hung_up:
                await self._next_news()
        finally:
            timer.cancel()
        if answer is not None:
            self._signal(signal.SIGSTOP)
            return answer
        if self._timed_out:
            return "timeout", out_of_time(self._timeout_s)
        return await self._cause_of_death()

    def _answer(self, nonce: bytes) -> tuple[Status, str] | None:
        """The process's answer, once it is complete."""
        if not self._is_answered():
            return None
        echoed, status, length = RESPONSE.unpack_from(self._received)
        if echoed != nonce or status >= len(STATUSES) or length > MAX_ERROR_BYTES:
            return "killed", "The process answered in a form of its own."
        text = bytes(self._received[RESPONSE.size : RESPONSE.size + length])
        del self._received[: RESPONSE.size + length]
        return STATUSES[status], text.decode("utf-8", "replace")

    def _is_answered(self) -> bool:
        """Whether an answer is there, or the beginning of what can be none."""
        if len(self._received) < RESPONSE.size:
            return False
        length: int = RESPONSE.unpack_from(self._received)[2]
        return length > MAX_ERROR_BYTES or len(self._received) >= RESPONSE.size + length

    async def _cause_of_death(self) -> tuple[Status, str]:
        if self._lost:
            raise SandboxUnavailable(f"jail: {self._lost}")
        if self._over:
            return "killed", over(self._over).error
        self._signal(signal.SIGKILL)  # it may only have closed its socket
        try:
            status = await asyncio.wait_for(asyncio.shield(self._ended), _END_S)
        except TimeoutError:
            return "killed", "The process hung up."
        if os.WIFEXITED(status):
            return "exit", f"The code ended the process with exit code {os.WEXITSTATUS(status)}."
        number = os.WTERMSIG(status)
        if number == signal.SIGXFSZ:
            return "output", ""
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return "killed", f"The process was ended by {name}."

    def _result(self, status: Status, error: str, wall_s: float) -> Result:
        """The result of a call, with what it printed; the session ends unless it may go on."""
        if self._over:
            return Result("killed", "", error, wall_s)
        size = os.fstat(self._output).st_size
        printed = os.pread(self._output, min(size, self._output_bytes), 0)
        os.ftruncate(self._output, 0)
        text = printed.decode("utf-8", "replace")
        if size >= self._output_bytes and status != "timeout":
            status = "output"
            error = f"The code printed more than {self._output_bytes} bytes and was stopped."
        if status not in ALIVE:
            self._end(OVER_AFTER[status])
        return Result(
            status,
            cut_middle(text, self._max_output_chars),
            cut_middle(error, self._max_output_chars),
            wall_s,
            truncated=len(text) > self._max_output_chars or size > self._output_bytes,
        )

    async def _next_news(self) -> None:
        await self._news.wait()
        self._news.clear()

    def _on_readable(self) -> None:
        if self._hung_up:
            return
        try:
            data = self._channel.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += data
        if not data or len(self._received) > RESPONSE.size + MAX_ERROR_BYTES:
            self._stop_listening()
        self._news.set()

    def _on_time_out(self) -> None:
        """Unless an answer waits to be read: then it is this process that was busy."""
        self._on_readable()
        if self._is_answered() or self._hung_up:
            return
        self._timed_out = True
        self._signal(signal.SIGKILL)
        self._stop_listening()
        self._news.set()

    def _send(self) -> None:
        """Write what the socket takes; the rest when it takes more."""
        loop, fd = asyncio.get_running_loop(), self._channel.fileno()
        try:
            self._unsent = self._unsent[self._channel.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""  # the reader hears of the end
        if self._unsent:
            loop.add_writer(fd, self._send)
        else:
            loop.remove_writer(fd)

    def _stop_listening(self) -> None:
        self._hung_up = True
        fd = self._channel.fileno()
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)
            asyncio.get_running_loop().remove_writer(fd)

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _end(self, reason: str) -> None:
        """Kill the process and let go of everything; the first reason stays."""
        if self._over:
            return
        self._over = reason
        self._stop_listening()
        self._channel.close()
        self._signal(signal.SIGKILL)
        self._close_descriptors()
        self._news.set()

    def _close_descriptors(self) -> None:
        descriptors = self._pidfd, self._output
        self._pidfd = self._output = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    def __del__(self) -> None:
        self._close_descriptors()
