"""Sessions that begin when somebody first asks, and end when nobody has for a while."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from retrain.gateway.ask import Ask, Reply, RequestRefused
from retrain.gateway.session import Session

MOST_SESSIONS = 100_000
"""Open at once; the one that was longest silent ends first."""


@dataclass
class _Open:
    session: Session
    asked: float
    under_way: int = 0


class Sessions:
    """A `SessionBook` that opens a session for every name that it has not heard yet.

    A session is named by the URL or the header, else by a digest of the API key.

    Args:
        make: opens the session of a name.
        ended: is told of one that is over.
        keys: that are taken; None takes any, and none too.
        idle_s: of silence, after which a session is over.
    """

    def __init__(
        self,
        make: Callable[[str], Session],
        ended: Callable[[str, Session], None],
        *,
        keys: Collection[str] | None = None,
        idle_s: float = 600.0,
    ) -> None:
        self._make = make
        self._ended = ended
        self._keys = None if keys is None else [key.encode() for key in keys]
        self._idle_s = idle_s
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def find(self, *, name: str | None, key: str | None) -> Session:
        """
        Raises:
            RequestRefused: the key is missing or wrong.
        """
        if self._keys is not None:
            given = (key or "").encode()
            if not any([secrets.compare_digest(given, known) for known in self._keys]):
                raise RequestRefused("the API key is missing or wrong", status=401)
        if name is None:
            name = "default"
            if key is not None:
                name = f"key-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        if name not in self._open:
            self._open[name] = _Open(self._make(name), time.monotonic())
        self._open[name].asked = time.monotonic()
        self._open.move_to_end(name)
        return _Visit(self._open[name])

    def sweep(self) -> None:
        """End the sessions that nobody has asked for long."""
        now = time.monotonic()
        for name, found in list(self._open.items()):
            silent = now - found.asked > self._idle_s
            if not silent and len(self._open) <= MOST_SESSIONS:
                break
            if not found.under_way:
                self._end(name)

    def close(self) -> None:
        """End all of them."""
        for name in list(self._open):
            self._end(name)

    def _end(self, name: str) -> None:
        self._ended(name, self._open.pop(name).session)


@dataclass(frozen=True)
class _Visit:
    """A request's hold on a session: it does not end meanwhile."""

    held: _Open

    async def answer(self, ask: Ask) -> Reply:
        self.held.under_way += 1
        try:
            return await self.held.session.answer(ask)
        finally:
            self.held.under_way -= 1
            self.held.asked = time.monotonic()

    def undelivered(self, reply: Reply) -> None:
        self.held.session.undelivered(reply)

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        self.held.session.note(reward, metadata)
