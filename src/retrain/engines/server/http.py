"""One server's address, and JSON there and back."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from retrain.types import FailureKind, InfrastructureError, UserError

if TYPE_CHECKING:
    import httpx2

CONNECT_S = 10.0
SHOWN_CHARS = 300


class Unreachable(InfrastructureError):
    """No connection, or one that broke off; nothing is known of what the server did."""

    kind: FailureKind | None = "engine"


class Refused(InfrastructureError):
    """The server answered, with an error."""

    kind: FailureKind | None = "engine"

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(f"{url} answered {status}: {said}")
        self.status = status
        self.said = said


class Server:
    """An HTTP server that speaks JSON.

    Args:
        url: without a path, such as `http://127.0.0.1:8000`.
        api_key: sent as a bearer token.
        where: what errors call it: the place in the config that it comes from.

    Raises:
        UserError: that is no http address.
    """

    def __init__(self, url: str, *, api_key: str | None = None, where: str = "engine.urls") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{where}: {url!r} is not a web address", "Write http://host:port.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client: httpx2.AsyncClient | None = None

    async def get(self, path: str, timeout_s: float) -> Any:
        """What the server answers; see `post`."""
        return await self._ask("GET", path, None, timeout_s)

    async def post(self, path: str, body: Any, timeout_s: float | None = None) -> Any:
        """What the server answers: parsed JSON, or text that is none. None waits for ever.

        Raises:
            Unreachable: there is no answer.
            Refused: it is an error.
        """
        return await self._ask("POST", path, body, timeout_s)

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def _ask(self, method: str, path: str, body: Any, timeout_s: float | None) -> Any:
        import httpx2

        if self._client is None:
            self._client = httpx2.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                timeout=httpx2.Timeout(None, connect=CONNECT_S),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
                trust_env=False,
            )
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise Unreachable(f"{self.url}{path}: no answer within {timeout_s:g} s") from error
        except httpx2.HTTPError as error:
            named = f"{type(error).__name__}: {error}".rstrip(": ")
            raise Unreachable(f"{self.url}{path}: {named}") from error
        if response.status_code >= 400:
            raise Refused(f"{self.url}{path}", response.status_code, _said(response.text))
        try:
            return response.json()
        except ValueError:
            return response.text


def _said(text: str) -> str:
    """The message of an error, as servers of this kind nest it."""
    try:
        found: Any = json.loads(text)
        while isinstance(found, dict):
            found = next((found[k] for k in ("error", "message", "detail") if k in found), None)
    except ValueError:
        found = None
    return " ".join(str(found or text or "(nothing)").split())[:SHOWN_CHARS]
