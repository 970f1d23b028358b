"""Single fields of a request's body, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from retrain.gateway.ask import RequestRefused


def wrong(place: str, expected: str, value: Any) -> RequestRefused:
    """To be raised: says what was expected, and what there is."""
    match value:
        case None | bool() | int() | float():
            shown = json.dumps(value)
        case str():
            shown = repr(value if len(value) <= 60 else value[:57] + "...")
        case _:
            shown = "an object" if isinstance(value, Mapping) else "a list"
    return RequestRefused(f"{place} must be {expected}, not {shown}", param=place)


def boolean(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    """A finite number of the range, its ends included."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, "a number", value)
    if not (low <= value <= high and math.isfinite(value)):
        raise wrong(name, f"from {low:g} to {high:g}", value)
    return value


def integer(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, "an integer", value)
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise wrong(name, expected, value)
    return value


def text(value: Any, place: str) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise wrong(place, "a string that is not empty", value)
    return value


def mapping(value: Any, place: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise wrong(place, "an object", value)
    return value


def listing(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(place, "a list", value)
    return value
