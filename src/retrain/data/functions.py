"""Rows that a function of the user's makes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from retrain.importing import import_object
from retrain.types import UserError


def call_for_rows(path: str, params: Mapping[str, Any], kind: str) -> Iterable[Any]:
    """What the function at an import path returns for `params`.

    Raises:
        UserError: it cannot be imported, does not take the parameters, or returns no rows.
    """
    function = import_object(path, kind)
    if not callable(function):
        raise UserError(f"{path} is not callable", "Name a function that returns rows.")
    try:
        inspect.signature(function).bind(**params)
    except TypeError as error:
        raise UserError(f"{path} does not take params {dict(params)}: {error}") from error
    rows = function(**params)
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        raise UserError(
            f"{path} returned {type(rows).__name__}, not an iterable of rows",
            "Return or yield dicts, strings or Tasks.",
        )
    return rows
