"""The APIs that are served, each a module that translates to `Ask` and from `Reply`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from retrain.gateway.ask import Ask, Reply, RequestRefused


class Dialect(Protocol):
    """One API. A module with these functions is one."""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], /) -> Ask:
        """
        Args:
            headers: names are found in any case.

        Raises:
            RequestRefused: what the API does not allow, or the model cannot do.
        """
        ...

    def write(self, reply: Reply, ask: Ask, /) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def events(self, reply: Reply, ask: Ask, /) -> Iterator[bytes]:
        """The same answer as server-sent events, what ends the stream included."""
        ...

    def refusal(self, error: RequestRefused, /) -> dict[str, Any]:
        """The body of an answer with `error.status`."""
        ...

    def refusal_event(self, error: RequestRefused, /) -> bytes:
        """What ends a stream that has begun."""
        ...
