"""Sessions of the gateway whose answers are prescribed, and its server around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai

from retrain.gateway.ask import Ask, Choice, Reply, RequestRefused, TokenLogprob
from retrain.gateway.server import GatewayServer

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
QUESTION = ({"role": "user", "content": "2 + 3?"},)


def said(
    content: str | None = "It is five.",
    *,
    calls: Sequence[tuple[str, str, str]] = (),
    reasoning: str = "",
    tokens: Sequence[tuple[str, float]] | None = None,
) -> Choice:
    """An answer; `calls` are (id, name, arguments)."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": i, "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, name, arguments in calls
        ]
    if reasoning:
        message["reasoning_content"] = reasoning
    logprobs = tuple(TokenLogprob(t, tuple(t.encode()), p) for t, p in tokens or ())
    reason = "tool_calls" if calls else "stop"
    return Choice(message, reason, logprobs=logprobs if tokens is not None else None)


class Prescribed:
    """A session that says the same each time.

    Args:
        choice: said for each of `n`; with "NAME" in its content where the session's name belongs.
        failure: raised instead.
    """

    def __init__(self, choice: Choice | None = None, failure: Exception | None = None) -> None:
        self.choice = choice or said()
        self.failure = failure
        self.delay_s = 0.0
        self.asks: list[Ask] = []
        self.lost: list[Reply] = []
        self.notes: list[tuple[float | None, Mapping[str, Any]]] = []
        self.answered = 0
        self.not_enforced: tuple[str, ...] = ()

    async def answer(self, ask: Ask) -> Reply:
        self.asks.append(ask)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure
        self.answered += 1
        counts = {"prompt_tokens": 11, "completion_tokens": 7, "cached_tokens": 4}
        choices = (self.choice,) * ask.n
        return Reply(choices, ask.model, **counts, not_enforced=self.not_enforced)

    def undelivered(self, reply: Reply) -> None:
        self.lost.append(reply)

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        self.notes.append((reward, metadata))


class OneBook:
    """Has one session for all, and refuses the key "wrong"."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.found: list[tuple[str | None, str | None]] = []

    def check(self, *, name: str | None, key: str | None) -> None:
        if key == "wrong":
            raise RequestRefused("that key is unknown", status=401)

    def find(self, *, name: str | None, key: str | None) -> Any:
        self.check(name=name, key=key)
        self.found.append((name, key))
        return self.session


_CLIENTS: list[openai.AsyncOpenAI] = []


def client(server: GatewayServer, **settings: Any) -> openai.AsyncOpenAI:
    """OpenAI's, until the end of `serving`; it does not try again."""
    settings = {"max_retries": 0, "api_key": "key", **settings}
    _CLIENTS.append(openai.AsyncOpenAI(base_url=f"{server.url}/v1", **settings))
    return _CLIENTS[-1]


@asynccontextmanager
async def serving(session: Any, **settings: Any) -> AsyncIterator[tuple[GatewayServer, OneBook]]:
    book = OneBook(session)
    server = GatewayServer(book, **settings)
    await server.start()
    try:
        yield server, book
    finally:
        while _CLIENTS:
            await _CLIENTS.pop().close()
        await server.close()
