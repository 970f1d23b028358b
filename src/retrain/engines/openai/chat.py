"""`POST /chat/completions`, tried again where that may help."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from retrain.engines.openai.transport import (
    CONNECT_S,
    PASSING,
    Later,
    PerLoop,
    retry_after_s,
    until_answered,
)
from retrain.types import InfrastructureError, UserError

if TYPE_CHECKING:
    import httpx2

MAX_ANSWER_BYTES = 16 * 2**20

_SHOWN_CHARS = 300
_KEY = re.compile(r"[!-~]+")
"""What may stand in a header."""

_OF_THE_MESSAGES = (400, 413, 422)
"""Of an endpoint that answers others they speak of what was said to it: too long, or filtered."""

_PROBE = "Answer with one word."
_NOT_TAKEN = "The server does not take this request: check the model and its limits."


class MessagesRefused(InfrastructureError):
    """The endpoint answers others, but does not take these messages: too long, or filtered. They
    are not sent again. Who said them is for the caller to know: a model, most often."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said
        """The server's words."""


@dataclass(frozen=True)
class ChatReply:
    text: str
    """Empty where the server sent none."""
    finish_reason: str
    """As the server names it: `stop`, `length`, `content_filter`."""
    prompt_tokens: int | None
    """None where the server does not say."""
    completion_tokens: int | None
    cost: float | None
    """By the endpoint's prices; None where the tokens are not known."""
    attempts: int = 1
    """From 1."""


