"""Where a training stage stands in its data, so that a run resumes exactly."""

from __future__ import annotations

import datetime
import hashlib
import json
import numbers
from collections.abc import Iterator, Mapping, Set
from operator import length_hint
from typing import Any, Generic, Protocol, TypeVar

from retrain.data.tasks import fingerprint
from retrain.data.traces import Trace
from retrain.types import Task, UserError

Position = Mapping[str, Any]
"""JSON-able. Of a `Cursor`: `epoch`; `taken`, the items of it that were handed out; `last`, the id
of the last of them; `fingerprint` of them all, in order; and `size`, the items of an epoch where
that is known."""

_VALUES = (bytes, numbers.Number, datetime.date, datetime.time)
"""Whose `repr` is the same in every process."""


class Item(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Item)
T_co = TypeVar("T_co", bound=Item, covariant=True)


class Epochs(Protocol[T_co]):
    """Items, as often as wanted: epoch n is the same sequence whenever it is asked for."""

    def epoch(self, n: int) -> Iterator[T_co]: ...


class Cursor(Generic[T]):
    """(epoch, item) without end, epoch after epoch.

    `position` is that after the items handed out; nothing is fetched ahead. `restore` goes to a
    position by passing over the items before it, so that a source keeps no state of its own.
    `place` (`prompt_source`) and `noun` (`task`) name the data in messages.
    """

    def __init__(self, source: Epochs[T], *, place: str, noun: str = "task") -> None:
        self._source = source
        self._place = place
        self._noun = noun
        self._epoch = 0
        self._passed = _Passed()
        self._items: Iterator[T] | None = None

    def __iter__(self) -> Cursor[T]:
        return self

    def __next__(self) -> tuple[int, T]:
        """
        Raises:
            UserError: an epoch without an item, or what the source raises; another call tries
                the same item again.
        """
        if self._items is None:
            self.restore(self.position())
        while (item := self._fetch()) is None:
            if self._passed.count == 0:
                raise UserError(f"{self._place}: there is no {self._noun} in epoch {self._epoch}")
            self._items = self._source.epoch(self._epoch + 1)
            self._epoch, self._passed = self._epoch + 1, _Passed()
        self._passed.add(item)
        return self._epoch, item

    def _fetch(self) -> T | None:
        """The epoch's next item. An iterator that raised is over, so it is opened anew."""
        assert self._items is not None
        items, self._items = self._items, None
        item = next(items, None)
        self._items = items
        return item

    def position(self) -> dict[str, Any]:
        """JSON-able, and of one size however much was taken."""
        position: dict[str, Any] = {
            "epoch": self._epoch,
            "taken": self._passed.count,
            "last": self._passed.last,
            "fingerprint": self._passed.fingerprint(),
        }
        size = self._size()
        return position if size < 0 else {**position, "size": size}

    def mark(self) -> dict[str, Any]:
        return self.position()

    def rewound(self, mark: Position) -> dict[str, Any]:
        """`mark` itself: what comes next depends on nothing else."""
        return dict(mark)

    def observe(self, rollouts: object, succeeded: object) -> None:
        """Nothing: the order does not depend on what becomes of the items."""

    def metrics(self, source: str = "") -> dict[str, float]:
        return {}

    def restore(self, position: Position) -> None:
        """Go to where another cursor over the same data was; on an error this one stays.

        Only the items up to the position are compared: their ids, prompts and answers (of a
        trace its messages and tools), not a task's metadata, which rewards may write in.

        Raises:
            UserError: the data has changed.
        """
        epoch, taken = _number(position, "epoch"), _number(position, "taken")
        size = self._size()
        before = position.get("size", size)
        if size >= 0 and before != size:
            raise self._changed(f"an epoch had {before} {self._noun}s and has {size} now")
        items, passed = self._source.epoch(epoch), _Passed()
        while passed.count < taken:
            item = next(items, None)
            if item is None:
                raise self._changed(
                    f"epoch {epoch} ends after {self._noun} {passed.count}, and {taken} of it "
                    "were taken"
                )
            passed.add(item)
        if passed.fingerprint() != position["fingerprint"]:
            raise self._changed(self._difference(position, passed))
        self._epoch, self._passed, self._items = epoch, passed, items

    def _difference(self, position: Position, passed: _Passed) -> str:
        epoch, taken, last = position["epoch"], position["taken"], position["last"]
        if passed.last != last:
            return f"{self._noun} {taken} of epoch {epoch} was {last!r} and is {passed.last!r} now"
        return f"something differs among {self._noun}s 1 to {taken} of epoch {epoch}"

    def _changed(self, difference: str) -> UserError:
        return UserError(
            f"{self._place}: the data is not what the run was trained on: {difference}",
            "Put the data back as it was (a function must give the same rows at each call), or "
            "start a new run.",
        )

    def _size(self) -> int:
        """Items of an epoch; -1 of a stream, which does not know."""
        return length_hint(self._source, -1)


class _Passed:
    """What an epoch has handed out, in memory of one size."""

    def __init__(self) -> None:
        self.count = 0
        self.last = ""
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, item: Item) -> None:
        self.count += 1
        self.last = item.id
        self._hash.update(_content(item).encode() + b"\n")

    def fingerprint(self) -> str:
        return self._hash.hexdigest()


def _content(item: Item) -> str:
    """One line that differs for items that differ, and is the same in every process. Of an
    answer that holds itself nothing enters it."""
    match item:
        case Task():
            said: Any = [item.id, fingerprint(item.prompt), item.answer]
        case Trace():
            said = [item.id, item.tools]
        case _:
            said = [item.id]
    try:
        return json.dumps(said, skipkeys=True, default=_plain)
    except (ValueError, RecursionError):
        return json.dumps(said[:-1])


def _plain(value: object) -> object:
    """What stands for a value that JSON has no form for: its type alone, where its own words
    could name an address."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Set):
        return sorted(json.dumps(v, skipkeys=True, default=_plain) for v in value)
    return repr(value) if isinstance(value, _VALUES) else type(value).__qualname__


def _number(position: Position, key: str) -> int:
    value = position[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} of a data position is {value!r}, not a number")
    return value
