"""How a server is reached: a process on this machine, or an address."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shlex
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlsplit

TAIL_LINES, TAIL_LINE_CHARS = 12, 400
"""What is kept of a server's standard error."""

CONNECT_S = 30.0
"""To connect to an address and to send a request; an answer may take as long as the call may."""

LAUNCH = Path(__file__).with_name("launch.py")


class Tail:
    """The last lines that a server wrote to its standard error."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader: threading.Thread | None = None

    @contextmanager
    def pipe(self) -> Iterator[TextIO]:
        """What to give a process as its standard error; close it once the process has it."""
        reading, writing = os.pipe()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()
        with os.fdopen(writing, "w") as stream:
            yield stream

    async def settle(self) -> None:
        """Wait, briefly, for what a process that ended has written."""
        for _ in range(50):
            if self._reader is None or not self._reader.is_alive():
                return
            await asyncio.sleep(0.01)

    def __str__(self) -> str:
        return "\n".join(self._lines)

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as stream:
            for line in iter(functools.partial(stream.readline, TAIL_LINE_CHARS), ""):
                if line.strip():
                    self._lines.append(line.rstrip())


class Link(Protocol):
    @property
    def label(self) -> str:
        """What a message calls the server."""
        ...

    def transport(self, tail: Tail) -> AbstractAsyncContextManager[Any]:
        """The SDK's transport, of one connection."""
        ...


@dataclass(frozen=True)
class Process:
    """A server that is started, and speaks over its standard input and output.

    Of this process's environment it gets what the SDK deems safe (PATH, HOME and the like). Where
    the kernel can (Linux) it ends with this process, however that ends.
    """

    command: str
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None

    @property
    def label(self) -> str:
        return f"`{shlex.join([self.command, *self.args])}`"

    @asynccontextmanager
    async def transport(self, tail: Tail) -> AsyncIterator[Any]:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        hush()
        command = [self.command, *self.args]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", str(LAUNCH), *command]
        server = StdioServerParameters(
            command=command[0],
            args=command[1:],
            env=dict(self.env),
            cwd=self.cwd,
            encoding_error_handler="replace",
        )
        with tail.pipe() as errors:
            async with stdio_client(server, errlog=errors) as streams:
                errors.close()
                yield streams


@dataclass(frozen=True)
class Address:
    """A server that runs already: streamable HTTP, or the older SSE."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    sse: bool = False

    @property
    def label(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @asynccontextmanager
    async def transport(self, tail: Tail) -> AsyncIterator[Any]:
        import httpx2
        from mcp.client.sse import sse_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        hush()
        timeout = httpx2.Timeout(CONNECT_S, read=None)
        if self.sse:
            async with sse_client(
                self.url, dict(self.headers), timeout=CONNECT_S, sse_read_timeout=1e9
            ) as streams:
                yield streams
            return
        async with (
            create_mcp_http_client(dict(self.headers), timeout) as client,
            streamable_http_client(self.url, http_client=client) as streams,
        ):
            yield streams


def hush() -> None:
    """Keep the SDK's tracebacks off the terminal (a server that prints to its standard output
    makes one a line), unless somebody has set a level: what they tell comes as a typed error."""
    for name in ("mcp.client", "mcp.shared"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
