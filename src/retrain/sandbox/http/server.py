"""The way to a SandboxFusion server and back, with a deadline and a limit on what is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from retrain.sandbox.base import SandboxUnavailable
from retrain.sandbox.http.answer import Answer, WrongAnswer, read_answer
from retrain.sandbox.output import cut_middle
from retrain.sandbox.per_loop import PerLoop
from retrain.types import UserError

if TYPE_CHECKING:
    import httpx2

MAX_ANSWER_BYTES = 8 * 2**20
"""SandboxFusion itself keeps 1 MiB of each stream; JSON can make several of it."""

_CONNECT_S = 10.0
_MARGIN_S = 10.0
"""What a server may take besides the running time of the code."""
_BYTES_PER_S = 4 * 2**20
"""The slowest upload of the request that is waited for."""
_CHUNK_BYTES = 2**18

_SHOWN_BYTES = 2**14
"""Read of an answer that is an error."""

_BUSY = (408, 425, 429)
_TOO_LARGE = 413
"""The 4xx codes that speak of the moment, not of the request."""


class Unreachable(SandboxUnavailable):
    """No connection."""


class TooLarge(Exception):
    """The server takes no request of this size."""


class WrongProtocol(SandboxUnavailable):
    """Something answered, but not as SandboxFusion does."""


class _TooLong(Exception):
    """An answer of more than `MAX_ANSWER_BYTES`."""


@dataclass(frozen=True)
class _Line:
    """What belongs to one event loop."""

    client: httpx2.AsyncClient
    slots: asyncio.Semaphore
    starting: asyncio.Lock


class Server:
    """Sends programs; holds no connection between them.

    A connection serves one request: an idle one could be closed by the server just when it is
    used again, and would outlive its event loop.
    """

    def __init__(
        self, url: str, files: Mapping[str, str], *, memory_mb: int, max_concurrency: int
    ) -> None:
        """
        Args:
            url: of the server, with or without `/run_code`.
            files: contents in base64 by their names in the sandbox.
            memory_mb: memory of one run.
            max_concurrency: most requests at once, per event loop.

        Raises:
            UserError: not an http address.
        """
        self._endpoint, self.shown, self._auth = split_url(url)
        self._files_json = json.dumps(files).encode()
        self._memory_mb = memory_mb
        self._max_concurrency = max_concurrency
        self._lines = PerLoop(self._open)

    @property
    def starting(self) -> asyncio.Lock:
        """Held in this event loop while the server is tested."""
        return self._lines.get().starting

    async def run(self, program: str, timeout_s: float) -> tuple[Answer | None, float]:
        """What the server says of a run, and how long that took, in seconds, once it had a slot.

        None stands for an answer that is too long to be read.

        Raises:
            Unreachable, WrongProtocol, TooLarge, SandboxUnavailable: there is no answer this time.
            UserError: the server refused the request.
        """
        line = self._lines.get()
        async with line.slots:
            start = time.perf_counter()
            answer: Answer | None = None
            with contextlib.suppress(_TooLong):
                answer = await self._ask(line.client, program, timeout_s)
            return answer, time.perf_counter() - start

    async def close(self) -> None:
        """Close this event loop's connections, those in use included."""
        line = self._lines.pop()
        if line is not None:
            await line.client.aclose()

    async def _ask(self, client: httpx2.AsyncClient, program: str, timeout_s: float) -> Answer:
        """Send a program and read what the server says of it."""
        status_code, body = await self._post(client, self._body(program, timeout_s), timeout_s)
        if status_code >= 500 or status_code in _BUSY:
            raise SandboxUnavailable(f"{self.shown} answered {status_code}: {printable(body)}")
        if status_code == _TOO_LARGE:
            raise TooLarge(f"{self.shown} answered {status_code}: {printable(body)}")
        if not 200 <= status_code < 300:
            raise UserError(
                f"sandbox.url: {self.shown} answered {status_code}: {printable(body)}",
                "check the address and what the server accepts",
            )
        try:
            answer = read_answer(body)
        except WrongAnswer as error:
            raise WrongProtocol(f"{self.shown} {error}") from error
        if answer.sandbox_error is not None:
            said = printable(answer.sandbox_error)
            raise SandboxUnavailable(f"{self.shown} answered SandboxError: {said}")
        return answer

    async def _post(
        self, client: httpx2.AsyncClient, body: tuple[bytes, ...], timeout_s: float
    ) -> tuple[int, bytes]:
        """Status code and body of the answer. One deadline holds for all of it."""
        import httpx2

        size = sum(map(len, body))
        deadline_s = _CONNECT_S + timeout_s + _MARGIN_S + size / _BYTES_PER_S
        headers = {"Content-Type": "application/json", "Content-Length": str(size)}
        received = bytearray()
        try:
            async with (
                asyncio.timeout(deadline_s),
                client.stream(
                    "POST", self._endpoint, content=_chunks(body), headers=headers
                ) as response,
            ):
                async for piece in response.aiter_raw():
                    received += piece
                    if not response.is_success and len(received) > _SHOWN_BYTES:
                        break
                    if len(received) > MAX_ANSWER_BYTES:
                        raise _TooLong
        except TimeoutError as error:
            raise SandboxUnavailable(
                f"{self.shown} gave no answer within {deadline_s:.0f} s"
            ) from error
        except httpx2.InvalidURL as error:
            raise UserError(f"sandbox.url: {error}", "write http://host:port") from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Unreachable(f"{self.shown} cannot be reached: {_named(error)}") from error
        except httpx2.RemoteProtocolError as error:
            raise WrongProtocol(f"{self.shown} broke off: {_named(error)}") from error
        except httpx2.HTTPError as error:
            raise SandboxUnavailable(f"{self.shown}: {_named(error)}") from error
        return response.status_code, bytes(received)

    def _body(self, program: str, timeout_s: float) -> tuple[bytes, ...]:
        """The request as JSON, in pieces: the files are encoded once and shared by all."""
        fields = {
            "code": program,
            "language": "python",
            "run_timeout": timeout_s,
            "memory_limit_MB": self._memory_mb,
        }
        return json.dumps(fields)[:-1].encode(), b', "files": ', self._files_json, b"}"

    def _open(self) -> _Line:
        try:
            import httpx2
        except ImportError as error:
            raise UserError(
                f"sandbox type 'http' cannot be imported: {error}", "pip install httpx2"
            ) from error
        client = httpx2.AsyncClient(
            auth=self._auth,
            headers={"Accept-Encoding": "identity", "Connection": "close"},
            timeout=httpx2.Timeout(None, connect=_CONNECT_S),
            limits=httpx2.Limits(
                max_connections=self._max_concurrency, max_keepalive_connections=0
            ),
        )
        return _Line(client, asyncio.Semaphore(self._max_concurrency), asyncio.Lock())


def split_url(url: str) -> tuple[str, str, tuple[str, str] | None]:
    """The address to post to, the server as errors may show it, and its user and password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host:
        shown = url.rpartition("@")[2]
        raise UserError(f"sandbox.url: '{shown}' is not a web address", "write http://host:port")
    where = f"[{host}]" if ":" in host else host
    where = where if port is None else f"{where}:{port}"
    base = parts.path.rstrip("/").removesuffix("/run_code")
    endpoint = urlunsplit((parts.scheme, where, f"{base}/run_code", parts.query, ""))
    shown = urlunsplit((parts.scheme, where, base, "", ""))
    if parts.username is None:
        return endpoint, shown, None
    return endpoint, shown, (unquote(parts.username), unquote(parts.password or ""))


async def _chunks(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    """Small enough that no connection holds a copy of large files."""
    for piece in pieces:
        for start in range(0, len(piece), _CHUNK_BYTES):
            yield piece[start : start + _CHUNK_BYTES]


def printable(said: str | bytes) -> str:
    """What a server said, for one line of an error."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
    kept = "".join(x if x.isprintable() else " " for x in text[:_SHOWN_BYTES])
    return cut_middle(" ".join(kept.split()), 300).replace("\n", " ") or "(nothing)"


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
