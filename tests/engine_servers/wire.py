"""HTTP around a dialect: routes, hang-ups, knobs, and a record of what was asked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import select
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from engine_servers.knobs import KnobFile, Knobs

POLL_S = 0.05
"""How often a waiting answer looks whether its client hung up."""


@dataclass(frozen=True)
class Call:
    """A request, parsed."""

    query: dict[str, str]
    body: Any
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: Any = None
    """JSON, or text or nothing as it is."""
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[[Call], Awaitable[Answer]]
Routes = dict[tuple[str, str], Handler]
"""Handlers by method and path."""


class Dialect:
    """What the paths of a server mean."""

    generating: frozenset[str] = frozenset()
    """Paths that generate: those that fail, are dropped and counted."""

    def routes(self) -> Routes:
        raise NotImplementedError

    def without(self, answer: Any, name: str) -> Any:
        """An answer that lacks a field."""
        raise NotImplementedError

    def failure(self, message: str) -> Any:
        """The body of a 500."""
        raise NotImplementedError


class Wire:
    """Serves a dialect whose handlers run in `loop`; see `EngineServer`."""

    def __init__(
        self,
        dialect: Dialect,
        knobs: Knobs,
        loop: asyncio.AbstractEventLoop,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        knob_file: KnobFile | None = None,
        may_die: bool = False,
    ) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.generating = 0
        self.peak = 0
        self.hung_up = threading.Event()
        self.dialect = dialect
        self.routes = dialect.routes()
        self.knobs = knobs
        self.knob_file = knob_file
        self.loop = loop
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.started = 0
        self.may_die = may_die
        self.http = _Http((host, port), _Handler)
        self.http.wire = self
        self.port: int = self.http.server_address[1]

    def serve(self) -> None:
        self.http.serve_forever(0.02)

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def paths(self) -> dict[str, Any]:
        """What `/openapi.json` says is served."""
        found: dict[str, Any] = {}
        for method, path in self.routes:
            if path not in self.knobs.missing:
                found.setdefault(path, {})[method.lower()] = {"responses": {"200": {}}}
        return {"openapi": "3.1.0", "info": {"title": "FastAPI"}, "paths": found}

    def misbehave(self) -> Answer | None:
        """What a generation request gets by the knobs; None leaves it to the dialect.

        Raises:
            ConnectionError: nothing.
        """
        with self.lock:
            self.started += 1
            if self.knobs.die_after is not None and self.started > self.knobs.die_after:
                assert self.may_die, "die_after ends a process: start the server as its own"
                if self.knob_file is not None:
                    self.knob_file.forget("die_after")
                os._exit(1)
            if self.knobs.fail_next > 0:
                self.knobs.fail_next -= 1
                return Answer(500, self.dialect.failure("told to fail"))
            if self.knobs.drop_next > 0:
                self.knobs.drop_next -= 1
                raise ConnectionError
        return None


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    wire: Wire


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        wire = self.server.wire
        parts = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if wire.knob_file is not None:
            wire.knob_file.read()
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = raw.decode("utf-8", "replace")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        with wire.lock:
            if parts.path not in ("/knobs", "/recorded"):
                wire.requests.append((parts.path, body))
                wire.headers.append(headers)
        try:
            self._send(self._answer(method, parts.path, Call(query, body, headers)))
        except (OSError, concurrent.futures.CancelledError):
            wire.hung_up.set()
            self.close_connection = True

    def _answer(self, method: str, path: str, call: Call) -> Answer:
        wire = self.server.wire
        if path == "/knobs":
            wire.knobs.update(call.body)
            return Answer(body=vars(wire.knobs))
        if path == "/recorded":
            return Answer(body={"requests": wire.requests, "peak": wire.peak})
        while wire.knobs.hang:
            self._look_for_a_client(POLL_S)
        if path in wire.knobs.missing:
            return Answer(404, {"detail": "Not Found"})
        if (method, path) == ("GET", "/openapi.json"):
            return Answer(body=wire.paths())
        handler = wire.routes.get((method, path))
        if handler is None:
            known = any(path == other for _, other in wire.routes)
            detail = "Method Not Allowed" if known else "Not Found"
            return Answer(405 if known else 404, {"detail": detail})
        if path not in wire.dialect.generating:
            return self._run(handler, call)
        if (answer := wire.misbehave()) is not None:
            return answer
        return self._generate(handler, call)

    def _generate(self, handler: Handler, call: Call) -> Answer:
        wire = self.server.wire
        with wire.lock:
            wire.generating += 1
            wire.peak = max(wire.peak, wire.generating)
        try:
            answer = self._run(handler, call)
        finally:
            with wire.lock:
                wire.generating -= 1
        if wire.knobs.drop_field is None or answer.status != 200:
            return answer
        return Answer(200, wire.dialect.without(answer.body, wire.knobs.drop_field))

    def _run(self, handler: Handler, call: Call) -> Answer:
        """Run a handler in the loop, unless the client hangs up first."""
        wire = self.server.wire
        future = asyncio.run_coroutine_threadsafe(_awaited(handler(call)), wire.loop)
        while True:
            try:
                return future.result(POLL_S)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
                try:
                    self._look_for_a_client(0)
                except OSError:
                    future.cancel()
                    raise
            except (concurrent.futures.CancelledError, OSError):
                raise
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                return Answer(500, wire.dialect.failure(message))

    def _look_for_a_client(self, wait_s: float) -> None:
        """
        Raises:
            ConnectionError: it hung up, or the server closes.
        """
        if self.server.wire.closing.is_set():
            raise ConnectionError
        readable = select.select([self.connection], [], [], wait_s)[0]
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError

    def _send(self, answer: Answer) -> None:
        if isinstance(answer.body, str) or answer.body is None:
            body, kind = (answer.body or "").encode(), "text/plain"
        else:
            body, kind = json.dumps(answer.body).encode(), "application/json"
        self.send_response(answer.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


async def _awaited(waiting: Awaitable[Answer]) -> Answer:
    return await waiting
