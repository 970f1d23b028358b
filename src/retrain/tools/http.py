"""A web API as a tool, by declaration: a search engine, say."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote, urljoin, urlsplit

from retrain.engines.openai import read_key
from retrain.engines.openai.transport import (
    CONNECT_S,
    PASSING,
    Later,
    PerLoop,
    retry_after_s,
    until_answered,
)
from retrain.tools.base import ModelError, ToolError
from retrain.tools.declared import DeclaredParameters
from retrain.tools.function import checked_name, show
from retrain.tools.path import find
from retrain.tools.templates import as_text, check_template, fill, fill_json
from retrain.types import InfrastructureError, UserError

if TYPE_CHECKING:
    import httpx2

NOTHING_FOUND = "No results."
MOST_REDIRECTS = 5

_SHOWN_CHARS = 300
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_HIDDEN = "***"
_WHOLE = ("max_bytes", "max_results", "max_concurrency", "retries")
_HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_HEADER_VALUE = re.compile(r"(?:[!-~](?:[ \t!-~]*[!-~])?)?")
_ADDRESS = re.compile(r"https?://[\w.:\[\]-]+(?=[/?]|$)")


class HttpTool:
    """Calls one address of one host, with the arguments in its path, its query or its body.

    Arguments are URL-encoded, and none can lead to another host or up from its place in the path.
    Redirects are followed within the host and port only, or from http to https. What comes back is
    the body, or with `result` the part of its JSON that the path names.

    The model reads a refusal (4xx) as an error of the tool. Where the connection fails, the time
    runs out, or the server says 408, 409, 425, 429 or 5xx, the request is sent again, which an
    API that changes something may not want: `retries: 0`, and `tool_retries: 0` of the environment.
    """

    timeout_s: float = math.inf
    """Of a call: its attempts end by themselves."""

    def __init__(
        self,
        name: str,
        description: str,
        url: str,
        parameters: Mapping[str, Mapping[str, Any]],
        *,
        method: Literal["GET", "POST"] = "GET",
        query: Mapping[str, Any] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        headers_env: Mapping[str, str] | None = None,
        result: str | None = None,
        max_results: int | None = None,
        max_bytes: int = 1_000_000,
        timeout_s: float = 10.0,
        retries: int = 2,
        backoff_s: float = 0.5,
        max_concurrency: int = 16,
    ) -> None:
        """
        Args:
            url: the address, with `{name}` of a parameter in its path or its query.
            parameters: by name, the JSON schema of each: `{query: {type: string}}`.
            query: by name, what is added to the address; a value may hold `{name}`.
            json: the body of a POST; its texts may hold `{name}`. A text that is one field and no
                more becomes the argument itself, a number for instance; where an optional one was
                not given, its key is left out, as it is in `query`.
            headers: of each request.
            headers_env: more headers, of environment variables: a variable's name, or a text with
                `${NAME}` in it. What they hold is shown to nobody.
            result: where in the JSON answer the result is, see `path.find`.
            max_results: most items of a result that is a list.
            max_bytes: of an answer. Of a longer one the beginning is kept; with `result`, none.
            timeout_s: of one attempt.
            retries: further attempts.
            backoff_s: wait before the first of them, see `wait_s`; `Retry-After` takes its place.
            max_concurrency: most requests under way at once.

        Raises:
            UserError: one of these cannot be, or a variable is not set.
        """
        where = f"tool '{name}'"
        self.name = checked_name(name)
        self.description = description
        self._declared = DeclaredParameters(parameters, where)
        self.parameters = self._declared.schema
        names = self._declared.names
        positive = {"timeout_s": timeout_s, "max_bytes": max_bytes, "max_results": max_results}
        positive["max_concurrency"] = max_concurrency
        _check_numbers(where, positive, {"retries": retries, "backoff_s": backoff_s})
        _check_headers(headers, f"{where}: headers")
        _check_method(where, method, json)
        self._url = _checked_url(url, names, where)
        check_template(query, names, f"{where}: query")
        check_template(json, names, f"{where}: json")
        self._method, self._query, self._json = method, dict(query or {}), json
        self._secrets: list[str] = []
        secret = self._read(headers_env, f"{where}: headers_env")
        _check_headers(secret, f"{where}: headers_env")
        self._headers = dict(headers or {}) | secret
        self._result = _checked_path(result, where)
        self._max_results, self._max_bytes = max_results, max_bytes
        self._attempt_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._max_concurrency = max_concurrency
        self._lines = PerLoop(self._open)
        self._closed = False

    def session(self) -> _Session:
        return _Session(self)

    async def ask(self, arguments: Mapping[str, Any]) -> str:
        """One call of the tool.

        Raises:
            ModelError: the arguments do not fit.
            ToolError: the server refuses, or its answer has no result.
            InfrastructureError: there is still no answer after the last retry.
        """
        values = self._declared.bind(arguments)
        request = self._request(values)

        async def attempt() -> _Answer:
            return await self._attempt(request)

        answer, _ = await until_answered(
            attempt, retries=self._retries, backoff_s=self._backoff_s, named=self.name
        )
        if not 200 <= answer.status < 300:
            raise ToolError(f"{self.name} answered {answer.status}: {self._shown(answer.text)}")
        return self._hidden(self._read_result(answer))

    async def close(self) -> None:
        """Close this event loop's connections; nothing is asked after."""
        self._closed = True
        line = self._lines.take()
        if line is not None:
            await line.client.aclose()

    def _request(self, values: Mapping[str, Any]) -> _Request:
        url = fill(self._url, values, lambda text: quote(text, safe=""))
        if _climbs(url):
            raise ModelError("an argument has . or .. as a part of a path")
        pairs: dict[str, Any] = fill_json(self._query, values)
        params = [(k, one) for k, v in pairs.items() for one in (v if isinstance(v, list) else [v])]
        encoded = "&".join(f"{quote(k, safe='')}={quote(as_text(v), safe='')}" for k, v in params)
        if encoded:
            url += ("&" if "?" in url else "?") + encoded
        body = fill_json(self._json, values) if self._json is not None else None
        return _Request(self._method, url, body)

    async def _attempt(self, request: _Request) -> _Answer:
        """
        Raises:
            Later: no answer this time.
            ToolError: it leads elsewhere.
        """
        for _ in range(MOST_REDIRECTS + 1):
            answer = await self._send(request)
            if answer.status >= 500 or answer.status in PASSING:
                said = f"answered {answer.status}: {self._shown(answer.text)}"
                raise Later(said, retry_after_s(answer.headers.get("retry-after")))
            target = answer.headers.get("location")
            if not 300 <= answer.status < 400 or target is None:
                return answer
            request = request.redirected(answer.status, target, self.name)
        raise ToolError(f"{self.name} redirects without end")

    async def _send(self, request: _Request) -> _Answer:
        import httpx2

        if self._closed:
            raise InfrastructureError(f"{self.name}: the tool is closed")
        line = self._lines.here()
        received = bytearray()
        content = {} if request.body is None else {"json": request.body}
        async with line.slots:
            try:
                async with (
                    asyncio.timeout(self._attempt_s) as clock,
                    line.client.stream(request.method, request.url, **content) as response,
                ):
                    async for piece in response.aiter_bytes():
                        received += piece
                        if len(received) > self._max_bytes:
                            break
            except TimeoutError:
                if not clock.expired():
                    raise
                raise Later(f"no answer within {self._attempt_s:g} s") from None
            except httpx2.InvalidURL as error:
                raise ModelError(
                    f"no address can hold these arguments: {self._shown(str(error))}"
                ) from None
            except httpx2.HTTPError as error:
                raise Later(self._shown(f"{type(error).__name__}: {error}")) from None
        whole = len(received) <= self._max_bytes
        text = bytes(received[: self._max_bytes]).decode(response.encoding or "utf-8", "replace")
        return _Answer(response.status_code, response.headers, text, whole)

    def _read_result(self, answer: _Answer) -> str:
        if self._result is None:
            return answer.text
        if not answer.whole:
            raise ToolError(f"the answer of {self.name} is longer than {self._max_bytes} bytes")
        try:
            found = find(self._result, json.loads(answer.text))
        except (ValueError, RecursionError):
            raise ToolError(f"the answer of {self.name} is no JSON") from None
        if isinstance(found, list):
            found = found[: self._max_results]
        return NOTHING_FOUND if found in (None, "", [], {}) else str(show(found))

    def _read(self, variables: Mapping[str, str] | None, where: str) -> dict[str, str]:
        """Values of environment variables, from now on secrets."""
        return {
            name: _of_environment(text, f"{where}.{name}", self._secrets)
            for name, text in (variables or {}).items()
        }

    def _hidden(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return text

    def _shown(self, text: str) -> str:
        """One line for an error."""
        return " ".join(self._hidden(text).split())[:_SHOWN_CHARS] or "(nothing)"

    def _open(self) -> _Line:
        import httpx2

        client = httpx2.AsyncClient(
            headers=self._headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=self._max_concurrency),
        )
        return _Line(client, asyncio.Semaphore(self._max_concurrency))


