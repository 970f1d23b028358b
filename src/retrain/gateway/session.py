"""What a session is: one caller's conversations, kept apart from those of all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from retrain.gateway.ask import Ask, Reply


class Session(Protocol):
    """Whoever answers; calls may overlap."""

    async def answer(self, ask: Ask) -> Reply:
        """The next message of the conversation that the request goes on with.

        It is finished even where the caller goes away meanwhile: shield it from cancellation.

        Raises:
            RequestRefused: with what the caller is to be told.
        """
        ...

    def undelivered(self, reply: Reply) -> None:
        """The caller was gone before it got the answer. If it asks the same again, it gets the
        same; if it does not, the answer counts as never given."""
        ...

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        """What the caller says of the session as a whole; later values replace earlier ones."""
        ...


class SessionBook(Protocol):
    """Finds the session that a request belongs to."""

    def check(self, *, name: str | None, key: str | None) -> None:
        """What `find` would refuse is refused; no session is opened.

        Raises:
            RequestRefused: as `find`.
        """
        ...

    def find(self, *, name: str | None, key: str | None) -> Session:
        """
        Args:
            name: from the URL (`/sessions/NAME/v1/...`) or the header `X-Retrain-Session`.
            key: the API key, from `Authorization: Bearer` or `x-api-key`.

        Raises:
            RequestRefused: 401 for a key that is missing or wrong, 404 for no such session, 409 for
                one that is over.
        """
        ...
