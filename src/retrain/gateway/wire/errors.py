"""Requests that cannot be read, failures while they are answered, and OpenAI's shape for both."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from retrain.gateway.ask import RequestRefused
from retrain.types import InfrastructureError, UserError

MOST_LEVELS = 200
"""Of objects and lists in each other."""
UPSTREAM_REFUSED = "upstream_refused"
"""Code of a 502 that asking again does not help against."""
_CONTAINERS = (dict, list)
_CODES = {401: "invalid_api_key", 404: "not_found"}


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        RequestRefused: it is none, or has what JSON does not (NaN), a number beyond the largest,
            or what UTF-8 cannot write (half of a surrogate pair).
    """
    try:
        text = raw.decode()
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        if _is_deep(value):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        raise RequestRefused(_unreadable(error)) from None
    if not isinstance(value, dict):
        raise RequestRefused(f"the body is JSON, but not an object: {type(value).__name__}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether it has more levels than whatever comes later can be trusted with."""
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(MOST_LEVELS):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) in _CONTAINERS
        ]
        if not level:
            return False
    return True


def _unreadable(error: ValueError | RecursionError) -> str:
    match error:
        case UnicodeDecodeError():
            return f"the body is not UTF-8: byte {error.start} is not part of a character"
        case UnicodeEncodeError():
            return "the body has half of a surrogate pair, which is no character"
        case RecursionError():
            return "the body is nested too deeply"
        case json.JSONDecodeError():
            return f"the body is not JSON: {error.msg} at character {error.pos}"
    return f"the body is not JSON: {error}"  # a constant, or a number with thousands of digits


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:20]} is too large for a number")
    return value


def refusal_of(error: Exception) -> RequestRefused | None:
    """What the caller is told of a failure; None where it is of no known kind.

    503 has clients try again, 400 has them stop.
    """
    if isinstance(error, RequestRefused):
        return error
    if isinstance(error, InfrastructureError):
        return RequestRefused(f"the model is out of reach: {error}", status=503)
    if isinstance(error, UserError):
        return RequestRefused(str(error))
    return None


def openai_body(error: RequestRefused) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    code = error.code or _CODES.get(error.status)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}
