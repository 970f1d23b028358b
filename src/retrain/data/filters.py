"""Which rows stay, by what their columns hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

from retrain.data.files import Row, column
from retrain.data.functions import import_callable
from retrain.types import Task, UserError

Condition = Callable[[Any], bool]
"""Of a column's value that is not null.

Raises:
    TypeError: the value is not of the kind that the condition is about.
"""

_VALUES_SHOWN = 5
_HINT = "Name a column that every row has."


@dataclass
class Filter:
    """One entry of `filters`, and how many rows it has seen; a new one for each reading."""

    label: str
    """Names the entry and what it asks, for messages."""
    stays: Callable[[Row], bool]
    value: Callable[[Row], object] | None
    """What it looks at, where that is one column."""
    reached: int = 0
    kept: int = 0
    _refused: dict[str, None] = field(default_factory=dict)
    """Some of the values that did not stay."""

    def __call__(self, row: Row) -> bool:
        self.reached += 1
        if self.stays(row):
            self.kept += 1
            return True
        if self.value is not None and len(self._refused) < _VALUES_SHOWN:
            self._refused[repr(self.value(row))[:40]] = None
        return False

    def fruitless(self) -> UserError:
        """What to say where it keeps nothing."""
        values = ", ".join(self._refused)
        return UserError(
            f"{self.label} keeps none of the {self.reached:,} rows that reach it",
            f"Values there: {values}." if values else "Ask less of them, or remove the filter.",
        )


def column_filter(
    name: str,
    *,
    place: str,
    one_of: Sequence[Any] | None = None,
    none_of: Sequence[Any] | None = None,
    min: float | None = None,
    max: float | None = None,
    min_chars: int | None = None,
    max_chars: int | None = None,
    matches: str | None = None,
) -> Filter:
    """Rows whose column meets every condition that is given. `place`: `filters.0`."""
    given = {
        "one_of": one_of, "none_of": none_of, "min": min, "max": max, "min_chars": min_chars,
        "max_chars": max_chars, "matches": matches,
    }  # fmt: skip
    asked = ", ".join(f"{key} {value!r}" for key, value in given.items() if value is not None)
    conditions: list[Condition] = []
    if min is not None:
        conditions.append(lambda value: _number(value) >= min)
    if max is not None:
        conditions.append(lambda value: _number(value) <= max)
    if min_chars is not None:
        conditions.append(lambda value: len(_text(value)) >= min_chars)
    if max_chars is not None:
        conditions.append(lambda value: len(_text(value)) <= max_chars)
    if matches is not None:
        search = re.compile(matches).search
        conditions.append(lambda value: search(_text(value)) is not None)

    def stays(row: Row) -> bool:
        value = column(row, name, hint=_HINT)
        if one_of is not None and not _among(value, one_of):
            return False
        if none_of is not None and _among(value, none_of):
            return False
        if value is None:
            return not conditions
        try:
            return all(condition(value) for condition in conditions)
        except TypeError as error:
            raise UserError(
                f"{row.place}: {place}: column {name!r} holds {error}",
                "Correct the row, or filter by another column or a function.",
            ) from error

    return Filter(f"{place} ({name}: {asked})", stays, partial(column, name=name, hint=_HINT))


def function_filter(path: str, params: Mapping[str, Any], *, place: str) -> Filter:
    """Rows for which the function at an import path is true.

    Raises:
        UserError: it cannot be imported, or does not take a row and the parameters.
    """
    import numpy as np

    function = import_callable(path, ({},), params, f"{place}.function")

    def stays(row: Row) -> bool:
        try:
            answer = function(dict(row.columns), **params)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{row.place}: {place}: {path} raised {type(error).__name__}: {error}",
                "Correct the function, or filter such rows out before it.",
            ) from error
        if not isinstance(answer, bool | np.bool_):
            raise UserError(
                f"{row.place}: {place}: {path} returned {answer!r}, not whether the row stays",
                "Return True or False.",
            )
        return bool(answer)

    return Filter(f"{place} ({path})", stays, None)


def as_row(row: Row | Task, place: str) -> Row:
    """What filters see of a `Task`: its metadata, `id`, `answer`, and its last message as `prompt`.

    Raises:
        UserError: it has no prompt.
    """
    if isinstance(row, Row):
        return row
    if not row.prompt:
        raise UserError(f"{place}: task {row.id!r} has no prompt", "Give it a message.")
    said = {"prompt": row.prompt[-1].content, "answer": row.answer, "id": row.id}
    return Row({**row.metadata, **said}, place)


def _among(value: Any, options: Sequence[Any]) -> bool:
    return any(_same(value, option) for option in options)


def _same(value: Any, option: Any) -> bool:
    """Equal, and neither of them a truth value where the other is a number. Text counts as the
    number or truth value that it reads as: a CSV file has nothing but text."""
    if isinstance(value, str) != isinstance(option, str):
        text, other = (value, option) if isinstance(value, str) else (option, value)
        return _reads_as(text, other)
    if isinstance(value, bool) != isinstance(option, bool):
        return False
    return bool(value == option)


def _reads_as(text: str, value: Any) -> bool:
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    try:
        if isinstance(value, float):
            return float(text) == value
        return isinstance(value, int) and Decimal(text) == value
    except (ValueError, ArithmeticError):
        return False


def _number(value: Any) -> float:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise TypeError(f"{value[:40]!r}, which is no number") from None
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{type(value).__name__}, not a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__}, not text")
    return value
