"""Sessions that begin when somebody first asks, and end when nobody has for a while."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from retrain.gateway.ask import Ask, Reply, RequestRefused
from retrain.gateway.session import Session

log = logging.getLogger("retrain.gateway")

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
        self._logged: set[str] = set()
        self.failed = 0
        """Sessions whose `ended` raised."""

    def __len__(self) -> int:
        return len(self._open)

    def check(self, *, name: str | None, key: str | None) -> None:
        """
        Raises:
            RequestRefused: the key is missing or wrong.
        """
        if self._keys is not None:
            given = _bytes(key or "")
            if not any([secrets.compare_digest(given, known) for known in self._keys]):
                raise RequestRefused("the API key is missing or wrong", status=401)

    def find(self, *, name: str | None, key: str | None) -> Session:
        """
        Raises:
            RequestRefused: the key is missing or wrong.
        """
        self.check(name=name, key=key)
        if name is None:
            name = "default"
            if key is not None:
                name = f"key-{hashlib.sha256(_bytes(key)).hexdigest()[:16]}"
        if name not in self._open:
            self._open[name] = _Open(self._make(name), time.monotonic())
        visit = _Visit(self, name, self._open[name])
        self.touch(visit)
        return visit

    def touch(self, visit: _Visit) -> None:
        """Its session's silence begins now."""
        visit.held.asked = time.monotonic()
        if self._open.get(visit.name) is visit.held:
            self._open.move_to_end(visit.name)

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
        session = self._open.pop(name).session
        try:
            self._ended(name, session)
        except Exception as error:
            self.failed += 1
            kind = type(error).__name__
            if kind not in self._logged:
                self._logged.add(kind)
                log.error("the end of a session failed: %s", kind, exc_info=error)


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class _Visit:
    """A request at a session, which does not end while it is answered."""

    book: Sessions
    name: str
    held: _Open

    async def answer(self, ask: Ask) -> Reply:
        self.held.under_way += 1
        try:
            return await self.held.session.answer(ask)
        finally:
            self.held.under_way -= 1
            self.book.touch(self)

    def undelivered(self, reply: Reply) -> None:
        self.held.session.undelivered(reply)

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        self.held.session.note(reward, metadata)
