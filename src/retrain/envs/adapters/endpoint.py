"""An OpenAI-compatible chat endpoint on this machine, answered by the policy."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from retrain.envs.adapters.chat import ChatRecorder, Wire
from retrain.types import Turn, UserError

SECRET_HEADER = "X-Retrain-Secret"
MOST_BYTES = 2**30
"""Of a request: a conversation grows with its turns."""


class ContextFull(Exception):
    """The conversation was cut by the context limit already; there is no further turn."""


class Seat:
    """One harness's place at the endpoint.

    Args:
        recorder: answers it.
        failed: gets the first exception that is not the harness's own business.
    """

    def __init__(self, recorder: ChatRecorder, failed: asyncio.Future[None]) -> None:
        self.recorder = recorder
        self._failed = failed
        self.last: Turn | None = None
        """Of what was answered."""

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion.

        Raises:
            ContextFull: see there.
            UserError, InfrastructureError: as `ChatRecorder.answer`; `failed` has it too.
        """
        if self.last is not None and self.last.finish_reason == "context":
            raise ContextFull("the conversation is as long as the context limit allows")
        try:
            _check(body)
            wire, turn = await self.recorder.answer(body["messages"], body.get("tools") or ())
        except Exception as error:
            if not self._failed.done():
                self._failed.set_exception(error)
            raise
        self.last = turn
        return _completion(wire, turn)


def _check(body: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: it asks for what the policy cannot give.
    """
    if body.get("stop"):
        raise UserError(
            f"the environment asks for stop strings {body['stop']!r}",
            "A policy ends its turns itself; remove them.",
        )


def _completion(wire: Wire, turn: Turn) -> dict[str, Any]:
    reason = "tool_calls" if wire.get("tool_calls") else "stop"
    if turn.finish_reason in ("length", "context"):
        reason = "length"
    prompt = turn.prompt.prefix_len + len(turn.prompt.token_ids)
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "policy",
        "choices": [{"index": 0, "message": dict(wire), "finish_reason": reason}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": len(turn.token_ids),
            "total_tokens": prompt + len(turn.token_ids),
        },
    }


def _events(completion: Mapping[str, Any]) -> bytes:
    """A completion as the server-sent events of one that is streamed, all at once."""
    choice = completion["choices"][0]
    delta = dict(choice["message"])
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    head = {k: completion[k] for k in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk"
    end = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**head, "choices": [end], "usage": completion["usage"]},
    ]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


class Endpoint:
    """Serves the seats, each known by a header's value; reachable from this machine, with the
    secret.

    Args:
        header: names the seat.
    """

    def __init__(self, header: str) -> None:
        self._header = header
        self._runner: Any = None
        self.secret = secrets.token_urlsafe(24)
        self.seats: dict[str, Seat] = {}
        self.url = ""
        """Of the API, from `start` on."""

    async def start(self) -> None:
        from aiohttp import web

        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _chat(self, request: Any) -> Any:
        from aiohttp import web

        if not self._knows(request):
            return _refusal("unknown caller", 401)
        seat = self.seats.get(request.headers.get(self._header, ""))
        if seat is None:
            return _refusal("there is no such rollout, or it is over", 400)
        body = await request.json()
        try:
            completion = await seat.complete(body)
        except ContextFull as error:
            return _refusal(str(error), 400, "context_length_exceeded")
        except Exception as error:  # the rollout ends with it; here it only must not be asked again
            return _refusal(f"{type(error).__name__}: {error}", 400)
        if body.get("stream"):
            return web.Response(body=_events(completion), content_type="text/event-stream")
        return web.json_response(completion)

    async def _models(self, request: Any) -> Any:
        from aiohttp import web

        if not self._knows(request):
            return _refusal("unknown caller", 401)
        return web.json_response({"object": "list", "data": [{"id": "policy", "object": "model"}]})

    def _knows(self, request: Any) -> bool:
        return secrets.compare_digest(request.headers.get(SECRET_HEADER, ""), self.secret)


def _refusal(message: str, status: int, code: str | None = None) -> Any:
    from aiohttp import web

    error = {"message": message, "type": "invalid_request_error", "code": code}
    return web.json_response({"error": error}, status=status)
