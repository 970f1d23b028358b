"""Sessions that somebody opened beforehand, each with a key of its own."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from retrain.gateway.ask import RequestRefused
from retrain.gateway.session import Session


@dataclass(frozen=True)
class Seat:
    """What a caller has to know."""

    name: str
    """For the URL, `/sessions/NAME/v1`; no secret."""
    key: str = field(repr=False)
    """The API key."""


class Seats:
    """A `SessionBook` of these and no others."""

    def __init__(self) -> None:
        self._seats: dict[str, tuple[Seat, Session]] = {}
        self._by_key: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._seats)

    def open(self, session: Session) -> Seat:
        seat = Seat(secrets.token_hex(8), f"rk-{secrets.token_urlsafe(24)}")
        self._seats[seat.name] = seat, session
        self._by_key[seat.key] = seat.name
        return seat

    def close(self, name: str) -> None:
        """Requests are refused from now on; one that is being answered is not."""
        seat, _ = self._seats.pop(name)
        del self._by_key[seat.key]

    def check(self, *, name: str | None, key: str | None) -> None:
        """
        Raises:
            RequestRefused: as `find`.
        """
        self.find(name=name, key=key)

    def find(self, *, name: str | None, key: str | None) -> Session:
        """
        Raises:
            RequestRefused: the key is not that of an open session, or of another one.
        """
        found = self._by_key.get(key or "")
        if found is None:
            raise RequestRefused("the API key is unknown, or its session is over", status=401)
        if name not in (None, found):
            raise RequestRefused("the API key is that of another session", status=401)
        return self._seats[found][1]
