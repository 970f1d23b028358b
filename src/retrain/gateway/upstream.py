"""A model behind another endpoint of OpenAI's shape: what it answers is passed on."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from retrain.engines.openai.chat import address
from retrain.engines.openai.transport import (
    CONNECT_S,
    PASSING,
    Later,
    PerLoop,
    retry_after_s,
    until_answered,
)
from retrain.gateway.ask import Ask, Choice, Finish, Reply, RequestRefused, TokenLogprob
from retrain.gateway.history import digests, key_of
from retrain.gateway.wire.errors import UPSTREAM_REFUSED
from retrain.types import InfrastructureError

MOST_REMEMBERED = 256

_FINISHES: tuple[Finish, ...] = ("stop", "length", "tool_calls", "content_filter")


class Upstream:
    """Answers requests by asking the endpoint the same, as a whole: a caller that wants a stream is
    streamed the answer once it is there.

    Args:
        url: the API's base, such as `https://api.openai.com/v1`.
        model: asked for instead of what requests name.
        api_key: of the endpoint; callers never see it.
        timeout_s: of one attempt, from its turn on.
        retries: further attempts where the endpoint fails or is busy.
        max_concurrency: most requests at once.

    Raises:
        UserError: the url is no web address.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 2,
        backoff_s: float = 0.5,
        max_concurrency: int = 64,
    ) -> None:
        self._address = address(url, "gateway.upstream")
        self._model = model
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._max_concurrency = max_concurrency
        self._length_key = "max_tokens"
        self._clients = PerLoop(self._open)
        self._turns = PerLoop(lambda: asyncio.Semaphore(max_concurrency))

    async def answer(self, ask: Ask) -> Reply:
        """
        Raises:
            RequestRefused: the endpoint refuses the request, or is not to be had.
        """

        async def attempt() -> Reply:
            return self._reply(await self._post(self._body(ask)), ask)

        try:
            reply, _ = await until_answered(
                attempt, retries=self._retries, backoff_s=self._backoff_s, named="the upstream"
            )
        except InfrastructureError as error:
            raise RequestRefused(str(error), status=502, code="upstream_failed") from error
        return reply

    async def close(self) -> None:
        client = self._clients.take()
        if client is not None:
            await client.aclose()

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            **ask.sampling,
            "model": self._model or ask.model,
            "messages": [dict(message) for message in ask.messages],
        }
        if ask.tools:
            body["tools"] = [dict(schema) for schema in ask.tools]
            if ask.tool_choice != "auto":
                body["tool_choice"] = _choice(ask.tool_choice)
            if not ask.parallel_tool_calls:
                body["parallel_tool_calls"] = False
        if ask.n > 1:
            body["n"] = ask.n
        if ask.stop:
            body["stop"] = list(ask.stop)
        if ask.max_tokens is not None:
            body[self._length_key] = ask.max_tokens
        if ask.logprobs:
            body["logprobs"] = True
        return body

    async def _post(self, body: dict[str, Any]) -> Any:
        import httpx2

        try:
            async with self._turns.here(), asyncio.timeout(self._timeout_s) as clock:
                response = await self._clients.here().post(self._address, json=body)
        except TimeoutError:
            if not clock.expired():
                raise
            raise Later(f"no answer within {self._timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise Later(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        status = response.status_code
        if status >= 500 or status in PASSING:
            after = retry_after_s(response.headers.get("retry-after"))
            raise Later(f"answered {status}: {self._shown(response.text)}", after)
        if 300 <= status < 400:
            raise RequestRefused(
                f"the upstream answers {status}, that it is elsewhere; "
                "gateway.upstream.url must be its own address",
                status=502,
                code=UPSTREAM_REFUSED,
            )
        if status >= 400:
            self._refuse(status, response.text, body)
        try:
            return response.json()
        except ValueError:
            raise Later(f"the answer is no JSON: {self._shown(response.text)}") from None

    def _refuse(self, status: int, text: str, body: Mapping[str, Any]) -> None:
        """
        Raises:
            Later: it wants the token limit by its other name.
            RequestRefused: with what it says.
        """
        if "max_tokens" in body and "max_completion_tokens" in text:
            self._length_key = "max_completion_tokens"
            raise Later("it asks for max_completion_tokens", 0.0)
        said: Any = None
        try:
            said = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            said = None
        error = said if isinstance(said, Mapping) else {"message": text}
        code = error.get("code") if isinstance(error.get("code"), str) else None
        ours = status in (401, 403)  # the key is not the caller's
        raise RequestRefused(
            f"the upstream model refuses the request: {self._shown(str(error.get('message')))}",
            status=502 if ours else status,
            code=UPSTREAM_REFUSED if ours else code,
            param=error.get("param") if isinstance(error.get("param"), str) else None,
        )

    def _reply(self, answer: Any, ask: Ask) -> Reply:
        try:
            choices = tuple(_read_choice(choice) for choice in answer["choices"])
            if not choices:
                raise ValueError("no choices")
            usage = answer.get("usage") or {}
            details = usage.get("prompt_tokens_details") or {}
            return Reply(
                choices,
                model=str(answer.get("model") or ask.model),
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                cached_tokens=int(details.get("cached_tokens") or 0),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise Later(f"no chat completion: {self._shown(json.dumps(answer))}") from None

    def _shown(self, text: str) -> str:
        if self._api_key is not None:
            text = text.replace(self._api_key, "***")
        return " ".join(text.split())[:500] or "(nothing)"

    def _open(self) -> Any:
        import httpx2

        bearer = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        return httpx2.AsyncClient(
            headers=bearer,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=self._max_concurrency),
        )


class TextSession:
    """A session of an upstream model. What a caller asks again because no answer reached it is
    answered the same, within its last `MOST_REMEMBERED` requests."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._given: OrderedDict[str, str] = OrderedDict()
        """By the id of a reply: what was asked."""
        self._unheard: OrderedDict[str, Reply] = OrderedDict()

    async def answer(self, ask: Ask) -> Reply:
        """
        Raises:
            RequestRefused: as `Upstream.answer`.
        """
        asked = _request_key(ask)
        reply = self._unheard.pop(asked, None) or await self._upstream.answer(ask)
        self._given[reply.id] = asked
        _bound(self._given)
        if ask.gone():
            self.undelivered(reply)
        return reply

    def undelivered(self, reply: Reply) -> None:
        if reply.id in self._given:
            self._unheard[self._given[reply.id]] = reply
            _bound(self._unheard)

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        """Nothing here depends on it."""


def _bound(remembered: OrderedDict[str, Any]) -> None:
    while len(remembered) > MOST_REMEMBERED:
        remembered.popitem(last=False)


def _request_key(ask: Ask) -> str:
    """The same for requests that may be answered the same."""
    settings = (
        ask.model,
        ask.n,
        ask.tools,
        ask.tool_choice,
        ask.parallel_tool_calls,
        ask.stop,
        ask.max_tokens,
        ask.logprobs,
        dict(ask.sampling),
    )
    said = digests(map(key_of, ask.messages))[-1]
    return said + json.dumps(settings, sort_keys=True, default=str)


def _choice(choice: str) -> Any:
    kind, colon, name = choice.partition(":")
    return {"type": "function", "function": {"name": name}} if colon and kind == "tool" else choice


def _read_choice(choice: Mapping[str, Any]) -> Choice:
    said = choice["message"]
    content, thought = _read_content(said.get("content"))
    message: dict[str, Any] = {"role": "assistant", "content": content}
    reasoning = said.get("reasoning_content") or said.get("reasoning") or thought
    if isinstance(reasoning, str) and reasoning:
        message["reasoning_content"] = reasoning
    if said.get("tool_calls"):
        message["tool_calls"] = [_read_call(call) for call in said["tool_calls"]]
    elif message["content"] is None:
        message["content"] = said.get("refusal") or ""
    finish = choice.get("finish_reason")
    usual: Finish = "tool_calls" if "tool_calls" in message else "stop"
    tokens = (choice.get("logprobs") or {}).get("content")
    return Choice(
        message,
        finish if finish in _FINISHES else usual,
        logprobs=None if tokens is None else tuple(map(_read_logprob, tokens)),
    )


def _read_content(content: Any) -> tuple[str | None, str]:
    """What is said, and what was thought before; some endpoints give both as parts.

    Raises:
        ValueError: neither text nor parts of it.
    """
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise ValueError("content")
    said, thought = [], []
    for part in content:
        kind = "text" if isinstance(part, str) else part["type"]
        if kind == "thinking":
            inner, _ = _read_content(part["thinking"])
            thought.append(inner or "")
        elif kind in ("text", "refusal"):
            said.append(part if isinstance(part, str) else str(part[kind]))
        else:
            raise ValueError(kind)
    return "".join(said) or None, "".join(thought)


def _read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"].get("arguments")
    return {
        "id": str(call.get("id") or f"call_{secrets.token_hex(8)}"),
        "type": "function",
        "function": {
            "name": str(name),
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments or {}),
        },
    }


def _read_logprob(token: Mapping[str, Any]) -> TokenLogprob:
    text = str(token["token"])
    data = token.get("bytes")
    return TokenLogprob(text, tuple(data or text.encode()), float(token["logprob"]))
