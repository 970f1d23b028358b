"""The first prompts of conversations: a group asks for the same one many times."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from retrain.rendering.templates import ToolSchema
from retrain.types import Message

KEPT = 64
"""Openings remembered at a time."""


class Openings:
    """Token ids of the latest openings, by what was said and which tools there are."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[tuple[int, ...], tuple[ToolSchema, ...]]] = {}

    def get(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSchema],
        generation: bool,
        encode: Callable[[], Sequence[int]],
    ) -> list[int]:
        """What `encode` gives, called once for equal messages and the same tools."""
        if any(message.tool_calls for message in messages):
            return list(encode())
        words = tuple(
            (m.type, m.content, m.role, m.name, m.reasoning, m.tool_call_id) for m in messages
        )
        key = (words, tuple(map(id, tools)), generation)
        if key not in self._known:
            if len(self._known) >= KEPT:
                del self._known[next(iter(self._known))]
            # The schemas are kept with their ids: those of a lost object may be given again.
            self._known[key] = (tuple(encode()), tuple(tools))
        return list(self._known[key][0])
