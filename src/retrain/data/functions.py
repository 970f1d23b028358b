"""Rows that a function of the user's makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from retrain.importing import import_object
from retrain.types import UserError


def call_for_rows(path: str, params: Mapping[str, Any], kind: str) -> Iterable[Any]:
    """What the function at an import path returns for `params`.

    Raises:
        UserError: it cannot be imported, does not take the parameters, or returns no rows.
    """
    rows = import_callable(path, (), params, kind)(**params)
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        raise UserError(
            f"{path} returned {type(rows).__name__}, not an iterable of rows",
            "Return or yield dicts, strings or Tasks.",
        )
    return rows


def import_callable(
    path: str, arguments: Sequence[Any], params: Mapping[str, Any], kind: str
) -> Callable[..., Any]:
    """The function at an import path, which takes `arguments` and then `params` by name.

    Raises:
        UserError: it cannot be imported, or does not take them.
    """
    function = import_object(path, kind)
    if not callable(function):
        raise UserError(f"{path} is not callable", "Name a function.")
    try:
        inspect.signature(function).bind(*arguments, **params)
    except TypeError as error:
        taken = f"a row and params {dict(params)}" if arguments else f"params {dict(params)}"
        raise UserError(f"{path} does not take {taken}: {error}") from error
    return function