class ChatEndpoint:
    """Asks one model at one address.

    Args:
        url: the base that the API's paths follow, such as `https://api.openai.com/v1`; a server's
            bare address gets `/v1`.
        api_key: sent as a bearer token; it appears in no message of ours.
        max_tokens: of a reply.
        timeout_s: of one attempt, its turn not included.
        retries: further attempts where the connection fails, the time runs out, the answer is none
            of this protocol, or the server says 408, 409, 425, 429 or 5xx.
        backoff_s: wait before the first retry. It doubles with each; a random part of it, up to
            half, is taken off. `Retry-After` takes its place. At most LONGEST_WAIT_S.
        max_concurrency: most requests under way in an event loop.
        prompt_price, completion_price: of a million tokens; what `ChatReply.cost` is made of.
        where: what errors call the endpoint: the place in the config that it comes from.

    Raises:
        UserError: the address or the key cannot be one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        temperature: float = 1.0,
        max_tokens: int = 512,
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        max_concurrency: int = 16,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
        where: str = "the endpoint",
    ) -> None:
        self._where = where
        self._endpoint = address(url, where)
        self._model = model
        if api_key is not None and not _KEY.fullmatch(api_key):
            raise UserError(
                f"{where}: the API key is empty, or has spaces or characters that no key has",
                "Set the variable to the key alone.",
            )
        self._api_key = api_key
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._max_concurrency = max_concurrency
        self._prices = prompt_price, completion_price
        self._length_key = "max_tokens"
        self._takes_formats = True
        self._lines = PerLoop(self._open)
        self._closed = False
        self._answered = False

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        seed: int | None = None,
        max_tokens: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> ChatReply:
        """The next message of a conversation.

        Where the first messages are refused, the endpoint is asked the same with a few harmless
        words in their place: what it does not take then either is the request as such.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            seed: sent along; most servers sample by it.
            max_tokens: instead of the endpoint's own.
            schema: of the JSON that the message should be, sent as a `response_format`. An endpoint
                that refuses those by name is asked without from then on.

        Raises:
            UserError: the server refuses the request as such: the key, the model, a setting.
            MessagesRefused: it refuses these messages, whether they are the first or not.
            InfrastructureError: there is still no answer after the last retry.
        """
        body = {
            "model": self._model,
            "messages": [dict(message) for message in messages],
            "temperature": self._temperature,
        }
        if seed is not None:
            body["seed"] = seed
        if schema is not None:
            form = {"name": "answer", "strict": True, "schema": dict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        length = self._max_tokens if max_tokens is None else max_tokens

        try:
            return await self._answer(body, length)
        except MessagesRefused:
            await self._probe(body, length)
            raise

    async def close(self) -> None:
        """Close this event loop's connections, those in use included; nothing is asked after."""
        self._closed = True
        line = self._lines.take()
        if line is not None:
            await line.client.aclose()

    @property
    def _named(self) -> str:
        return f"{self._where}: {self._endpoint.partition('?')[0]}"

    async def _answer(self, body: dict[str, Any], length: int) -> ChatReply:
        async def attempt() -> ChatReply:
            return self._reply(await self._ask(body, length))

        reply, attempts = await until_answered(
            attempt, retries=self._retries, backoff_s=self._backoff_s, named=self._named
        )
        return replace(reply, attempts=attempts)

    async def _probe(self, body: dict[str, Any], length: int) -> None:
        """See to it that the endpoint has answered once: this request, if need be, with other
        words.

        Raises:
            UserError: it does not take that either.
            InfrastructureError: there is no answer.
        """
        async with self._lines.here().probing:
            if self._answered:
                return
            messages = [{**message, "content": _PROBE} for message in body["messages"]]
            try:
                await self._answer({**body, "messages": messages}, length)
            except MessagesRefused as refused:
                raise UserError(str(refused), _NOT_TAKEN) from None

    async def _ask(self, body: dict[str, Any], length: int) -> Any:
        """One attempt; of a server that refuses a key by name, another without it."""
        asked = self._known(body, length)
        status, headers, text = await self._post(asked)
        while status in (400, 422):
            self._learn(text)
            before, asked = asked, self._known(body, length)
            if asked == before:
                break
            status, headers, text = await self._post(asked)
        if status >= 400 or status < 200:
            self._refuse(status, headers, text)
        if status >= 300:
            raise UserError(f"{self._named} answered {status}", "Write the address it moved to.")
        try:
            return json.loads(text)
        except ValueError:
            raise Later(f"the answer is no JSON: {self._shown(text)}") from None

    def _known(self, body: dict[str, Any], length: int) -> dict[str, Any]:
        """The request as this server is known to take it."""
        taken = body | {self._length_key: length}
        if not self._takes_formats:
            taken.pop("response_format", None)
        return taken

    def _learn(self, refusal: str) -> None:
        if "max_completion_tokens" in refusal:
            self._length_key = "max_completion_tokens"
        if "response_format" in refusal or "json_schema" in refusal:
            self._takes_formats = False

    def _refuse(self, status: int, headers: Mapping[str, str], text: str) -> None:
        words = self._shown(_message(text))
        said = f"answered {status}: {words}"
        spent = status == 429 and "insufficient_quota" in text
        if status in _OF_THE_MESSAGES:
            raise MessagesRefused(f"{self._named} {said}", words)
        if (status >= 500 or status in PASSING) and not spent:
            raise Later(said, retry_after_s(headers.get("retry-after")))
        if spent:
            step = "The account has no credit left."
        elif status in (401, 403):
            step = "Check the key in the variable that api_key_env names."
            if self._api_key is None:
                step = "Name a variable with the key: api_key_env."
        elif status == 404:
            step = f"Check the model's name, {self._model!r}, and the url."
        else:
            step = _NOT_TAKEN
        raise UserError(f"{self._named} {said}", step)

    async def _post(self, body: dict[str, Any]) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text of an answer.

        Raises:
            Later: there is none this time.
            InfrastructureError: the endpoint was closed.
            UserError: the address is none.
        """
        import httpx2

        if self._closed:
            raise InfrastructureError(f"{self._named}: the endpoint is closed")
        line = self._lines.here()
        received = bytearray()
        async with line.slots:
            try:
                async with (
                    asyncio.timeout(self._timeout_s) as clock,
                    line.client.stream("POST", self._endpoint, json=body) as response,
                ):
                    async for piece in response.aiter_bytes():
                        received += piece
                        if len(received) > MAX_ANSWER_BYTES:
                            raise Later(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
            except TimeoutError:
                if not clock.expired():
                    raise
                raise Later(f"no answer within {self._timeout_s:g} s") from None
            except httpx2.InvalidURL as error:
                raise UserError(f"{self._named}: {error}", "Correct the url.") from None
            except httpx2.HTTPError as error:
                cause = f"{type(error).__name__}: {error}".rstrip(": ")
                raise Later(self._shown(cause)) from None
        return response.status_code, response.headers, received.decode("utf-8", "replace")

    def _reply(self, answer: Any) -> ChatReply:
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content")
            finish = choice.get("finish_reason")
            usage = answer.get("usage") or {}
            counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (AttributeError, IndexError, KeyError, TypeError):
            raise Later(f"no chat completion: {self._shown(json.dumps(answer))}") from None
        if not isinstance(text, str | None) or not all(isinstance(n, int | None) for n in counts):
            raise Later(f"no chat completion: {self._shown(json.dumps(answer))}")
        self._answered = True
        prompt, completion = counts
        cost = None
        if prompt is not None and completion is not None:
            cost = (prompt * self._prices[0] + completion * self._prices[1]) / 1e6
        return ChatReply(text or "", str(finish or "stop"), prompt, completion, cost)

    def _shown(self, text: str) -> str:
        """One line for an error, without the key."""
        if self._api_key is not None:
            text = text.replace(self._api_key, "***")
        return " ".join(text.split())[:_SHOWN_CHARS] or "(nothing)"

    def _open(self) -> _Line:
        import httpx2

        bearer = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        client = httpx2.AsyncClient(
            headers=bearer,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=self._max_concurrency),
        )
        return _Line(client, asyncio.Semaphore(self._max_concurrency), asyncio.Lock())


@dataclass(frozen=True)
class _Line:
    """What belongs to one event loop."""

    client: httpx2.AsyncClient
    slots: asyncio.Semaphore
    probing: asyncio.Lock


def address(url: str, where: str) -> str:
    """Where chats are posted.

    Raises:
        UserError: it is no web address, or one with a password.
    """
    try:
        parts = urlsplit(url)
        host, secret = parts.hostname, parts.username or parts.password
        _ = parts.port
    except ValueError:
        parts, host, secret = urlsplit(""), None, None
    if secret is not None:
        raise UserError(f"{where}: the url has a user or password in it", "Use api_key_env.")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(
            f"{where}: {url!r} is not a web address", "Write one such as https://host/v1."
        )
    base = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, f"{base}/chat/completions", parts.query, ""))


def _message(text: str) -> str:
    """What an error answer says, as servers of this kind nest it."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        return text
    while isinstance(found, dict):
        found = next((found[k] for k in ("error", "message", "detail") if k in found), None)
    return found if isinstance(found, str) and found else text
