"""What was said, on disk as it happens: the log that `retrain distill --from` reads.

A line is an exchange: the messages that its conversation gained, and the reply. What a session is
worth, and what else its caller says of it, has lines of its own. docs/gateway.md lists the fields.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrain.gateway.ask import Ask, Reply, Wire
from retrain.gateway.history import digests, key_of, link
from retrain.gateway.session import Session
from retrain.types import UserError

MOST_WRITTEN = 256
MOST_KNOWN = 20_000
"""Beginnings of conversations that a session remembers; the oldest go first, and what goes on from
them then begins a conversation of its own."""


class AppendOnly:
    """A file that grows by whole pieces: one that cannot be written to its end leaves nothing.

    Args:
        key: of the config, which names the file.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self.last = _last_byte(path) if self._file.tell() else b""
            """Byte of what was there before."""
        except OSError as error:
            raise UserError(
                f"{key}: {path} cannot be written: {error.strerror}", "Check the path."
            ) from None

    def write(self, piece: bytes) -> None:
        """
        Raises:
            OSError: the disk is full, say.
        """
        start = self._file.seek(0, os.SEEK_END)
        left = memoryview(piece)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(start)
            raise

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


class Records:
    """An append-only file of JSON lines.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.exchanges = 0
        self.opened = secrets.token_hex(4)
        """Tells the sessions of this gateway from those that the file has of others."""
        self._file = AppendOnly(path, "gateway.records")
        if self._file.last not in (b"", b"\n"):
            self._file.write(b"\n")

    def write(self, line: Mapping[str, Any]) -> None:
        """
        Raises:
            OSError: as `AppendOnly.write`.
        """
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
        self._file.write(text.encode("utf-8", "replace"))
        self.exchanges += line["type"] == "exchange"

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class _Place:
    """Where a conversation stood after a reply."""

    conversation: str
    messages: int
    tools: int
    """A hash of those that the line before has told of."""


class RecordedSession:
    """A session whose exchanges are written down.

    Conversations are told apart by what they say, as the policy's own are: a request whose messages
    begin with all of a conversation, its last reply included, goes on with it.

    Args:
        inner: answers.
        name: of the session.
    """

    def __init__(self, inner: Session, records: Records, name: str) -> None:
        self.inner = inner
        self._records = records
        self._session = f"{name}~{records.opened}"
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._ends: dict[str, int] = {}
        self._begun = 0
        self._tag = secrets.token_hex(4)
        """A session of that name may have been open before."""
        self._written: OrderedDict[str, int] = OrderedDict()
        """Of the latest replies, by id, the choices that are written: one that is asked for again
        is not written again."""

    async def answer(self, ask: Ask) -> Reply:
        """
        Raises:
            RequestRefused: as the inner session.
            OSError: the answer cannot be written; who asks again gets the same.
        """
        reply = await self.inner.answer(ask)
        written = self._written.get(reply.id, 0)
        chain = digests(map(key_of, ask.messages)) if written < len(reply.choices) else []
        try:
            for count, choice in enumerate(reply.choices[written:], written + 1):
                self._write(ask, chain, reply, choice.message, choice.finish_reason)
                self._written[reply.id] = count
        except OSError:
            self.inner.undelivered(reply)
            raise
        while len(self._written) > MOST_WRITTEN:
            self._written.popitem(last=False)
        return reply

    def undelivered(self, reply: Reply) -> None:
        self.inner.undelivered(reply)

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        self.inner.note(reward, metadata)
        line = {"type": "session", "session": self._session, "reward": reward}
        self._records.write({**line, "metadata": dict(metadata), "at": time.time()})

    def _write(
        self, ask: Ask, chain: Sequence[str], reply: Reply, message: Wire, finish: str
    ) -> None:
        place, known = self._place(chain)
        more = known < len(ask.messages)
        goes_on = place is not None and more and self._ends.get(place.conversation) == known
        parent = None
        if place is None or not goes_on:
            parent = None if place is None else place.conversation
            self._begun += 1
            place, known = _Place(f"{self._session}/{self._tag}-{self._begun}", 0, 0), 0
        tools = hash(json.dumps(ask.tools, sort_keys=True, default=str)) if ask.tools else 0
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        line: dict[str, Any] = {
            "type": "exchange",
            "id": reply.id,
            "session": self._session,
            "conversation": place.conversation,
            "parent": parent,
            "at": time.time(),
            "model": reply.model,
            "messages": [dict(each) for each in ask.messages[known:]],
            "reply": dict(message),
            "finish_reason": finish,
            "usage": usage,
        }
        if tools != place.tools:
            line["tools"] = [dict(schema) for schema in ask.tools]
        self._records.write(line)
        self._remember(chain, replace(place, tools=tools), message)

    def _place(self, chain: Sequence[str]) -> tuple[_Place | None, int]:
        """The longest beginning of these messages that a conversation stood at, and its length."""
        for length in range(len(chain) - 1, 0, -1):
            place = self._places.get(chain[length])
            if place is not None:
                return place, length
        return None, 0

    def _remember(self, chain: Sequence[str], place: _Place, message: Wire) -> None:
        end = link(chain[-1], key_of(message))
        if end in self._places:
            self._close(self._places[end])
        self._places[end] = replace(place, messages=len(chain))
        self._places.move_to_end(end)
        self._ends[place.conversation] = len(chain)
        while len(self._places) > MOST_KNOWN:
            self._close(self._places.popitem(last=False)[1])

    def _close(self, gone: _Place) -> None:
        """Nothing can go on from there any more."""
        if self._ends.get(gone.conversation) == gone.messages:
            del self._ends[gone.conversation]
