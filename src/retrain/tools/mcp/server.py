"""A server as it is used: connected, asked, and connected again when it was lost.

Everything here runs in the background loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from retrain.tools.base import ModelError, ToolError
from retrain.tools.mcp.background import background
from retrain.tools.mcp.link import Address, Link, Tail
from retrain.types import InfrastructureError

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult
    from mcp.types import Tool as RemoteTool

CLOSE_S = 7.0
"""For a connection to close: the SDK gives a process 2 s to end by itself, then 2 s after SIGTERM,
then 2 s after SIGKILL."""

PROBE_S = 5.0
"""For a server to answer after a call was given up or failed."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Before a restart; the wait doubles each time."""

logger = logging.getLogger(__name__)


class NotConnected(Exception):
    """No connection could be made. `words`: what the server last wrote to its standard error."""

    def __init__(self, cause: str, words: str = "") -> None:
        super().__init__(cause)
        self.words = words


class Connection:
    """One connection, held open by a task of its own from `open` until `end`."""

    def __init__(self, link: Link) -> None:
        self.tail = Tail()
        self.tools: Sequence[RemoteTool] = ()
        self.client: Client
        self.watch: asyncio.Task[None] | None = None
        self._link = link
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._owner = background().spawn(self._hold())
        background().before_exit(self._ended)
        self._owner.add_done_callback(lambda _: background().no_longer(self._ended))

    @classmethod
    async def open(cls, link: Link, timeout_s: float) -> Connection:
        """Start or reach the server, and list its tools.

        Raises:
            NotConnected: it ended, refused, or has not answered by then; nothing is left of it.
        """
        connection = cls(link)
        ready = asyncio.ensure_future(connection._ready.wait())
        try:
            await asyncio.wait(
                {ready, connection._owner}, timeout=timeout_s, return_when="FIRST_COMPLETED"
            )
        except BaseException:
            await connection._ended()
            raise
        finally:
            ready.cancel()
        if connection._ready.is_set():
            return connection
        raise await connection._not_connected(timeout_s)

    def end(self) -> asyncio.Task[None]:
        """Begin to close; the task is done when nothing is left."""
        if self._ending is None:
            self._ending = background().spawn(self._end())
        return self._ending

    async def answers(self) -> bool:
        """Whether the server reacts to a request at all."""
        try:
            async with asyncio.timeout(PROBE_S):
                await self.client.list_tools(cache_mode="bypass")
        except Exception:
            return False
        return True

    async def _ended(self) -> None:
        await asyncio.wait({self.end()})

    async def _hold(self) -> None:
        from mcp import Client

        async with Client(self._link.transport(self.tail), cache=None) as client:
            self.client = client
            self.tools = await _all_tools(client)
            self._ready.set()
            await self._stop.wait()

    async def _end(self) -> None:
        self._stop.set()
        if not self._ready.is_set():
            self._owner.cancel()
        await asyncio.wait({self._owner}, timeout=CLOSE_S)
        if not self._owner.done():
            self._owner.cancel()
            await asyncio.wait({self._owner}, timeout=CLOSE_S)

    async def _not_connected(self, timeout_s: float) -> NotConnected:
        late = not self._owner.done()
        await self.end()
        await self.tail.settle()
        if late or self._owner.cancelled():
            return NotConnected(f"gave no answer within {timeout_s:g} s", str(self.tail))
        error = _first(self._owner.exception())
        return NotConnected(f"could not be connected to: {_describe(error)}", str(self.tail))


