"""What the ledger already holds, read as text, so that a new rendering can be held against it."""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from retrain.rendering.tokens import Codec
from retrain.types import Prompt, Rollout, Source


@dataclass(frozen=True)
class Standing:
    """A MODEL message whose own tokens are [start, end) of the sequence."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Ledger:
    """The last segment with what it shares with its ancestors.

    `token_ids` is the full sequence [T]; `standing` lists the MODEL messages in it, in order. A
    message that a fork cut is listed only when nothing but its end-of-turn token is missing.
    """

    token_ids: array[int]
    standing: tuple[Standing, ...]

    @classmethod
    def of(cls, rollout: Rollout, codec: Codec) -> Ledger:
        standing: list[Standing] = []
        index: int | None = len(rollout.segments) - 1
        limit = len(rollout.segments[-1])
        while index is not None:
            segment = rollout.segments[index]
            for span in reversed(segment.turns):
                start, end = segment.prefix_len + span.start, segment.prefix_len + span.end
                if end == limit + 1 and segment.token_ids[span.end - 1] in codec.stop_token_ids:
                    end = limit
                if end <= limit:
                    standing.append(Standing(span.message, start, end))
            index, limit = segment.parent, min(limit, segment.prefix_len)
        return cls(rollout.full_token_ids(), tuple(reversed(standing)))

    @property
    def last(self) -> Standing | None:
        return self.standing[-1] if self.standing else None

    def text_before(self, message: Standing, codec: Codec) -> str:
        """The text of the sequence up to where a message's own tokens start."""
        parts: list[str] = []
        position = 0
        for earlier in self.standing:
            if earlier.start >= message.start:
                break
            parts.append(codec.decode(self.token_ids[position : earlier.start]))
            parts.append(codec.decode(self.token_ids[earlier.start : earlier.end]))
            position = earlier.end
        parts.append(codec.decode(self.token_ids[position : message.start]))
        return "".join(parts)

    def said(self, message: Standing, codec: Codec) -> str:
        """A message's words, without its end-of-turn token."""
        return codec.said(self.token_ids[message.start : message.end])


def last_entered(rollout: Rollout) -> int | None:
    """The last MODEL message that the ledger holds, in whichever segment."""
    return max((span.message for s in rollout.segments for span in s.turns), default=None)


def same_words(a: str, b: str) -> bool:
    """Whether two texts are equal but for white space, which templates trim, and for Unicode
    composition, which tokenizers normalise."""
    return a == b or _squash(a) == _squash(b)


def contains_words(text: str, part: str) -> bool:
    """Whether `part` stands in `text`, white space aside."""
    return _squash(part) in _squash(text)


def _squash(text: str) -> str:
    return unicodedata.normalize("NFC", "".join(text.split()))


def context(parent: int | None, prefix_len: int, token_ids: Sequence[int]) -> Prompt:
    return Prompt(parent, prefix_len, list(token_ids), [int(Source.CONTEXT)] * len(token_ids))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return min(len(a), len(b))


def prompt_token_ids(rollout: Rollout, prompt: Prompt) -> list[int]:
    """Everything that the engine is given for a prompt, [T]."""
    if prompt.parent is None:
        return prompt.token_ids
    shared = rollout.full_token_ids(prompt.parent)[: prompt.prefix_len]
    return [*shared, *prompt.token_ids]
