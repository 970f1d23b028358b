"""Server-sent events, and text cut into the pieces that a stream sends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

MOST_PIECES = 32
"""Of one text: the whole of it is there already, so more would only cost time."""

WAITING = b": waiting\n\n"
"""A comment: clients skip it, and it keeps what lies between from giving the connection up."""

_WORD = re.compile(r"\s*\S+|\s+")


def data(value: Any) -> bytes:
    """An event without a name."""
    return b"data: " + _dumps(value) + b"\n\n"


def event(name: str, value: Mapping[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _dumps(value) + b"\n\n"


def pieces(text: str) -> list[str]:
    """The text, cut before white space; one word each where they are few. None of nothing."""
    words = _WORD.findall(text)
    each = -(-len(words) // MOST_PIECES) or 1
    return ["".join(words[start : start + each]) for start in range(0, len(words), each)]


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
