"""An MCP server on the SDK's own classes, to be run as a script: good tools, and bad ways.

`python mcp_servers.py MODE [PORT]`: `stdio`, `http`, `sse`, or `junk`: stdio among other output.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.exceptions import MCPError
from mcp.types import (
    INVALID_PARAMS,
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)
from pydantic import BaseModel

server = MCPServer("test")
cancelled: list[str] = []


class Place(BaseModel):
    name: str
    height_m: float


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add two integers."""
    return a + b


@server.tool(name="say.echo")
def echo(text: str, times: list[int] | None = None) -> str:
    """Say it again."""
    return f"{text} {times}" if times else text


@server.tool()
def fail(reason: str) -> str:
    """Always fails."""
    raise RuntimeError(reason)


@server.tool()
def refuse() -> str:
    """Refuses all arguments, by the protocol."""
    raise MCPError(INVALID_PARAMS, "not with these")


@server.tool()
def protest() -> str:
    """Fails by the protocol."""
    raise MCPError(-32000, "out of order")


@server.tool()
def place() -> CallToolResult:
    """Structured content only."""
    return CallToolResult(content=[], structured_content={"name": "Säntis", "height_m": 2501.9})


@server.tool()
def measured() -> Place:
    """Structured content, and its text."""
    return Place(name="Rigi", height_m=1797.5)


@server.tool()
def things() -> CallToolResult:
    """One of each kind."""
    return CallToolResult(
        content=[
            TextContent(text="first"),
            ImageContent(data="AAAAAAAA", mime_type="image/png"),
            ResourceLink(name="r", uri="file:///r.txt"),
            EmbeddedResource(
                resource=TextResourceContents(uri="file:///t.txt", text="inside the resource")
            ),
            EmbeddedResource(
                resource=BlobResourceContents(
                    uri="file:///b.bin", blob="AAAA", mime_type="application/pdf"
                )
            ),
        ]
    )


@server.tool()
def nothing() -> None:
    """No result."""


@server.tool()
async def hang(context: Context) -> str:
    """Never answers."""
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        cancelled.append("hang")
        raise
    return ""


@server.tool()
async def how_many_cancelled() -> int:
    """Calls of hang that were cancelled."""
    return len(cancelled)


@server.tool()
async def die(marker: str = "") -> str:
    """Ends the server, unless the marker is there already."""
    if marker and Path(marker).exists():
        return "survived"
    if marker:
        Path(marker).write_text("died")
    print("dying as told", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
async def process_id() -> int:
    """Of the server."""
    return os.getpid()


@server.tool()
async def variable(name: str) -> str:
    """An environment variable."""
    return os.environ.get(name, "(unset)")


@server.tool()
async def header(name: str, context: Context) -> str:
    """A header of the request."""
    headers = context.headers or {}
    return headers.get(name.lower(), "(none)")


def main(mode: str, *rest: str) -> None:
    if mode == "junk":
        for line in ("Welcome!", "", '{"half": ', "[1, 2]"):
            print(line, flush=True)
        for _ in range(1000):
            print("chatter " * 50, file=sys.stderr)
        server.run()
    elif mode == "http":
        server.run("streamable-http", port=int(rest[0]))
    elif mode == "sse":
        server.run("sse", port=int(rest[0]))
    else:
        server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
