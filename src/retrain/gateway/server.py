"""The HTTP server of the gateway: finds the session, translates, delivers.

A request is answered to its end even where its caller goes away: what was sampled is sampled. The
session is told of answers that did not arrive.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.gateway.ask import Reply, RequestRefused
from retrain.gateway.exchange import Exchange, closing
from retrain.gateway.http import (
    CallerGone,
    Request,
    Response,
    WrongMethod,
    api_key,
    check_method,
    json_response,
    make_server,
    place,
    read_body,
)
from retrain.gateway.session import Session, SessionBook
from retrain.gateway.wire import Dialect, anthropic, chat
from retrain.gateway.wire.errors import UPSTREAM_REFUSED, read_object, refusal_of
from retrain.gateway.wire.fields import mapping, wrong
from retrain.gateway.wire.responses import Responses
from retrain.types import UserError

log = logging.getLogger("retrain.gateway")

SESSION_HEADER = "X-Retrain-Session"
"""Names the session where the path does not."""
BACKLOG = 1024
"""Connections that the system accepts before the server does."""


class GatewayServer:
    """Serves a book of sessions.

    Args:
        port: 0 takes any that is free.
        models: names that `/v1/models` lists; requests may name any.
        max_body_mb: of a request, unpacked, in MiB; 413 beyond it.
        session_header: names the session where the path does not.
    """

    def __init__(
        self,
        book: SessionBook,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        models: Sequence[str] = ("policy",),
        max_body_mb: float = 64.0,
        session_header: str = SESSION_HEADER,
    ) -> None:
        self._book = book
        self._host = host
        self._port = port
        self._models = tuple(models)
        self._session_header = session_header
        self._most_bytes = int(max_body_mb * 2**20)
        self._dialects: dict[str, Dialect] = {
            "chat/completions": chat,
            "responses": Responses(),
            "messages": anthropic,
        }
        self._runner: Any = None
        self._answers: set[asyncio.Task[Reply]] = set()
        self._logged: set[str] = set()

    @property
    def url(self) -> str:
        """Without a path: `http://127.0.0.1:PORT`. Where it listens on all addresses, this
        machine's.

        Raises:
            RuntimeError: before `start`.
        """
        if self._runner is None:
            raise RuntimeError("the gateway has not started")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self._runner.addresses[0][1]}"

    async def start(self) -> None:
        """
        Raises:
            UserError: aiohttp is not installed, or the address cannot be listened on.
        """
        try:
            from aiohttp import web
        except ImportError:
            raise UserError(
                "the gateway needs aiohttp, which is not installed",
                "Install it: pip install 'retrain[gateway]'",
            ) from None
        runner = web.ServerRunner(make_server(self._handle), shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port, backlog=BACKLOG).start()
        except OSError as error:
            await runner.cleanup()
            raise UserError(
                f"the gateway cannot listen on {self._host}:{self._port}: {error.strerror}",
                "Choose another address or port; port 0 takes any that is free.",
            ) from None
        self._runner = runner

    async def close(self) -> None:
        """Stop. What is still being answered is cancelled, and refused with 503."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        answers = list(self._answers)
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        await runner.cleanup()

    async def _handle(self, request: Request) -> Response:
        dialect: Dialect = chat
        try:
            name, endpoint = place(request.rel_url.raw_path)
            dialect = self._dialects.get(endpoint.partition("/")[0], chat)
            name = name or self._session_named(request)
            return await self._route(request, name, endpoint)
        except CallerGone:
            return json_response({}, 499)
        except Exception as error:
            refused = self._refused(error)
            headers = {}
            passing = refused.status >= 500 or refused.status in (408, 429)
            if not passing or refused.code == UPSTREAM_REFUSED:
                headers["x-should-retry"] = "false"
            if isinstance(refused, WrongMethod):
                headers["Allow"] = refused.allowed
            return json_response(dialect.refusal(refused), refused.status, headers)

    async def _route(self, request: Request, name: str | None, endpoint: str) -> Response:
        if endpoint == "health":
            check_method(request, "GET, HEAD")
            return json_response({"status": "ok"})
        key = api_key(request.headers)
        kind, _, model = endpoint.partition("/")
        if kind == "models":
            check_method(request, "GET, HEAD")
            self._book.check(name=name, key=key)
            return json_response(self._listing(model))
        if endpoint not in self._dialects and endpoint != "reward":
            raise RequestRefused(f"there is nothing at {request.rel_url.raw_path}", status=404)
        check_method(request, "POST")
        self._book.check(name=name, key=key)
        body = read_object(await read_body(request, self._most_bytes))
        if endpoint == "reward":
            return _noted(self._book.find(name=name, key=key), body)
        dialect = self._dialects[endpoint]
        headers = request.headers
        if name is not None:
            headers = headers.copy()
            headers[SESSION_HEADER] = name
        ask = dialect.read(body, headers)
        if self._runner is None:
            raise closing()
        session = self._book.find(name=name, key=key)  # it may have ended while the body came
        exchange = Exchange(request, session, dialect, ask, self._refused)
        self._answers.add(exchange.answering)
        exchange.answering.add_done_callback(self._answers.discard)
        return await exchange.respond()

    def _session_named(self, request: Request) -> str | None:
        """
        Raises:
            RequestRefused: the header is not UTF-8.
        """
        name: str | None = request.headers.get(self._session_header) or None
        try:
            (name or "").encode()
        except UnicodeEncodeError:
            raise RequestRefused(f"{self._session_header} is not UTF-8") from None
        return name

    def _refused(self, error: Exception) -> RequestRefused:
        """What to tell of a failure. One of no known kind is logged, the first of its type with
        where it came from; the caller is told its type alone."""
        refused = refusal_of(error)
        if refused is not None:
            return refused
        kind = type(error).__name__
        if kind in self._logged:
            log.error("a request failed again: %s", kind)
        else:
            self._logged.add(kind)
            log.error("a request failed: %s", kind, exc_info=error)
        return RequestRefused(f"the gateway failed: {kind}", status=500)

    def _listing(self, model: str) -> dict[str, Any]:
        """All models, or one; what OpenAI's and Anthropic's clients read, in one object.

        Raises:
            RequestRefused: 404, there is no such model.
        """
        entries = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "retrain",
                "type": "model",
                "display_name": name,
                "created_at": "1970-01-01T00:00:00Z",
            }
            for name in self._models
        ]
        if not model:
            first, last = (self._models[0], self._models[-1]) if entries else (None, None)
            ends = {"has_more": False, "first_id": first, "last_id": last}
            return {"object": "list", "data": entries, **ends}
        for entry in entries:
            if entry["id"] == model:
                return entry
        raise RequestRefused(
            f"there is no model {model!r}; there is {', '.join(self._models)}",
            status=404,
            code="model_not_found",
            param="model",
        )


def _noted(session: Session, body: Mapping[str, Any]) -> Response:
    for key in body:
        if key not in ("reward", "metadata"):
            raise RequestRefused(f"unknown key {key!r}; there are reward, metadata", param=key)
    if not body:
        raise RequestRefused("there is neither a reward nor metadata", param="reward")
    reward, metadata = body.get("reward"), body.get("metadata")
    if reward is not None:
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise wrong("reward", "a number or null", reward)
        if not abs(reward) <= sys.float_info.max:
            raise wrong("reward", "finite", reward)
    session.note(reward, mapping({} if metadata is None else metadata, "metadata"))
    return json_response({"status": "ok"})
