"""OpenAI's Responses API, in the part that agents use.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from retrain.gateway.ask import Ask, Reply, RequestRefused, Wire
from retrain.gateway.wire import sse
from retrain.gateway.wire.errors import openai_body
from retrain.gateway.wire.fields import text
from retrain.gateway.wire.responses_read import (
    Item,
    ResponsesAsk,
    check_results,
    read_request,
    reply_id_of,
)
from retrain.gateway.wire.responses_write import events, output_items, response_id, write

MOST_CHARACTERS = 32_000_000
_OWNER = ("authorization", "x-api-key", "x-retrain-session")
_OVERHEAD = 1_000
"""What a message counts as beside its text."""


@dataclass(eq=False)
class _Kept:
    """An answer, and what its own request added to the conversation: linear in its length."""

    reply: Reply
    told: tuple[Wire, ...]
    before: _Kept | None
    size: int
    holders: int = 1
    """The memory, and the answers right after it; at 0 it is gone."""

    def conversation(self) -> list[Wire]:
        """All messages up to the answer and with it."""
        return [m for kept in self.line() for m in (*kept.told, kept.reply.choices[0].message)]

    def line(self) -> list[_Kept]:
        """From the first of the conversation to this."""
        line: list[_Kept] = []
        at: _Kept | None = self
        while at is not None:
            line.append(at)
            at = at.before
        return line[::-1]


class Responses:
    """A `Dialect` that remembers its answers, for `previous_response_id` and `item_reference`.

    An answer is found by those alone who send the same key and session header as the request that
    it was for. `store: false` is not remembered.

    Args:
        most_characters: of what is remembered, about; the conversation that was not used for
            longest goes first.
    """

    def __init__(self, *, most_characters: int = MOST_CHARACTERS) -> None:
        self._most = most_characters
        self._size = 0
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    def __len__(self) -> int:
        """Answers that are remembered."""
        return len(self._kept)

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], /) -> ResponsesAsk:
        """See `Dialect.read`."""
        sent = {name.lower(): value for name, value in headers.items()}
        owner = "\n".join(sent.get(name, "") for name in _OWNER)

        def find(item_id: str) -> Item:
            return self._item(owner, item_id)

        ask = replace(read_request(body, headers, find), owner=owner)
        before = self._before(ask)
        if before is not None:
            instructions = ask.messages[: len(ask.messages) - len(ask.told)]
            ask = replace(ask, messages=(*instructions, *before.conversation(), *ask.told))
        if not ask.messages:
            raise RequestRefused("input is empty", param="input")
        check_results(ask.messages)
        return ask

    def write(self, reply: Reply, ask: Ask, /) -> dict[str, Any]:
        self._keep(reply, ask)
        return write(reply, ask)

    def events(self, reply: Reply, ask: Ask, /) -> Iterator[bytes]:
        """All events in their documented order; the last is `response.completed`, or
        `response.incomplete` where the answer was cut."""
        self._keep(reply, ask)
        return events(reply, ask)

    def refusal(self, error: RequestRefused, /) -> dict[str, Any]:
        return openai_body(error)

    def refusal_event(self, error: RequestRefused, /) -> bytes:
        """An `error` event; its fields stand twice, since clients raise for a nested `error`."""
        nested = openai_body(error)
        flat = {key: nested["error"][key] for key in ("code", "message", "param")}
        return sse.event("error", {"type": "error", "sequence_number": 0, **flat, **nested})

    def _before(self, ask: ResponsesAsk) -> _Kept | None:
        previous = ask.body.get("previous_response_id")
        if previous is None:
            return None
        kept = self._find(ask.owner, text(previous, "previous_response_id"))
        if kept is None:
            raise RequestRefused(
                f"no previous response has the id {previous!r}: it is not this key's, was not "
                "stored, or is long forgotten; send the whole conversation as input",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return kept

    def _item(self, owner: str, item_id: str) -> Item:
        kept = self._find(owner, f"resp_{reply_id_of(item_id)}")
        if kept is not None:
            for item in output_items(kept.reply.choices[0], kept.reply.id):
                if item["id"] == item_id:
                    return item
        raise RequestRefused(
            f"no item has the id {item_id!r}: it is not this key's, was not stored, or is long "
            "forgotten; send the item itself",
            param="input",
        )

    def _find(self, owner: str, name: str) -> _Kept | None:
        """What leads to an answer is used with it: whole conversations are forgotten, since a late
        answer holds on to all before it."""
        found = self._kept.get((owner, name))
        for kept in found.line() if found else ():
            slot = owner, response_id(kept.reply)
            if slot in self._kept:
                self._kept.move_to_end(slot)
        return found

    def _keep(self, reply: Reply, ask: Ask) -> None:
        if not isinstance(ask, ResponsesAsk) or ask.body.get("store") is False:
            return
        slot = ask.owner, response_id(reply)
        if slot in self._kept:
            return
        previous = ask.body.get("previous_response_id")
        before = self._kept.get((ask.owner, previous)) if previous else None
        if previous and before is None:  # forgotten while the answer was made
            return
        size = sum(_size(message) for message in (*ask.told, reply.choices[0].message))
        self._kept[slot] = _Kept(reply, ask.told, before, size)
        if before is not None:
            before.holders += 1
        self._size += size
        while self._size > self._most:
            self._release(self._kept.popitem(last=False)[1])

    def _release(self, kept: _Kept) -> None:
        """It is not found any more; a later answer may still hold on to it and all before it."""
        at: _Kept | None = kept
        while at is not None:
            at.holders -= 1
            if at.holders:
                return
            self._size -= at.size
            at = at.before


def _size(message: Wire) -> int:
    calls = message.get("tool_calls") or ()
    return (
        _OVERHEAD
        + len(message.get("content") or "")
        + len(message.get("reasoning_content") or "")
        + sum(len(call["function"]["arguments"]) for call in calls)
    )