class Server:
    """Calls of a server's tools, over one connection at a time.

    A connection that broke, and one over which the server no longer answers once a call was given
    up, is closed; the next call makes another, `restarts` times at most, after a wait.
    """

    def __init__(
        self, link: Link, *, start_timeout_s: float, restarts: int, stateful: bool = False
    ) -> None:
        """`stateful`: once it has answered a call, no other process can stand in for it."""
        self._link = link
        self._stateful = stateful
        self._has_state = False
        self._start_timeout_s = start_timeout_s
        self._restarts = restarts
        self._starts = 0
        self._connection: Connection | None = None
        self._opening: asyncio.Task[Connection] | None = None
        self._closed = False
        self._lost = "was not started"

    async def list_tools(self) -> Sequence[RemoteTool]:
        """Its tools, as of the last start.

        Raises:
            NotConnected: it could not be started or reached.
        """
        return (await self._connected()).tools

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def connect(self) -> None:
        """Have a connection, where there is none (any more).

        Raises:
            InfrastructureError: there will be none.
        """
        await self._reached()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> CallToolResult:
        """Call a tool; to cancel this cancels the call at the server.

        Raises:
            ModelError: the server refused the arguments.
            ToolError: it answered with an error of the protocol, or with what is no result.
            InfrastructureError: there is no connection, or it broke.
        """
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, INVALID_PARAMS

        connection = await self._reached()
        try:
            result = await connection.client.call_tool(name, dict(arguments))
            self._has_state = self._stateful
            return result
        except asyncio.CancelledError:
            self._look_after(connection)
            raise
        except MCPError as error:
            if error.code == INVALID_PARAMS:
                raise ModelError(str(error)) from error
            if not await connection.answers():
                raise await self._broken(connection, f"broke off: {error}") from error
            if error.code == CONNECTION_CLOSED and isinstance(self._link, Address):
                # the stream of this call ended, but not the session
                raise InfrastructureError(self._say(f"gave no result: {error}")) from error
            self._has_state = self._stateful
            raise ToolError(str(error)) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ToolError(
                f"the result is none of the protocol: {where}: {first['msg']}"
            ) from error
        except RuntimeError as error:  # structured content that its schema does not admit
            raise ToolError(str(error)) from error
        except Exception as error:
            raise await self._broken(connection, f"broke off: {_describe(error)}") from error

    async def close(self) -> None:
        """End it; calls under way fail."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.shield(connection.end())

    async def _reached(self) -> Connection:
        try:
            return await self._connected()
        except NotConnected as error:
            raise InfrastructureError(self._say(str(error), error.words)) from error

    async def _connected(self) -> Connection:
        if self._closed:
            raise NotConnected("is closed")
        if self._connection is not None:
            return self._connection
        if self._opening is None:
            self._opening = background().spawn(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> Connection:
        try:
            if self._has_state:
                raise NotConnected(f"{self._lost}; its state is lost with it")
            if self._starts > self._restarts:
                raise NotConnected(f"{self._lost}; its {self._restarts} restarts are used up")
            if self._starts > 0:
                wait_s = FIRST_WAIT_S * 2 ** min(self._starts - 1, 16)
                await asyncio.sleep(min(wait_s, LONGEST_WAIT_S))
            self._starts += 1
            self._connection = await self._start()
            return self._connection
        finally:
            self._opening = None

    async def _start(self) -> Connection:
        try:
            return await Connection.open(self._link, self._start_timeout_s)
        except NotConnected as error:
            self._lost = str(error)
            raise

    def _look_after(self, connection: Connection) -> None:
        """A call was given up: see whether the server is there for the others."""

        async def watch() -> None:
            if not await connection.answers() and self._connection is connection:
                logger.warning("MCP server %s no longer answers: it is ended", self._link.label)
                await self._broken(connection, "no longer answered")

        if connection.watch is None or connection.watch.done():
            connection.watch = background().spawn(watch())

    async def _broken(self, connection: Connection, cause: str) -> InfrastructureError:
        if self._connection is connection:
            self._connection = None
            self._lost = cause
        await asyncio.wait({connection.end()}, timeout=1.0)
        await connection.tail.settle()
        return InfrastructureError(self._say(cause, str(connection.tail)))

    def _say(self, cause: str, words: str = "") -> str:
        return f"MCP server {self._link.label} {cause}" + (f"\n{words}" if words else "")


async def _all_tools(client: Client) -> list[RemoteTool]:
    tools: list[RemoteTool] = []
    cursor = None
    while True:
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            return tools


def _first(error: BaseException | None) -> BaseException | None:
    """The first that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _describe(error: BaseException | None) -> str:
    return "it ended" if error is None else str(error) or type(error).__name__
