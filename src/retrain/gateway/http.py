"""What the gateway needs of HTTP and aiohttp: paths, keys, bodies, and whether they arrive."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

from retrain.gateway.ask import RequestRefused
from retrain.gateway.wire.errors import openai_body

Request = Any
"""aiohttp's `BaseRequest`: it is imported late."""
Response = Any
"""aiohttp's `StreamResponse`."""

QUIET = logging.Logger("retrain.gateway.http", logging.CRITICAL + 1)
"""For aiohttp, whose messages quote malformed headers, and so keys."""

EVENT_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


IDLE_S = 300.0
"""A connection without a request is closed after it; clients let go of theirs sooner."""


def make_server(handle: Callable[[Request], Awaitable[Response]]) -> Any:
    """aiohttp's server, but what it cannot read as HTTP is answered in OpenAI's shape."""
    from aiohttp import web

    class Protocol(web.RequestHandler):
        __slots__ = ()

        def handle_error(
            self,
            request: Request,
            status: int = 500,
            exc: BaseException | None = None,
            message: str | None = None,
        ) -> Response:
            refused = RequestRefused("this cannot be read as an HTTP request", status=status)
            response = json_response(openai_body(refused), status)
            response.force_close()
            return response

    class Server(web.Server):
        def __call__(self) -> Protocol:
            loop = asyncio.get_running_loop()
            return Protocol(
                self, loop=loop, access_log=QUIET, logger=QUIET, keepalive_timeout=IDLE_S
            )

    return Server(handle)


class CallerGone(Exception):
    """Nobody reads the answer."""


class WrongMethod(RequestRefused):
    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"{method} is not possible here; {allowed} is", status=405)
        self.allowed = allowed


def check_method(request: Request, allowed: str) -> None:
    """
    Raises:
        WrongMethod: the request's is not among `allowed`, which are separated by commas.
    """
    if request.method not in allowed.split(", "):
        raise WrongMethod(request.method, allowed)


def place(path: str) -> tuple[str | None, str]:
    """The session that a path names, and the rest without `/v1`.

    Clients that add `/v1` to a URL that has it, or miss it, get there too.

    Raises:
        RequestRefused: 404, the name is empty; 400, an escape is not UTF-8.
    """
    pieces = path.lstrip("/").split("/")
    name = None
    if len(pieces) > 1 and pieces[0] == "sessions":
        if not pieces[1]:
            raise RequestRefused("the path names no session", status=404)
        name, pieces = _unescaped(pieces[1]), pieces[2:]
    parts = [_unescaped(piece) for piece in pieces if piece]
    while parts and parts[0] == "v1":
        parts = parts[1:]
    return name, "/".join(parts)


def _unescaped(piece: str) -> str:
    try:
        return unquote(piece, errors="strict")
    except UnicodeDecodeError:
        raise RequestRefused("the path has an escape that is not UTF-8") from None


def api_key(headers: Mapping[str, str]) -> str | None:
    """`x-api-key`, else the bearer token: clients fill the latter in where they know no key."""
    key = headers.get("x-api-key", "").strip()
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if not key and scheme.lower() == "bearer":
        key = token.strip()
    return key or None


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body, unpacked.

    Raises:
        RequestRefused: it is larger than is allowed, which is said before it is read where its
            length is given; or it is not packed as it says.
        CallerGone: it ends before its end.
    """
    from aiohttp import web

    too_large = RequestRefused(f"the body is larger than {most_bytes / 2**20:g} MiB", status=413)
    if (request.content_length or 0) > most_bytes:
        raise too_large
    if request.headers.get("Expect", "").lower() == "100-continue":
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    blocks, size = [], 0
    try:
        while block := await request.content.readany():
            blocks.append(block)
            size += len(block)
            if size > most_bytes:
                raise too_large
    except (web.RequestPayloadError, ConnectionError):
        if gone(request):
            raise CallerGone from None
        raise RequestRefused("the body is cut short, or not packed as it says") from None
    return b"".join(blocks)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    from aiohttp import web

    body = json.dumps(value, separators=(",", ":")).encode()
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def event_response(body: bytes, headers: Mapping[str, str]) -> Response:
    """A stream that is sent as a whole."""
    from aiohttp import web

    return web.Response(body=body, headers={**EVENT_HEADERS, **headers})


async def deliver(request: Request, response: Response) -> bool:
    """Whether the caller was still there. What a network lost on the way is not seen."""
    there = await sent(response.prepare(request)) and await sent(response.write_eof())
    return there and not gone(request)


async def sent(sending: Awaitable[Any]) -> bool:
    try:
        await sending
    except ConnectionError:
        return False
    return True


def gone(request: Request) -> bool:
    return request.transport is None or request.transport.is_closing()