@dataclass(frozen=True)
class _Line:
    """What belongs to one event loop."""

    client: httpx2.AsyncClient
    slots: asyncio.Semaphore


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    text: str
    whole: bool
    """False where its end was left out."""


@dataclass(frozen=True)
class _Request:
    method: str
    url: str
    body: Any

    def redirected(self, status: int, target: str, name: str) -> _Request:
        """
        Raises:
            ToolError: to another host, port or scheme, but for https in place of http where both
                ports are the usual ones.
        """
        url = urljoin(self.url, target)
        here, there = _origin(self.url), _origin(url)
        safer = here == ("http", here[1], None) and there == ("https", here[1], None)
        if here != there and not safer:
            raise ToolError(f"{name} redirects to another host or port, which is not followed")
        if status in (307, 308):
            return _Request(self.method, url, self.body)
        return _Request("GET", url, None)


class _Session:
    """Nothing lasts from call to call."""

    def __init__(self, tool: HttpTool) -> None:
        self._tool = tool

    async def call(self, arguments: Mapping[str, Any]) -> str:
        return await self._tool.ask(arguments)

    async def close(self) -> None:
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port; a port is None where it is the scheme's own. All are empty of what is
    no address, or has a user in it."""
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc or "\\" in parts.netloc:
            return "", None, None
        usual = {"http": 80, "https": 443}.get(parts.scheme)
        return parts.scheme, parts.hostname, None if parts.port == usual else parts.port
    except ValueError:
        return "", None, None


def _climbs(url: str) -> bool:
    """Whether a server may read the path as one that leads up, however it is encoded."""
    parts = re.split(r"[/\\]", unquote(urlsplit(url).path))
    return any(part in (".", "..") for part in parts)


def _checked_url(url: Any, names: Collection[str], where: str) -> str:
    if not isinstance(url, str) or not _ADDRESS.match(url) or "#" in url or _climbs(url):
        raise UserError(
            f"{where}: url {url!r} cannot be one",
            "Write https://host/path; {name} of a parameter goes into the path or the query.",
        )
    check_template(url, names, f"{where}: url")
    return url


def _checked_path(path: str | None, where: str) -> str | None:
    try:
        if path is not None:
            find(path, None)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: result {path!r} cannot be read from {str(error)!r} on",
            "Write results[].{title, url}, for one.",
        ) from None
    return path


def _check_method(where: str, method: Any, body: Any) -> None:
    if method not in ("GET", "POST"):
        raise UserError(f"{where}: method is {method!r}", "One of: GET, POST.")
    if method == "GET" and body is not None:
        raise UserError(f"{where}: json does nothing in a GET", "Set method: POST, or use query.")


def _check_numbers(where: str, above: Mapping[str, Any], least: Mapping[str, Any]) -> None:
    for key, value in {**above, **least}.items():
        if value is None and key == "max_results":
            continue
        kind = int if key in _WHOLE else int | float
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (value == 0 and key in above):
            named = "whole number" if key in _WHOLE else "number"
            bound = "above zero" if key in above else "of at least zero"
            raise UserError(f"{where}: {key} is {value!r}", f"Give a {named} {bound}.")


def _check_headers(headers: Any, where: str) -> None:
    """Their values are not shown: they may be secrets."""
    if not isinstance(headers, Mapping | None):
        raise UserError(f"{where} is {str(headers)[:80]!r}", "Write {Accept: application/json}.")
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} cannot be a header's name", "Use letters and -.")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise UserError(
                f"{where}.{name}: its value cannot be a header's",
                "Give a text (in quotes) of one line of ASCII, with no space at either end.",
            )


def _of_environment(text: Any, where: str, secrets: list[str]) -> str:
    """A text with the values of the variables that it names, which are added to `secrets`."""

    def value(name: str) -> str:
        secrets.append(str(read_key(name, where)))
        return secrets[-1]

    if isinstance(text, str) and re.fullmatch(r"[A-Za-z_]\w*", text):
        return value(text)
    if not isinstance(text, str) or not _VARIABLE.search(text):
        raise UserError(f"{where} names no variable", "Write NAME, or 'Bearer ${NAME}'.")
    return _VARIABLE.sub(lambda match: value(match[1]), text)
