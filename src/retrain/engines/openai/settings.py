"""An endpoint as the params of a tool or of a reward describe it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from retrain.engines.openai.chat import ChatEndpoint
from retrain.importing import suggest
from retrain.types import UserError

_TEXTS = ("url", "model", "api_key_env")
_COUNTS = {"max_tokens": 1, "retries": 0, "max_concurrency": 1}
"""Whole numbers, and the least that each may be."""
_AMOUNTS = ("temperature", "timeout_s", "backoff_s", "prompt_price", "completion_price")


def endpoint_of(given: Mapping[str, Any], where: str) -> ChatEndpoint:
    """The endpoint that a mapping describes: `url` and `model`, `api_key_env` (the environment
    variable that holds the key) and the other parameters of `ChatEndpoint`.

    Nothing is asked of it yet.

    Args:
        where: the place that the mapping comes from, for errors.

    Raises:
        UserError: a key is unknown or missing, has a value that cannot be, or the variable with
            the API key is not set.
    """
    known = (*_TEXTS, *_COUNTS, *_AMOUNTS)
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{where} has no key '{key}'", suggest(key, known, "keys"))
        _check(key, value, where)
    for key in ("url", "model"):
        if key not in given:
            raise UserError(f"{where} needs the key '{key}'", f"Keys: {', '.join(known)}.")
    return ChatEndpoint(
        given["url"],
        given["model"],
        api_key=read_key(given.get("api_key_env"), f"{where}.api_key_env"),
        where=where,
        **{key: value for key, value in given.items() if key not in _TEXTS},
    )


def _check(key: str, value: Any, where: str) -> None:
    if key in _TEXTS:
        fits = isinstance(value, str) or (key == "api_key_env" and value is None)
        expected = "a text"
    elif key in _COUNTS:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= _COUNTS[key]
        expected = f"a whole number of at least {_COUNTS[key]}"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        positive = key == "timeout_s"
        fits = number and math.isfinite(value) and (value > 0 if positive else value >= 0)
        expected = "a number above zero" if positive else "a number of at least zero"
    if not fits:
        raise UserError(f"{where}.{key} is {value!r}", f"Give {expected}.")


def read_key(variable: str | None, where: str) -> str | None:
    """The API key that an environment variable holds; None where none is named.

    Args:
        where: the place in the config that names the variable.

    Raises:
        UserError: it is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{where}: the environment variable {variable} is not set",
            f"Put the key there: export {variable}=...",
        )
    return key
