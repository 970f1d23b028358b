"""One request and its answer: waits for the session, delivers, and tells it what did not arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from retrain.gateway.ask import Ask, Reply, RequestRefused
from retrain.gateway.http import (
    EVENT_HEADERS,
    Request,
    Response,
    deliver,
    event_response,
    gone,
    json_response,
    sent,
)
from retrain.gateway.session import Session
from retrain.gateway.wire import Dialect, sse

NOT_ENFORCED_HEADER = "X-Retrain-Not-Enforced"
HEADERS_AFTER_S = 1.0
"""A stream's status is sent once this has passed, or there is an answer: what is refused at once
still has a status of its own, by which clients tell what to do."""
ALIVE_EVERY_S = 10.0
"""Between the comments of a stream that waits."""


class Exchange:
    """
    Args:
        tell: turns a failure into what the caller is told.
    """

    def __init__(
        self,
        request: Request,
        session: Session,
        dialect: Dialect,
        ask: Ask,
        tell: Callable[[Exception], RequestRefused],
    ) -> None:
        self._request = request
        self._session = session
        self._dialect = dialect
        self._ask = replace(ask, gone=lambda: gone(request))
        self._tell = tell
        self._lost = False
        self.answering = asyncio.ensure_future(self._answer())
        """Goes on where the caller goes away or its handler is cancelled."""

    async def _answer(self) -> Reply:
        """The session hears that its caller is gone before anything else runs: a second attempt of
        the caller may wait for its turn already."""
        reply = await self._session.answer(self._ask)
        if gone(self._request):
            self._lose(reply)
        return reply

    def _lose(self, reply: Reply) -> None:
        if not self._lost:
            self._lost = True
            self._session.undelivered(reply)

    async def respond(self) -> Response:
        """The response, sent already.

        Raises:
            Exception: of the session, where nothing is sent yet; or the answer cannot be written
                in its dialect, and so is not kept for who asks again.
        """
        patience = HEADERS_AFTER_S if self._ask.stream else None
        await asyncio.wait((self.answering,), timeout=patience)
        if not self.answering.done():
            return await self._respond_late()
        reply = self._outcome()
        headers = {}
        if reply.not_enforced:
            headers[NOT_ENFORCED_HEADER] = ", ".join(reply.not_enforced)
        if self._ask.stream:
            response = event_response(self._events(reply), headers)
        else:
            response = json_response(self._dialect.write(reply, self._ask), 200, headers)
        arrived = False
        try:
            arrived = await deliver(self._request, response)
        finally:
            if not arrived:
                self._lose(reply)
        return response

    async def _respond_late(self) -> Response:
        """A stream whose answer takes its time: headers, comments until it is there, the answer."""
        from aiohttp import web

        response = web.StreamResponse(headers=EVENT_HEADERS)
        there = await sent(response.prepare(self._request))
        while not self.answering.done():
            if there:
                there = await sent(response.write(sse.WAITING))
            await asyncio.wait((self.answering,), timeout=ALIVE_EVERY_S if there else None)
        reply = None
        try:
            reply = self._outcome()
            block = self._events(reply)
            if reply.not_enforced:
                block = f": not enforced: {', '.join(reply.not_enforced)}\n\n".encode() + block
        except Exception as error:
            block = self._dialect.refusal_event(self._tell(error))
        arrived = there and await sent(response.write(block)) and await sent(response.write_eof())
        if reply is not None and (not arrived or gone(self._request)):
            self._lose(reply)
        return response

    def _events(self, reply: Reply) -> bytes:
        return b"".join(self._dialect.events(reply, self._ask))

    def _outcome(self) -> Reply:
        if self.answering.cancelled():
            raise closing()
        return self.answering.result()


def closing() -> RequestRefused:
    return RequestRefused("the gateway is closing", status=503)
