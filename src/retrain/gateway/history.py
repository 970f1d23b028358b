"""Which messages are the same, whichever way they were written down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from retrain.gateway.ask import Wire, text_of

Key = tuple[Any, ...]
"""Of strings, and tuples of them."""


def key_of(wire: Wire) -> Key:
    """What tells a message from another.

    Of what an assistant says, white space around it, the ids of calls, the way arguments are
    written and reasoning do not count: clients change those when they send it again.

    Raises:
        RequestRefused: a part of the content is not text.
    """
    role, text = str(wire.get("role")), text_of(wire.get("content"))
    if role == "assistant":
        calls = [call["function"] for call in wire.get("tool_calls") or ()]
        return said_key(text, ((call["name"], call["arguments"]) for call in calls))
    role = "system" if role == "developer" else role
    return role, text, wire.get("tool_call_id")


def said_key(text: str, calls: Iterable[tuple[str, Any]] = ()) -> Key:
    """The key of an assistant's message; arguments are JSON text, or what it stands for."""
    plain = ((name, _written(plain_arguments(given))) for name, given in calls)
    return "assistant", text.strip(), tuple(plain)


def digests(keys: Iterable[Key]) -> list[str]:
    """Of a conversation's beginnings: entry i stands for its first i messages."""
    chain = [""]
    for key in keys:
        chain.append(link(chain[-1], key))
    return chain


def link(before: str, key: Key) -> str:
    """The digest of a beginning with one more message."""
    return hashlib.sha256(f"{before}\0{key!r}".encode()).hexdigest()


def plain_arguments(arguments: Any) -> Any:
    """What the JSON text of a call's arguments stands for; the text itself where it is none."""
    if not isinstance(arguments, str):
        return dict(arguments) if isinstance(arguments, Mapping) else arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _written(arguments: Any) -> str:
    return json.dumps(arguments, sort_keys=True)
